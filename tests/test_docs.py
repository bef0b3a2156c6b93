"""README and docs/: each link leads somewhere, each command and each Python block is one of ours.

Commands are parsed by the parsers that would run them, Python is run with tiny models.
"""

import argparse
import ast
import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.loras import kohya_file
from support.pages import (
    DOCS,
    PAGES,
    Block,
    anchors,
    blocks,
    commands,
    links,
    name,
    prose,
    read,
)
from support.scripts import CONFIGS, ROOT, config_class
from support.tiny import tiny_pipeline

import latentdiff.cli
from latentdiff.training.command_line import parse_config

every_page = pytest.mark.parametrize("page", PAGES, ids=name)
with_python = pytest.mark.parametrize(
    "page", [p for p in PAGES if any(b.language == "python" for b in blocks(p))], ids=name
)


@every_page
def test_links_lead_to_files_headings_and_lines(page: Path) -> None:
    for link in links(page):
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        assert path.is_relative_to(ROOT), link
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), link
        elif anchor:
            line = re.fullmatch(r"L(\d+)", anchor)
            assert line, link
            assert int(line[1]) <= read(path).count("\n"), link


def test_every_page_is_in_the_navigation() -> None:
    class Loader(yaml.SafeLoader):
        """mkdocs' file names Python functions, which only mkdocs needs."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    site = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)

    def files(tree: Any) -> list[str]:
        if isinstance(tree, str):
            return [tree]
        return [
            file
            for one in (tree.values() if isinstance(tree, dict) else tree)
            for file in files(one)
        ]

    shown = files(site["nav"])
    assert len(shown) == len(set(shown))
    notebooks = [path.with_suffix(".md") for path in (DOCS / "notebooks").glob("*.ipynb")]
    pages = [path for path in [*DOCS.rglob("*.md"), *notebooks] if path.name != "404.md"]
    assert sorted(shown) == sorted(path.relative_to(DOCS).as_posix() for path in pages)


def test_pages_are_not_lost_in_html() -> None:
    """A code host strips scripts and styles, and a reader of the source must read it."""
    for page in PAGES:
        assert not re.search(r"<(script|style|iframe|div)\b", prose(page)), name(page)


def parse_command(command: list[str]) -> None:
    """Parse a command as the program that it runs would. Raises ValueError."""
    program, *rest = command
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = [word for word in rest if "=" not in word]
        for target in targets:
            if not re.search(rf"^{target}:", makefile, flags=re.M):
                raise ValueError(f"make has no target {target}")
    elif program == "latentdiff":
        parsed, unknown = latentdiff.cli.command_tree().parse_known_args(rest)
        if unknown:
            parsed.parser.unknown(unknown[0])
    elif program == "pytest":
        _check_files([word for word in rest if word.startswith("tests/")])
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        parsed = launch_command_parser().parse_args(rest[1:])
        _parse_script(parsed.training_script, parsed.training_script_args, parsed.module)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(rest)
        _parse_script(parsed.training_script, parsed.training_script_args, parsed.module)
    elif rest[0].startswith("train/"):
        _parse_script(rest[0], rest[1:])
    elif rest[0] not in ("-c", "-m"):
        _check_files(rest[:1])


def _parse_script(script: str, args: list[str], is_module: bool = False) -> None:
    if is_module:
        script = f"train/{script.removeprefix('latentdiff.scripts.')}.py"
    _check_files([script])
    if Path(script).stem not in CONFIGS:
        raise ValueError(f"{script} is no script of ours")
    parse_config(config_class(Path(script).stem), args)


def _check_files(paths: list[str]) -> None:
    for path in paths:
        if not Path(path).exists():
            raise ValueError(f"{path} is no file")


@every_page
def test_commands_parse(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Programs, files and options exist, and the options' values are allowed.

    A configuration that is not in configs/ is the page's YAML block.
    """
    for folder in ("configs", "train", "benchmarks", "docs", "tests"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    shown = [block for block in blocks(page) if block.language == "yaml"]
    for block in blocks(page):
        if block.reason:
            continue
        for command in commands(block):
            if "--config" in command:
                config = Path(command[command.index("--config") + 1])
                if not config.exists() and config.parent == Path():
                    assert len(shown) == 1, f"{block.where}: which block is {config}?"
                    config.write_text(shown[0].text, encoding="utf-8")
            try:
                parse_command(command)
            except (ValueError, argparse.ArgumentError) as error:
                pytest.fail(f"{block.where}: {' '.join(command)}\n{error}")
            except SystemExit as end:
                if end.code:
                    pytest.fail(f"{block.where}: {' '.join(command)}\n{capsys.readouterr().err}")


def test_a_wrong_command_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = tmp_path / "page.md"

    def found(text: str) -> list[list[str]]:
        return list(commands(Block(page, 1, "bash", text, None)))

    assert found(
        "latentdiff generate 'a cat' \\\n    --steps 5  # quick\nls\nmake test | cat\n"
    ) == [
        ["latentdiff", "generate", "a cat", "--steps", "5"],
        ["make", "test"],
    ]
    assert found("$ latentdiff env\nlatentdiff 1.0\n") == [["latentdiff", "env"]]
    for wrong in (
        "latentdiff generate 'a cat' --stepps 5",
        "latentdiff draw 'a cat'",
        "make tset",
        "accelerate launch train/train_unet.py --batchsize 4",
        "accelerate launch train/train_unet.py --batch_size many",
        "accelerate launch --gpu train/train_unet.py",
        "accelerate launch train/train_unte.py",
        "python train/train_vae.py --config configs/nothing.yaml",
        "python benchmarks/nothing.py",
    ):
        (command,) = found(wrong)
        with pytest.raises((ValueError, OSError, SystemExit)):
            parse_command(command)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the Python blocks name: models of random weights, and LoRAs for them."""
    folder = tmp_path_factory.mktemp("files")
    pipeline = tiny_pipeline(folder / "scratch")
    for path in (
        "emoji",
        "folder",
        "path/to/a/model",
        "runs/drawings/unet/model",
        "mine/unet/model",
    ):
        pipeline.save_pretrained(folder / path)
        config = folder / path / "unet" / "config.json"
        wider = json.loads(config.read_text()) | {"sample_size": 32}  # 64 x 64 pixels
        config.write_text(json.dumps(wider))
    pipeline.save_single_file(folder / "model.safetensors")
    for lora in ("style", "face.v2"):
        kohya_file(folder / f"{lora}.safetensors", pipeline, alpha=4)
    return folder


@with_python
@pytest.mark.interchange
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_python_runs(
    page: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page's blocks one after another, in a folder that holds what they name.

    "emoji" is a tiny model there, in place of the embedded one.
    """
    monkeypatch.setattr("latentdiff.formats.diffusers.EMBEDDED_MODELS", ())
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    variables: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language != "python":
            continue
        code = compile(block.text, block.where, "exec")
        if block.reason is None:
            exec(code, variables)
        else:
            check_names(block.text)


@pytest.mark.interchange
def test_the_notebook_of_drawing_runs(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tiny model, cell after cell; `make docs` runs it, and that of training, as it is."""
    monkeypatch.setattr("latentdiff.formats.diffusers.EMBEDDED_MODELS", ())
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    variables: dict[str, Any] = {}
    for cell in cells(DOCS / "notebooks" / "draw.ipynb"):
        exec(cell, variables)


@pytest.mark.parametrize("name", ["draw", "train"])
def test_notebooks_are_kept_without_outputs(name: str) -> None:
    path = DOCS / "notebooks" / f"{name}.ipynb"
    for cell in json.loads(read(path))["cells"]:
        assert not cell.get("outputs"), cell["source"]
    for cell in cells(path):
        check_names(cell)


def cells(notebook: Path) -> list[str]:
    """The code of its cells."""
    found = json.loads(read(notebook))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


def check_names(text: str) -> None:
    """Raise ImportError for a name that latentdiff does not have; the rest is not looked at."""
    for module, names in re.findall(r"^from (latentdiff[\w.]*) import (.+)$", text, flags=re.M):
        for one in names.split(","):
            if not hasattr(importlib.import_module(module), one.split()[0]):
                raise ImportError(f"{module} has no {one}")


def messages() -> list[str]:
    """The texts of the package's code, with … for what is put into them."""
    found = []
    for path in sorted((ROOT / "latentdiff").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_messages_of_troubleshooting_are_those_of_the_code() -> None:
    """The words between two … stand in one text of the code, in that order."""
    quoted = re.findall(r"^\| `(.+?)` \|", read(DOCS / "troubleshooting.md"), flags=re.M)
    assert len(quoted) > 40
    texts = messages()
    for message in quoted:
        words = ".*".join(re.escape(part.strip()) for part in message.split("…") if part.strip())
        assert any(re.search(words, text, flags=re.S) for text in texts), message
