"""A script's `--help`, from the source of its configuration: importing it would import torch.

The options that `FIRST` of the class names come first, the others by group.
"""

import ast
import difflib
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
SCRIPT = "script"
"""The group of the options that are in no other."""
ASKS = ("--help", "-h")
INDENT = 26


@dataclass(frozen=True)
class Declared:
    """An option as its class declares it; `default` is "" where there is nothing to say."""

    name: str
    default: str
    text: str


@dataclass(frozen=True)
class Group:
    """Options that are declared together, and the first sentence on them."""

    text: str
    options: Sequence[Declared]


def show_help(module: str, name: str) -> None:
    """Print the help that the command line asks for, if it does, and end the program.

    `name` is the configuration's class, in `module` of this package.
    """
    if topic := asked(sys.argv[1:]):
        show(PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py"), name, topic)


def asked(args: Sequence[str]) -> str | None:
    """The topic after `--help`, which is "first" if there is none; None if help is not asked."""
    for argument, after in zip(args, (*args[1:], "-"), strict=False):
        option, equals, topic = argument.partition("=")
        if option in ASKS:
            return topic if equals else "first" if after.startswith("-") else after
    return None


def show(path: Path, name: str, topic: str) -> None:
    """Print the help on a topic and end the program; `name` is the class in the file at `path`.

    The exit code is 2, after a sentence, for a topic that there is not.
    """
    groups = _groups(path, name)
    found = _class(path, name)
    assert found is not None
    own, here = found
    flat = {one.name: one for group in groups.values() for one in group.options}
    if topic == "first":
        said = _first(own, here, groups, flat)
    elif topic == "all":
        said = "\n".join(_section(title, group) for title, group in groups.items())
    elif topic in groups:
        said = _section(topic, groups[topic])
    elif topic in flat:
        said = _shown(flat[topic])
    else:
        near = difflib.get_close_matches(topic, [*groups, *flat], 1, cutoff=0.6)
        meant = f"did you mean {near[0]}? " if near else ""
        print(
            f"error: --help {topic}: there is no such group or option; {meant}the groups are "
            f"{', '.join(groups)}, and --help all shows all",
            file=sys.stderr,
        )
        sys.exit(2)
    try:
        print(said, flush=True)
    except BrokenPipeError:  # whoever read it, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # it is flushed at the end
    sys.exit(0)


def _first(
    own: ast.ClassDef, here: Path, groups: dict[str, Group], flat: dict[str, Declared]
) -> str:
    """The short help: the first options, the names of the groups, and examples."""
    first, program = _constant(own.body, "FIRST", here) or list(flat)[:10], _program()
    assert isinstance(first, Sequence)
    config = Declared("config", "", "a YAML file of options; what is typed after it wins")
    names = "\n".join(_row(f"  {title}", group.text) for title, group in groups.items())
    examples = _constant(own.body, "EXAMPLES", here) or []
    assert isinstance(examples, Sequence)
    lines = [
        f"usage: {program} [--config FILE.yaml] [--OPTION VALUE ...]",
        "",
        textwrap.fill(_sentence(ast.get_docstring(own)), _width()),
        "",
        *map(_shown, (config, *(flat[name] for name in first))),
        "",
        f"the other options: --help GROUP, or --help all; {len(flat)} together, in these groups",
        names,
    ]
    if examples:
        lines += ["", "examples:", *(f"  {program} {example}" for example in examples)]
    return "\n".join(lines)


def _program() -> str:
    path = Path(sys.argv[0])
    if path.parent.name == "scripts":
        return f"accelerate launch -m latentdiff.scripts.{path.stem}"
    return f"accelerate launch {sys.argv[0]}"


def _section(title: str, group: Group) -> str:
    head = textwrap.fill(f"{title}: {group.text}" if group.text else title, _width())
    return "\n".join([head, *map(_shown, group.options), ""])


def _shown(option: Declared) -> str:
    default = f"(default: {option.default})" if option.default else ""
    return _row(f"  --{option.name}", " ".join(filter(None, (option.text, default))))


def _row(left: str, right: str) -> str:
    gap = " " * INDENT
    filled = textwrap.fill(right, _width(), initial_indent=gap, subsequent_indent=gap)
    if len(left) > INDENT - 2:
        return f"{left}\n{filled}".rstrip()
    return (left + filled[len(left) :]).rstrip()


def _width() -> int:
    return min(100, max(60, shutil.get_terminal_size().columns - 2))


def _groups(path: Path, name: str) -> dict[str, Group]:
    """The options of a class by group: its own, those of its groups, and of nested classes."""
    found = _class(path, name)
    assert found is not None
    own, here = found
    script, others = [], {}
    for node in _fields(own):
        title, value = _name(node), node.value
        text = _docstring(own, node)
        if isinstance(value, ast.Call) and _called(value) == "group":
            kind = value.args[0]
            assert isinstance(kind, ast.Name)
            changes = {one.arg: one.value for one in value.keywords}
            others[title] = _options(here, kind.id, changes=changes)
            continue
        script.append(Declared(title, _default(value, here), _choices(node, here) + text))
        for kind in ast.walk(node.annotation):
            if isinstance(kind, ast.Name) and _class(here, kind.id) is not None:
                others[title] = _options(here, kind.id, prefix=f"{title}.")
    return {SCRIPT: Group("of this script alone", script)} | others


def _options(
    path: Path, name: str, *, prefix: str = "", changes: dict[str | None, ast.expr] | None = None
) -> Group:
    found = _class(path, name)
    assert found is not None
    own, here = found
    options = []
    for node in _fields(own):
        title = _name(node)
        changed = (changes or {}).get(title)
        default = _default(node.value, here) if changed is None else _default(changed, path)
        text = _choices(node, here) + _docstring(own, node)
        options.append(Declared(prefix + title, default, text))
    return Group(_sentence(ast.get_docstring(own)), options)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _class(path: Path, name: str) -> tuple[ast.ClassDef, Path] | None:
    """The dataclass of that name in a file, or where the file imports it from; else None."""
    for node in _tree(path).body:
        if isinstance(node, ast.ClassDef) and node.name == name and node.decorator_list:
            return node, path
        if source := _imported(node, name):
            return _class(source, name)
    return None


def _imported(node: ast.stmt, name: str) -> Path | None:
    """The file of this package that a statement imports a name from."""
    if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("latentdiff."):
        return None
    if name not in [alias.name for alias in node.names]:
        return None
    path = PACKAGE.parent.joinpath(*(node.module or "").split(".")).with_suffix(".py")
    return path if path.is_file() else None


def _fields(own: ast.ClassDef) -> Iterator[ast.AnnAssign]:
    for node in own.body:
        if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation):
            yield node


def _name(node: ast.AnnAssign) -> str:
    return ast.unparse(node.target)


def _docstring(own: ast.ClassDef, node: ast.AnnAssign) -> str:
    after = own.body[own.body.index(node) + 1 :][:1]
    value = after[0].value if after and isinstance(after[0], ast.Expr) else None
    text = value.value if isinstance(value, ast.Constant) else None
    return " ".join(text.split()) if isinstance(text, str) else ""


def _choices(node: ast.AnnAssign, path: Path) -> str:
    """The values that a Literal allows, in words; "" for another type."""
    kind = node.annotation
    for one in _tree(path).body:
        if isinstance(one, ast.Assign) and ast.unparse(one.targets[0]) == ast.unparse(kind):
            kind = one.value
    if not (isinstance(kind, ast.Subscript) and ast.unparse(kind.value) == "Literal"):
        return ""
    values = kind.slice.elts if isinstance(kind.slice, ast.Tuple) else [kind.slice]
    return f"[{'|'.join(str(ast.literal_eval(value)) for value in values)}] "


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _default(value: ast.expr | None, path: Path) -> str:
    """A default as one types it; "" for none, and for what is no literal."""
    if isinstance(value, ast.Call) and _called(value) in ("option", "Path") and value.args:
        return _default(value.args[0], path)
    try:
        literal = ast.literal_eval(value) if value is not None else None
    except ValueError:
        named = isinstance(value, ast.Name)
        literal = _constant(_tree(path).body, value.id, path) if named else None
    if literal is None or literal in ((), {}):
        return ""
    if isinstance(literal, bool):
        return str(literal).lower()
    return f"[{', '.join(map(str, literal))}]" if isinstance(literal, tuple) else str(literal)


def _constant(body: Sequence[ast.stmt], name: str, path: Path) -> object:
    """The literal that a name is set to, or None where it is none."""
    for node in body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if name in map(ast.unparse, targets) and node.value is not None:
                try:
                    return ast.literal_eval(node.value)
                except ValueError:
                    return None
        if source := _imported(node, name):
            return _constant(_tree(source).body, name, source)
    return None


def _sentence(text: str | None) -> str:
    return " ".join((text or "").split("\n\n")[0].split())
