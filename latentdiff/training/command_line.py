"""A script's command line: its configuration from a YAML file and options, and how it ends."""

import inspect
import multiprocessing
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from jsonargparse import (
    ArgumentError,
    ArgumentParser,
    Namespace,
    set_loader,
)

from latentdiff.formats.yaml_text import parse_yaml
from latentdiff.options import (
    check_effects,
    check_utf8,
    compose,
    expanded,
    former_names,
    groups,
    idle_options,
)
from latentdiff.training.help import asked, show
from latentdiff.training.processes import leaving

T = TypeVar("T")

ALLOWED = {
    "str": "a text, in quotes where it looks like something else",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "Sequence": "a list, such as [a, b]",
    "Mapping": "names with values, such as {a: b}",
}
"""What a value must be, for the types that jsonargparse names as Python does."""
BEFORE = "interrupted before the first step; run the same command again"
INTERRUPTED = 130  # 128 + 2, as shells know SIGINT


def parse_config(cls: type[T], args: Sequence[str] | None = None) -> tuple[T, str]:
    """Read `--config file.yaml` and `--key value`; returns the configuration and its YAML, which
    has every option but those without an effect.

    Raises ValueError, in one sentence, for unknown keys, wrong types, values that the dataclass
    refuses, and options that are given and have no effect. `--help` and `--print_config` print and
    end the program.
    """
    args = sys.argv[1:] if args is None else args
    check_utf8(args)
    _check_not_empty(args)
    if topic := asked(args):
        show(Path(inspect.getfile(cls)), cls.__name__, topic)
    set_loader("yaml", _load_yaml, (yaml.YAMLError,))
    parser = ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file; later options override it")
    parser.add_class_arguments(cls, skip={one.name for one in groups(cls)})
    for one in groups(cls):
        default = one.default_factory()  # pyright: ignore[reportCallIssue] # a group has one
        parser.add_class_arguments(type(default))
        parser.set_defaults({each.name: getattr(default, each.name) for each in fields(default)})
    try:
        namespace: Namespace = parser.parse_args(args)
        for name, value in list(vars(namespace).items()):
            namespace[name] = expanded(value)
        namespace.pop("config", None)
        for name, kind in get_type_hints(cls).items():
            is_flat = name in {one.name for one in groups(cls)}
            if is_dataclass(kind) and not is_flat and not isinstance(namespace[name], Namespace):
                raise ValueError(f"{name}={namespace[name]} must be {ALLOWED['Mapping']}")
        config = compose(cls, vars(parser.instantiate(namespace)))
        typed = [arg.removeprefix("--").partition("=")[0] for arg in args if arg.startswith("--")]
        check_effects(config, typed)
        for name, _ in idle_options(config):
            if "." not in name:
                namespace.pop(name, None)
        return config, parser.dump(namespace, skip_unset=False, skip_validation=True)
    except (ArgumentError, ValueError) as error:
        raise ValueError(_sentence(str(error), cls)) from error


def _check_not_empty(args: Sequence[str]) -> None:
    """Raise ValueError for an option without a value: an empty path is the current folder."""
    for before, argument in zip(("", *args), args, strict=False):
        name = before if argument == "" else argument.removesuffix("=")
        if name != argument and name.startswith("--"):
            raise ValueError(f"{name.removeprefix('--')} must not be empty")


def _load_yaml(text: str, path: str = "") -> Any:
    """A configuration file at `path`, or without one a value of the command line."""
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if path else str(error)) from error
    # {} with words alone, such as "{a cat}", is a text of the command line.
    words = isinstance(value, dict) and value and not any(value.values()) and not path
    return text if words else value


def _option_paths(config: Any) -> Iterator[str]:
    """How options are typed: those of a group flat, those of another dataclass as outer.inner."""
    flat, kinds = {one.name for one in groups(config)}, get_type_hints(config)
    for name in (one.name for one in fields(config)):
        kind = kinds[name]
        if name in flat:
            yield from _option_paths(kind)
            continue
        yield name
        for member in get_args(kind) or (kind,):
            if is_dataclass(member):
                yield from (f"{name}.{path}" for path in _option_paths(member))


def _sentence(text: str, config: type[Any]) -> str:
    """What jsonargparse says in one sentence: the option, its value and what is allowed."""
    text, path = " ".join(text.split()), ""
    if scalars := re.fullmatch(
        r'Parser key "(.+?)": Does not validate against any of .*? Errors: '
        r"((?:- Expected a (?:<class '\w+'>|typing\.Literal\[.*?\]) )+)"
        r"Given value type: .*? Given value: (.*)",
        text,
    ):
        kinds = " or ".join(_allowed(kind) for kind in scalars[2].split("- Expected a ")[1:])
        return f"{scalars[1]}={scalars[3]} must be {kinds}"
    # Of a dataclass that may be None it lists all that is allowed; the first error is the user's.
    if nested := re.match(
        r'(?:Parser key "(.+?)": )?Does not validate against any of .*? Errors: - '
        r"(?:Problem with given class_path '.*?': )?(.*?) - Expected a",
        text,
    ):
        path, text = f"{nested[1]}." if nested[1] else "", nested[2]
        if value := re.fullmatch("Expected a dot import path string: (.*)", text):
            return f"{nested[1]}={value[1]} must be {ALLOWED['Mapping']}"
    if wrong := re.fullmatch(r'Parser key "(.+?)": Expected a (.+)\. Got value: (.*)', text):
        return f"{path}{wrong[1]}={wrong[3]} must be {_allowed(wrong[2])}"
    if inner := re.fullmatch("Group '(.+?)' does not accept option '(.+?)'", text):
        path, text = f"{inner[1]}.", f"Option '{inner[2]}' is not accepted"
    if unknown := re.match(r"unrecognized arguments: --([\w.]+)|Option '(.+?)' is not acc", text):
        name = path + (unknown[1] or unknown[2])
        if name in (renamed := former_names(config)):
            return f"{name} is named {renamed[name]} now"
        near = get_close_matches(name, list(_option_paths(config)), 1, cutoff=0.75)
        return f"{name} is no option" + (f"; did you mean {near[0]}?" if near else "")
    if required := re.fullmatch("the following arguments are required: (.*)", text):
        names = required[1].split(", ")
        paths = [path for path in _option_paths(config) if path.rpartition(".")[2] in names]
        return f"{' and '.join(paths)} must be given as well"
    return text.removeprefix('Parser key "config": ')


def _allowed(kind: str) -> str:
    """What a value must be, from jsonargparse's name of its type."""
    kind = re.sub(r"<class '(?:.*\.)?(\w+)'>", r"\1", kind.strip())
    if choices := re.fullmatch(r"typing\.Literal\[(.*)\]", kind):
        return choices[1] if "," not in choices[1] else f"one of {choices[1]}"
    return ALLOWED.get(kind, kind)


def write_config(text: str, folder: Path) -> None:
    """Write `config.yaml` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(text, encoding="utf-8")


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main; what its user got wrong ends in one sentence and exit code 2.

    Control-C ends in the sentence that its KeyboardInterrupt has.
    """
    with leaving():
        try:
            main()
        except (ValueError, OSError) as error:  # OSError: a damaged image, a full disk
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt as interrupt:
            print(str(interrupt) or BEFORE, file=sys.stderr)
            sys.exit(INTERRUPTED)
        finally:
            # Readers of data outlive SIGTERM, with which Python ends its children before it waits.
            for reader in multiprocessing.active_children():
                reader.kill()
