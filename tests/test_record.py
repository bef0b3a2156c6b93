"""`latentdiff generate --from image.png`: the same image again, or one sentence why not."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from support.cases import mostly_exhaustive
from support.tiny import tiny_pipeline

from latentdiff.cli import main
from latentdiff.diffusion import Diffusion
from latentdiff.formats.png import read_png


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline(folder / "tokens").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        sys.exit(main(["generate", *arguments]))
    return int(exit_.value.code or 0)


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


@pytest.mark.parametrize(
    "options",
    mostly_exhaustive(
        [
            ["a cat", "--seed", "7"],
            [
                "a <b>猫</b>, (hat:1.3)\nand more words than fit",
                "--prompt_weighting",
                "--steps",
                "3",
            ],
            [
                "a",
                "b",
                "--num_images",
                "2",
                "--negative_prompt",
                "x",
                "--sampler",
                "euler_ancestral",
            ],
            [
                "a",
                "--level_spacing",
                "karras",
                "--sampler",
                "dpmpp_2m",
                "--guidance_rescale",
                "0.5",
            ],
            ["a", "--guidance_interval", "0.5", "5", "--height", "12", "--width", "24"],
            ["a", "--guidance_eta", "0", "--guidance_norm_threshold", "2", "--dtype", "bfloat16"],
            ["a", "--variation_strength", "0.3", "--num_images", "2"],
            ["a", "--image", "PHOTO", "--strength", "0.6"],
            ["a", "--image", "PHOTO", "--mask_image", "PHOTO"],
        ]
    ),
)
def test_an_image_is_drawn_again_bit_for_bit(
    model: str,
    photo: str,
    tmp_path: Path,
    options: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = [photo if option == "PHOTO" else option for option in options]
    if "--steps" not in options:
        options += ["--steps", "4"]
    assert run(*options, "--model", model, "--out", str(tmp_path / "first"), "--no-grid") == 0
    images = sorted((tmp_path / "first").iterdir())
    for i, path in enumerate(images):
        again = tmp_path / f"again{i}"
        assert run("--from", str(path), "--out", str(again)) == 0
        (drawn,) = again.iterdir()
        assert pixels(drawn) == pixels(path)
        assert read_png(drawn) == read_png(path)
    said = capsys.readouterr().err.splitlines()
    slow = "does not compute in bfloat16"  # which is true of some machines that run this
    assert not [line for line in said if line.startswith("latentdiff:") and slow not in line]


def test_what_is_given_besides_replaces_what_the_image_says(model: str, tmp_path: Path) -> None:
    first = ["a cat", "--model", model, "--steps", "3", "--out", str(tmp_path / "1"), "--seed", "1"]
    assert run(*first) == 0
    (path,) = (tmp_path / "1").iterdir()
    assert run("--from", str(path), "--seed", "2", "--out", str(tmp_path / "2")) == 0
    assert run(*first[:-3], str(tmp_path / "3"), "--seed", "2") == 0
    assert pixels(tmp_path / "2" / "0000-2.png") == pixels(tmp_path / "3" / "0000-2.png")
    assert pixels(tmp_path / "2" / "0000-2.png") != pixels(path)


def test_the_record_says_which_precision_auto_was(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the image is drawn in it again, on a processor that would choose the other too."""
    for native, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        out = tmp_path / dtype
        options = ["a", "--model", model, "--steps", "2", "--seed", "1", "--out", str(out)]
        assert run(*options, "--dtype", "auto") == 0
        record = read_png(out / "0000-1.png").record
        assert record is not None
        assert record["dtype"] == dtype
    assert run("--from", str(tmp_path / "bfloat16/0000-1.png"), "--out", str(tmp_path)) == 0
    again = read_png(tmp_path / "0000-1.png").record
    assert again is not None
    assert again["dtype"] == "bfloat16"


def test_another_model_is_said_to_be_another(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    tiny_pipeline(other / "tokens", seed=5).save_pretrained(other)
    assert run("a", "--model", model, "--steps", "2", "--out", str(tmp_path / "out")) == 0
    (path,) = (tmp_path / "out").iterdir()
    assert run("--from", str(path), "--model", str(other), "--out", str(tmp_path / "again")) == 0
    (line,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("latentdiff:")]
    assert "the image may come out differently: it was drawn with model" in line
    assert "torch" not in line


def test_another_model_is_said_without_metadata_too(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing was compared where nothing was to be written."""
    assert run("a", "--model", model, "--steps", "2", "--out", str(tmp_path / "out")) == 0
    (path,) = (tmp_path / "out").iterdir()
    again = ["--from", str(path), "--out", str(tmp_path / "again"), "--no-metadata"]
    assert run(*again, "--dtype", "bfloat16") == 0
    assert "it was drawn with dtype float32 (here bfloat16)" in capsys.readouterr().err


def test_an_image_of_another_program_needs_its_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was drawn with the embedded model of emoji without a word, or refused for its levels."""
    path = of_the_webui(tmp_path / "theirs.png", "a cat", "Model: v1-5")
    assert run("--from", str(path), "--out", str(tmp_path / "out")) == 2
    assert (
        "theirs.png does not say which file its model is: name the one" in capsys.readouterr().err
    )


def test_an_image_of_the_webui_is_drawn_with_what_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    diffusion = Diffusion("scaled_linear", "epsilon", timestep_spacing="leading")
    tiny_pipeline(tmp_path / "tokens", diffusion).save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    theirs = PngImagePlugin.PngInfo()
    theirs.add_text(
        "parameters",
        "a cat\nNegative prompt: a dog\nSteps: 3, Sampler: Euler a, CFG scale: 2, Seed: 9, "
        "Size: 16x16, Model hash: cc6cb27103, Model: v1-5, Clip skip: 2, Version: v1.10.1",
    )
    path = tmp_path / "webui.png"
    Image.new("RGB", (16, 16)).save(path, pnginfo=theirs)
    assert run("--from", str(path), "--model", model, "--out", str(tmp_path / "1")) == 0
    assert "without a meaning here: Model: v1-5, Clip skip: 2" in capsys.readouterr().err
    same = ["a cat", "--negative_prompt", "a dog", "--steps", "3", "--sampler", "euler_ancestral"]
    same += ["--guidance_scale", "2", "--seed", "9", "--level_spacing", "linspace"]
    assert run(*same, "--model", model, "--out", str(tmp_path / "2")) == 0
    assert pixels(tmp_path / "1" / "0000-9.png") == pixels(tmp_path / "2" / "0000-9.png")


def test_no_metadata_writes_the_same_pixels_and_nothing_else(model: str, tmp_path: Path) -> None:
    options = ["a cat", "--model", model, "--steps", "2", "--seed", "3", "--out"]
    assert run(*options, str(tmp_path / "with")) == 0
    assert run(*options, str(tmp_path / "without"), "--no-metadata") == 0
    with Image.open(tmp_path / "without" / "0000-3.png") as image:
        assert image.info == {}
    assert pixels(tmp_path / "with" / "0000-3.png") == pixels(tmp_path / "without" / "0000-3.png")


def test_what_cannot_be_drawn_again_is_one_sentence(
    model: str, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    own = tmp_path / "own.png"
    own.write_bytes(Path(photo).read_bytes())
    assert run("a", "--model", model, "--steps", "3", "--image", str(own), *out) == 0
    (drawn,) = (tmp_path / "out").iterdir()
    capsys.readouterr()

    assert run("--from", photo, *out) == 2
    assert "photo.png: has no metadata" in capsys.readouterr().err
    Image.new("RGB", (16, 16)).save(own)
    assert run("--from", str(drawn), *out) == 2
    assert "own.png is not the file that the image was drawn from" in capsys.readouterr().err
    own.unlink()
    assert run("--from", str(drawn), *out) == 2
    assert "own.png, which the image was drawn from, is not there" in capsys.readouterr().err
    assert run("--from", str(drawn), "--image", photo, *out) == 0
    assert run("a", "--image", str(own), *out) == 2
    assert f"--image: {own} is not a file" in capsys.readouterr().err
    assert run(*out) == 2
    assert "nothing to draw" in capsys.readouterr().err


def of_the_webui(path: Path, prompt: str, settings: str) -> Path:
    theirs = PngImagePlugin.PngInfo()
    line = f"Steps: 3, Sampler: Euler, CFG scale: 2, Seed: 9, Size: 16x16, {settings}"
    theirs.add_text("parameters", f"{prompt}\n{line}")
    Image.new("RGB", (16, 16)).save(path, pnginfo=theirs)
    return path


@pytest.fixture(scope="module")
def discrete(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with the noise schedule of Stable Diffusion, as the web UI's are."""
    folder = tmp_path_factory.mktemp("discrete")
    diffusion = Diffusion("scaled_linear", "epsilon", timestep_spacing="leading")
    tiny_pipeline(folder / "tokens", diffusion).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("prompt", "settings", "drawn", "said"),
    [
        ("a cat", "Denoising strength: 0.7", "a cat", "Denoising strength: 0.7 (of an image"),
        ("a cat", "Denoising strength: 0, Version: v1.10.1", "a cat", "Denoising strength: 0"),
        ("(a cat", "RNG: CPU", "(a cat:1.1)", "RNG: CPU"),
        ("a cat :)", "RNG: CPU", "a cat :\\)", "RNG: CPU"),
        ("(bad:-1) cat", "RNG: CPU", "(bad:0) cat", "the weight -1 of 'bad' (drawn with 0)"),
        ("a [cat|dog] BREAK b", "RNG: CPU", "a [cat|dog]  b", "BREAK, [cat|dog]"),
    ],
)
def test_no_image_of_the_webui_is_a_dead_end(
    discrete: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    prompt: str,
    settings: str,
    drawn: str,
    said: str,
) -> None:
    """Strengths of text-to-image, unmatched brackets and negative weights were refused."""
    path = of_the_webui(tmp_path / "theirs.png", prompt, settings)
    assert run("--from", str(path), "--model", discrete, "--out", str(tmp_path / "out")) == 0
    error = capsys.readouterr().err
    assert "without a meaning here: " in error
    assert said in error
    record = read_png(tmp_path / "out" / "0000-9.png").record
    assert record is not None
    assert record["request"]["prompt"] == drawn


def test_a_strength_of_the_webui_goes_with_an_image_that_is_given(
    discrete: str, photo: str, tmp_path: Path
) -> None:
    path = of_the_webui(tmp_path / "theirs.png", "a cat", "Denoising strength: 0.7")
    given = ["--image", photo, "--model", discrete, "--out", str(tmp_path / "out")]
    assert run("--from", str(path), *given) == 0
    record = read_png(tmp_path / "out" / "0000-9.png").record
    assert record is not None
    assert record["request"].get("strength") == 0.7
