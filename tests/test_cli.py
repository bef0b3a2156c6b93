"""The command line: what it writes, and one clear sentence for everything that is wrong."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file as save_safetensors
from support.command import generate, run
from support.tiny import tiny_pipeline

from latentdiff.cli import drawing, reading
from latentdiff.cli.generate import SAMPLERS
from latentdiff.images import image_grid
from latentdiff.pipeline import Pipeline, PipelineOutput
from latentdiff.request import Request
from latentdiff.samplers import SAMPLERS as BUILT_IN

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline(folder / "tokens").save_pretrained(folder)
    return str(folder)


def test_images_are_named_by_index_and_seed_and_never_by_prompt(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(model, tmp_path, "--seed", "7", "../CON", "<b>猫") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0000-7.png",
        "0001-8.png",
        "grid.png",
    ]
    printed = capsys.readouterr().out
    assert all(str(path) in printed for path in tmp_path.iterdir())


def test_a_tilde_is_the_users_home_but_in_a_prompt(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No shell expands --out=~/images, which was made as a folder called "~"."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(model)
    options = ("--model=~/model", "--out=~/images", "--steps=2", "--seed=0")
    assert run("generate", *options, "~/a cat") == 0
    (path,) = (tmp_path / "images").iterdir()
    with Image.open(path) as image:
        assert "~/a cat" in image.info["parameters"]
    assert str(path) in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "model"]


def test_one_image_has_a_grid_only_when_asked(model: str, tmp_path: Path) -> None:
    assert generate(model, tmp_path / "one", "a cat", "--seed", "0") == 0
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["0000-0.png"]
    assert generate(model, tmp_path / "grid", "a cat", "--grid") == 0
    assert (tmp_path / "grid" / "grid.png").is_file()
    assert generate(model, tmp_path / "none", "a cat", "a dog", "--no-grid") == 0
    assert not (tmp_path / "none" / "grid.png").exists()


@pytest.mark.parametrize("how", ["one by one", "in tiles", "all at once"])
def test_an_interrupted_batch_keeps_the_images_that_are_drawn(
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    how: str,
) -> None:
    """Files were written at the end, so that Control-C lost all that had been drawn.

    A CPU draws in tiles, of the same bits, but one by one in float32 without guidance.
    """
    kept, at_once = 2, 1 if how == "one by one" else 2
    whole = ("a cat", "a dog", "--num_images", "2", "--seed", "3")
    options = ("--variation_strength", "0.2", "--variation_seed", "5")
    if how == "one by one":
        options = (*options, "--guidance_scale", "1")
    if how == "all at once":  # as on an accelerator
        options = (*options, "--batched")
    monkeypatch.setattr(drawing, "TILE", 2)
    monkeypatch.setattr(drawing, "AT_ONCE", 2)
    assert generate(model, tmp_path / "whole", *whole, *options) == 0
    draw, calls = Pipeline.draw, list[int]()

    def interrupted(self: Pipeline, request: Request) -> PipelineOutput:
        calls.append(len(request.seeds))
        if sum(calls) > kept:
            raise KeyboardInterrupt
        return draw(self, request)

    monkeypatch.setattr(Pipeline, "draw", interrupted)
    capsys.readouterr()
    assert generate(model, tmp_path / "part", *whole, *options) == 130
    assert calls[0] == at_once
    assert f"interrupted: nothing else is written; the first {kept} of 4" in capsys.readouterr().err
    names = sorted(path.name for path in (tmp_path / "part").iterdir())
    assert names == ["0000-3.png", "0001-3.png"]
    for name in names if how != "all at once" else ():  # together they differ by rounding
        expected, found = (Image.open(tmp_path / folder / name) for folder in ("whole", "part"))
        assert np.array_equal(np.asarray(expected), np.asarray(found))
        assert expected.info["latentdiff"] == found.info["latentdiff"]


def test_an_image_remembers_that_it_was_denoised_with_others(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("a cat", "--seed", "3", "--steps", "2", "--batched")
    assert generate(model, tmp_path / "alone", *options) == 0
    assert generate(model, tmp_path / "two", *options, "--num_images", "2") == 0
    assert generate(model, tmp_path / "again", "--from", str(tmp_path / "alone/0000-3.png")) == 0
    assert "differently" not in capsys.readouterr().err
    assert generate(model, tmp_path / "again", "--from", str(tmp_path / "two/0000-3.png")) == 0
    assert "drawn with batched True (here False)" in capsys.readouterr().err


def test_a_size_of_tiles_is_remembered_and_no_tile_is_refused(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--seed", "3", "--height", "64", "--width", "48")
    assert generate(model, tmp_path / "whole", "a cat", *options) == 0
    assert generate(model, tmp_path / "a", "a cat", *options, "--vae_tiling", "32") == 0
    first = tmp_path / "a" / "0000-3.png"
    assert generate(model, tmp_path / "b", "--from", str(first)) == 0
    whole, tiled, again = (
        np.asarray(Image.open(tmp_path / folder / first.name)) for folder in ("whole", "a", "b")
    )
    assert np.array_equal(tiled, again)
    assert not np.array_equal(tiled, whole)
    capsys.readouterr()
    assert generate(model, tmp_path / "c", "a cat", "--vae_tiling", "8") == 2
    assert "vae_tiling=8 must be the side of a tile" in capsys.readouterr().err


def test_nothing_but_help_is_asked_for_by_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, named in (((), "generate"), (("data",), "drawings"), (("eval",), "judge")):
        assert run(*arguments) == 0
        said = capsys.readouterr().out
        assert said.startswith("usage: latentdiff")
        assert named in said


def test_help_names_the_samplers_and_where_images_go(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(SAMPLERS) == set(BUILT_IN)
    assert run("generate", "--help") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert all(name in said for name in SAMPLERS)
    assert "default: outputs" in said


def test_what_takes_long_to_read_is_said_and_what_becomes_of_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """30 to 60 seconds of silence, and twice the memory without a word."""
    path = str(tmp_path / "style.safetensors")
    save_safetensors({"a": torch.zeros(600, dtype=torch.float16)}, path)
    reading.say_reading(path, "float32")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(reading, "LARGE", 1000)
    reading.say_reading(path, "float32")
    assert capsys.readouterr().err == (
        f"latentdiff: reading {path}, 0.0 GB; its float16 weights become float32, which takes "
        "twice the memory: --dtype float16 keeps them\n"
    )
    for dtype in ("float16", "bfloat16"):
        reading.say_reading(path, dtype)
        assert capsys.readouterr().err == f"latentdiff: reading {path}, 0.0 GB\n"
    for model in ("emoji", str(tmp_path / "no")):
        reading.say_reading(model, "float32")
    (tmp_path / "broken.safetensors").write_bytes(b"\1" * 2000)
    reading.say_reading(str(tmp_path / "broken.safetensors"), "float32")
    assert "become" not in capsys.readouterr().err


def test_earlier_images_are_never_overwritten(model: str, tmp_path: Path) -> None:
    """Images were not, but grid.png was: the grid of the last call replaced all before."""
    for prompt in ("a cat", "a dog"):
        assert generate(model, tmp_path, prompt, "--seed", "0", "--grid") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0000-0.png",
        "0001-0.png",
        "grid-0001.png",
        "grid.png",
    ]
    grids = [(tmp_path / name).read_bytes() for name in ("grid.png", "grid-0001.png")]
    assert grids[0] != grids[1]


def test_the_command_line_draws_what_the_pipeline_draws(model: str, tmp_path: Path) -> None:
    from latentdiff import Pipeline

    assert (
        generate(
            model,
            tmp_path,
            "a cat",
            *("--seed", "3", "--sampler", "dpmpp_2m", "--guidance_scale", "2"),
            *("--negative_prompt", "a dog", "--height", "16", "--width", "24"),
            *("--num_images", "2", "--device", "cpu"),
        )
        == 0
    )
    expected = Pipeline.from_pretrained(model)(
        "a cat",
        steps=2,
        seed=3,
        sampler="dpmpp_2m",
        guidance_scale=2,
        negative_prompt="a dog",
        height=16,
        width=24,
        num_images=2,
        progress=False,
    )
    for name, image in zip(("0000-3.png", "0001-4.png"), expected.images, strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / name)), np.asarray(image))


@pytest.mark.processes
def test_the_terminal_shows_a_progress_bar_and_the_files_and_nothing_else(
    model: str, tmp_path: Path
) -> None:
    """In a fresh process, as loading libraries say things once."""
    command = [sys.executable, "-m", "latentdiff.cli", "generate", "a cat", "--model", model]
    done = subprocess.run(
        [*command, "--steps", "2", "--seed", "0", "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout == f"{tmp_path / 'out' / '0000-0.png'}  a cat\n"
    assert "2/2" in done.stderr
    assert all(
        "it/s" in line or "s/it" in line for line in re.split(r"[\r\n]+", done.stderr.strip())
    )


def test_too_little_memory_draws_fewer_at_once(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw, calls = Pipeline.draw, list[int]()

    def small(self: Pipeline, request: Request) -> PipelineOutput:
        calls.append(len(request.seeds))
        if len(request.seeds) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.batched = True
        return draw(self, request)

    monkeypatch.setattr(Pipeline, "draw", small)
    whole = ("a", "--num_images", "5", "--seed", "0")
    assert generate(model, tmp_path / "three", *whole, "--batch_size", "3") == 2
    assert "not enough memory" in capsys.readouterr().err
    assert generate(model, tmp_path / "two", *whole, "--batch_size", "2") == 0
    assert calls == [3, 2, 2, 1]
    calls.clear()
    monkeypatch.setattr(drawing, "_at_once", lambda pipeline, request: 16)  # as on an accelerator
    assert generate(model, tmp_path / "halved", *whole) == 0
    assert calls == [5, 2, 2, 1]
    assert "too little memory; drawing 2 at once" in capsys.readouterr().err
    assert len(list((tmp_path / "halved").glob("*-*.png"))) == 5
    assert generate(model, tmp_path / "none", *whole, "--batch_size", "0") == 2
    assert "batch_size=0 must be at least 1" in capsys.readouterr().err
    assert generate(model, tmp_path / "none", "a", "--tokenizer", model) == 2
    assert "--tokenizer is for a single file" in capsys.readouterr().err


def test_help_and_version_need_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nfrom latentdiff.cli import main\n"
        "try: main(['generate', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'PIL', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


@pytest.mark.processes
def test_drawing_imports_nothing_that_it_does_not_use(model: str, tmp_path: Path) -> None:
    """transformers brings torch's compiler, torchvision and accelerate; these are left to us."""
    unused = ["peft", "diffusers", "datasets", "matplotlib", "openvino", "open_clip", "pyarrow"]
    unused += ["torch._inductor.compile_fx", "latentdiff.training", "latentdiff.tasks"]
    arguments = ["generate", "a cat", "--model", model, "--steps", "1", "--out", str(tmp_path)]
    code = (
        "import sys\nfrom latentdiff.cli import main\n"
        f"assert main({arguments!r}) == 0\n"
        f"found = set({unused!r}) & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["a", "--sampler", "dpm++"], r"sampler=dpm\+\+ is unknown; did you mean dpmpp_2m\?"),
        (["a", "--steps", "0"], r"steps=0 must be a whole number from 1"),
        (["a", "--steps", "two"], r"--steps: 'two' must be a whole number"),
        (["a", "--height", "17"], r"height=17 must be divisible by 2"),
        (["a", "--guidance_scale", "nan"], r"guidance_scale=nan must be a finite number"),
        (["a", "--num_images", "0"], r"num_images=0 must be"),
        (["a", "--seed", "-1"], r"seed=-1 must be"),
        (["a", "--device", "gpu"], r"device='gpu' cannot be used on this machine"),
        (["a", "--model", "no/such/folder"], r"neither a file, a folder nor .*allowed are emoji"),
        (["a", "--step", "3"], r"unknown argument --step; did you mean --steps\?"),
        ([], r"nothing to draw; give a PROMPT"),
    ],
)
def test_a_wrong_option_gets_one_sentence_and_no_traceback(
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    assert generate(model, tmp_path, *arguments) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"latentdiff generate: .*{sentence}.*\n", error)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_pipeline_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(str(tmp_path), tmp_path, "a cat") == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"latentdiff generate: .* missing: model_index\.json, unet/.*\n", error)


def test_damaged_weights_are_named(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from latentdiff import Pipeline

    Pipeline.from_pretrained(model).save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    capsys.readouterr()
    assert generate(str(tmp_path / "model"), tmp_path, "a cat") == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"latentdiff generate: {weights}: is not a whole .*\n", error)


def test_a_font_that_is_not_there_names_the_package(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, font = str(tmp_path / "emoji"), str(tmp_path / "no.ttf")
    assert run("data", "emoji", "--out", out, "--font", font) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"latentdiff data emoji: .*fonts-noto-color-emoji.*\n", error)


def test_data_shapes_makes_a_data_set_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shapes"
    assert run("data", "shapes", "--out", str(out), "--count", "5", "--size", "32") == 0
    assert capsys.readouterr().out.startswith(f"{out}: ")
    assert len(list(out.glob("*/*.png"))) == 5


@pytest.mark.parametrize("arguments", [["data", "draw"], ["draw"], ["--nonsense"]])
def test_a_wrong_command_gets_one_sentence(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert re.fullmatch(r"latentdiff( data)?: .*--help\)\n", capsys.readouterr().err)


def test_env_names_versions_and_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("env") == 0
    printed = capsys.readouterr().out
    for word in ("latentdiff ", "Python ", "torch ", "transformers ", "CPU: ", "accelerator: "):
        assert f"\n{word}" in f"\n{printed}"


def test_labels_in_any_script_and_of_any_length_are_drawn_without_a_crash() -> None:
    labels = ["red heart", "éclair", "猫", "\0\n", "", "word " * 1000, "x" * 5000, "👩‍🚀"]
    images = [Image.new("RGB", (64, 64), "red") for _ in labels]
    grid = image_grid(images, labels, plain=[f"{i}.png" for i in range(len(labels))])
    assert grid.width >= 3 * 128
    assert grid.height >= 3 * 128
