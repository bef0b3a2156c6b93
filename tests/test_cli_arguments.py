"""What people give to commands: images, texts and numbers, read right or refused in a sentence."""

import io
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin
from support.broken_images import animated, floats, forged, photograph, saved
from support.command import generate, run
from support.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline(folder / "tokens").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("option", "data", "sentence"),
    [
        ("--image", floats(300), "unknown range of values: mode F with values from 300 to 300"),
        ("--image", forged(60_000), "too large"),
        ("--image", forged(8_200), "too large: 8200 x 8200"),
        ("--image", animated(), "animated: 2 frames"),
        ("--image", b"no image", "cannot be decoded"),
        ("--mask_image", saved(Image.new("RGBA", (16, 16))), "a mask with transparent pixels does"),
        ("--mask_image", saved(Image.new("L", (32, 16), 255)), "mask_image has 32 x 16 pixels and"),
        ("--mask_image", saved(Image.new("L", (16, 16), 1)), "mask_image is white nowhere"),
    ],
)
def test_images_given_are_read_as_in_training_or_refused(
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    data: bytes,
    sentence: str,
) -> None:
    """They were clipped to white, stretched, a first frame without a word, or a traceback."""
    plain, path = tmp_path / "plain.png", tmp_path / "given.png"
    Image.new("RGB", (16, 16)).save(plain)
    path.write_bytes(data)
    given = ["--image", str(path if option == "--image" else plain)]
    given += ["--mask_image", str(path)] if option == "--mask_image" else []
    assert generate(model, tmp_path / "out", "a", *given) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_a_photo_on_its_side_is_drawn_upright(model: str, tmp_path: Path) -> None:
    """Its pixels were turned, and then stretched into the size that they had before."""
    photo = Image.new("RGB", (24, 16), "red")
    photo.getexif()[0x0112] = 6
    photo.save(tmp_path / "photo.jpg", exif=photo.getexif())
    given = ["--image", str(tmp_path / "photo.jpg"), "--seed", "0"]
    assert generate(model, tmp_path / "out", "a", *given) == 0
    with Image.open(tmp_path / "out" / "0000-0.png") as image:
        assert image.size == (16, 24)


def test_an_image_with_a_long_text_is_drawn_over(model: str, tmp_path: Path) -> None:
    """A workflow of ComfyUI above Pillow's limit was no complete image."""
    theirs = PngImagePlugin.PngInfo()
    theirs.add_itxt("workflow", "x" * 2_000_000, zip=True)
    Image.new("RGB", (16, 16)).save(tmp_path / "comfy.png", pnginfo=theirs)
    assert generate(model, tmp_path / "out", "a", "--image", str(tmp_path / "comfy.png")) == 0


COMMANDS = [
    ["generate", "X"],
    ["generate", "a", "--negative_prompt", "X"],
    ["generate", "a", "--out", "X"],
    ["generate", "--from", "X"],
    ["convert", "X", "out"],
    ["data", "shapes", "--out", "X"],
    ["data", "check", "X"],
    ["data", "check", "data", "--caption_columns", "X"],
    ["plan", "--config", "X"],
    ["ema", "X", "--list"],
    ["eval", "judge", "X", "data", "--out", "out"],
    ["eval", "vae", "emoji", "X"],
    ["eval", "distance", "X", "b"],
    ["eval", "compare", "X", "b.json"],
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_arguments_that_are_no_utf_8_get_one_sentence(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """$'caf\\xe9' in a terminal was a traceback of the tokenizer, or of the print of a path."""
    monkeypatch.chdir(tmp_path)
    assert run(*[os.fsdecode(b"caf\xe9") if a == "X" else a for a in arguments]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"latentdiff [a-z ]+: the argument 'caf\\udce9' is not valid UTF-8.*\n", error
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["generate", "a", "--out", ""], "--out"),
        (["generate", "a", "--model", ""], "--model"),
        (["generate", "a", "--image", ""], "--image"),
        (["convert", "", "out"], "IN"),
        (["convert", "emoji", ""], "OUT"),
        (["data", "shapes", "--out", ""], "--out"),
        (["plan", "--config", ""], "--config"),
        (["ema", "", "--list"], "RUN"),
        (["eval", "judge", "emoji", "", "--out", "out"], "DATA"),
        (["eval", "distance", "", "b"], "DRAWN"),
    ],
)
def test_empty_names_are_refused(
    arguments: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Path("") is the current folder, into which images went."""
    assert run(*arguments) == 2
    assert f"{name} must not be empty" in capsys.readouterr().err


JUDGE = ["eval", "judge", "model", "data", "--out", "out"]
PLAN = ["plan", "--config", "x.yaml"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([*JUDGE, "--batch_size", "0"], "batch_size=0 must be at least 1"),
        ([*JUDGE, "--batch_size", "-3"], "batch_size=-3 must be at least 1"),
        ([*JUDGE, "--steps", "0"], "steps=0 must be a whole number from 1"),
        ([*JUDGE, "--seed", "-1"], "seed=-1 must be a whole number from 0"),
        ([*JUDGE, "--guidance_scale", "nan"], "guidance_scale=nan must be a finite number"),
        ([*JUDGE, "--prompts", "{text}", "0"], "--prompts: the COUNTs are 0 together"),
        (["eval", "vae", "model", "data", "--count", "0"], "count=0 must be at least 1"),
        (["eval", "vae", "model", "data", "--count", "-3"], "count=-3 must be at least 1"),
        (["eval", "vae", "model", "data", "--out", "."], "out=. is a folder; name a new file"),
        (["eval", "distance", "a", "b", "--image_size", "0"], "image_size=0 must be from 1"),
        (["eval", "distance", "a", "b", "--image_size", "-8"], "image_size=-8 must be from 1"),
        (["eval", "distance", "a", "b", "--image_size", "99999999999"], "from 1 to 4096"),
        (["eval", "vae", "model", "data", "--image_size", "0"], "image_size=0 must be from 1"),
        (["eval", "distance", "a", "b", "--out", "."], "out=. is a folder; name a new file"),
        (["data", "shapes", "--out", "o", "--size", "99999999999"], "must be from 16 to 4096"),
        (["data", "emoji", "--out", "o", "--size", "60000"], "size=60000 must be from 1 to 4096"),
        (["data", "check", "d", "--out", "o", "--upscale_limit", "nan"], "upscale_limit=nan must"),
        ([*PLAN, "--device_memory", "-1"], "device_memory=-1.0 must be a number of GiB above 0"),
        ([*PLAN, "--device_memory", "inf"], "device_memory=inf must be a number of GiB"),
        ([*PLAN, "--efficiency", "inf"], "efficiency=inf must be above 0 and at most 1"),
        ([*PLAN, "--images", "-1"], "images=-1 must be at least 1"),
        (["generate", "a", "--device", "meta"], "device='meta' cannot be used on this machine"),
        (["generate", "a", "--lora", "x:nan"], "--lora x:nan: the scale nan must be a finite"),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_anything_is_written(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Some were tracebacks, some counted from the end; one began a folder that then was taken."""
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert [path for path in tmp_path.rglob("*") if path.name != "outputs"] == []


def test_images_of_formats_that_are_not_read_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half a folder was left out of a distance without a word."""
    for folder in ("drawn", "true"):
        (tmp_path / folder).mkdir()
        for i in range(4):
            photograph((32, 32), seed=i).save(tmp_path / folder / f"{i}.png")
    (tmp_path / "drawn" / "a.psd").write_bytes(b"")
    (tmp_path / "drawn" / "b.sgi").write_bytes(b"")
    folders = [str(tmp_path / "drawn"), str(tmp_path / "true")]
    assert run("eval", "distance", *folders, "--features", "edges") == 0
    assert "drawn: 2 files such as a.psd are of formats that are not" in capsys.readouterr().err


def test_a_result_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text("{}")
    for kind in ("vae", "distance"):
        assert run("eval", kind, "a", "b", "--out", str(tmp_path / "a.json")) == 2
        assert "a.json is there already; name a new file" in capsys.readouterr().err


def test_options_of_drawing_are_refused_for_images_that_are_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were ignored without a word."""
    drawn = [str(tmp_path), "data", "--out", "out"]
    assert run("eval", "judge", *drawn, "--steps", "20") == 2
    assert "--steps is for drawing, but" in capsys.readouterr().err


def test_a_terminal_without_the_prompts_letters_loses_no_image(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first line that it could not print ended the command, before the other images."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert generate(model, tmp_path, "猫", "a dog", "--seed", "7") == 0
    assert len(list(tmp_path.iterdir())) == 3
    terminal.flush()
    assert rb"\u732b" in terminal.buffer.getvalue()


@pytest.mark.processes
def test_too_little_memory_is_one_sentence(model: str, tmp_path: Path) -> None:
    """The largest image in a process that may not have its memory was a traceback of torch's."""
    command = [sys.executable, "-m", "latentdiff.cli", "generate", "a", "--model", model]
    command += ["--height", "8000", "--width", "8000", "--out", str(tmp_path), "--steps", "1"]
    limit = 6_000_000_000
    done = subprocess.run(
        command,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("latentdiff")]
    assert "not enough memory (" in sentence
    assert "Traceback" not in done.stderr
