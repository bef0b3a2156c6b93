"""The house rules that a program can check: imports, names, docstrings, sizes, unsafe loading."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(path for top in ("latentdiff", "train") for path in (ROOT / top).rglob("*.py"))
SOURCES = SHIPPED + sorted(
    path for top in ("benchmarks", "tests") for path in (ROOT / top).rglob("*.py")
)
MAX_LINES = 400
MAX_FUNCTION_LINES = 60
DRAWERS = {"common.py", "helpers.py", "misc.py", "util.py", "utils.py"}
UNSAFE_LOADERS = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(tree: ast.Module) -> set[str]:
    """The top-level packages that a module imports, at its top or inside a function."""
    packages = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            packages.add(node.module.partition(".")[0])
    return packages


def offenders(rule: str, paths: list[str]) -> None:
    assert not paths, f"{rule}: {', '.join(paths)}"


def test_import_contracts_of_pyproject_are_kept() -> None:
    """Floors, no circles, accelerate in training alone, drawing without the training wing.

    In a process of its own: import-linter disables all loggers there are, and tests that assert
    that nobody logs a warning would hold of anything.
    """
    code = "from importlinter.cli import lint_imports as lint; raise SystemExit(lint(no_logo=True))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_training_imports_accelerate() -> None:
    """import-linter sees the package alone; this covers the scripts beside it as well."""
    allowed = (ROOT / "latentdiff" / "training", ROOT / "train")
    offenders(
        "only latentdiff/training/ and train/ import accelerate",
        [
            name(path)
            for path in SHIPPED
            if "accelerate" in imported(parse(path))
            and not any(path.is_relative_to(folder) for folder in allowed)
        ],
    )


def test_no_module_is_a_drawer_for_odds_and_ends() -> None:
    offenders("name a module for its subject", [name(p) for p in SOURCES if p.name in DRAWERS])


def test_every_module_opens_with_a_docstring() -> None:
    offenders(
        "a module opens with a sentence that says what it is",
        [name(path) for path in SOURCES if not ast.get_docstring(parse(path))],
    )


def test_no_file_is_longer_than_400_lines() -> None:
    offenders(
        f"split files of more than {MAX_LINES} lines by their reason to change",
        [
            f"{name(path)} ({lines})"
            for path in SOURCES
            if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
        ],
    )


def test_no_function_is_longer_than_60_lines() -> None:
    offenders(
        f"split functions of more than {MAX_FUNCTION_LINES} lines by what they do",
        [
            f"{name(path)}: {node.name} ({lines})"
            for path in SHIPPED
            for node in ast.walk(parse(path))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and node.end_lineno is not None
            and (lines := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES
        ],
    )


def test_configurations_are_composed_and_never_inherited() -> None:
    """Of 69 flat fields from five base classes nobody could say where one came from."""
    offenders(
        "give a dataclass a field of the other's type in place of a base class",
        [
            f"{name(path)}: {node.name}"
            for path in SHIPPED
            for node in ast.walk(parse(path))
            if isinstance(node, ast.ClassDef)
            and node.bases != []
            and any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
            and re.search(
                r"Config\b|^Train|^Cache", " ".join([node.name, *map(ast.unparse, node.bases)])
            )
        ],
    )


def test_weights_are_never_unpickled() -> None:
    """Unpickling runs the file's code; safetensors cannot. Training state is no exception.

    One file may, torch's restricted unpickler for `latentdiff convert --unsafe_pickle`.
    """
    found = []
    for path in SHIPPED:
        tree = parse(path)
        loads = any(
            isinstance(node, ast.Attribute)
            and node.attr == "load"
            and isinstance(node.value, ast.Name)
            and node.value.id == "torch"
            for node in ast.walk(tree)
        )
        from_torch = any(
            isinstance(node, ast.ImportFrom)
            and node.module in {"torch", "torch.serialization"}
            and any(alias.name == "load" for alias in node.names)
            for node in ast.walk(tree)
        )
        if loads or from_torch or UNSAFE_LOADERS & imported(tree):
            found.append(name(path))
    assert "latentdiff/formats/pickle.py" in found
    found.remove("latentdiff/formats/pickle.py")
    offenders("read weights and state with safetensors or JSON", found)


def test_ignored_type_errors_name_their_rule() -> None:
    bare = re.compile(r"#\s*(?:type|pyright): *ignore(?!\[)")
    offenders(
        "write `# pyright: ignore[rule]` and the reason",
        [name(path) for path in SHIPPED if bare.search(path.read_text(encoding="utf-8"))],
    )
