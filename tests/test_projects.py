"""Projects: what is chosen for own images, and from nothing to an image in two commands."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from PIL import Image
from support.command import run
from support.scripts import ROOT

from latentdiff.data.check import Summary
from latentdiff.data.config import DataConfig
from latentdiff.data.shapes import build_shapes
from latentdiff.pipeline import Pipeline
from latentdiff.projects import measure as measuring
from latentdiff.projects.folder import MODULES, check_free, check_project, project_prompts
from latentdiff.projects.look import Look, find_columns, look_at, script
from latentdiff.projects.measure import measure
from latentdiff.projects.new import describe, in_words
from latentdiff.projects.rules import EPOCHS, STEPS, configurations
from latentdiff.tasks.clip.config import TrainCLIP
from latentdiff.tasks.denoiser.config import TrainUNet
from latentdiff.tasks.vae.config import TrainVAE
from latentdiff.training.command_line import parse_config

CONFIGS: dict[str, Any] = {"vae": TrainVAE, "clip": TrainCLIP, "unet": TrainUNet}
SHORT = {"max_steps": 2, "warmup_steps": 1, "cooldown_steps": 0, "batch_size": 2}
# Networks that train a step in milliseconds, and what a few steps leave.
TINY: dict[str, dict[str, Any]] = {
    "vae": {**SHORT, "vae": {"block_out_channels": [8, 8, 8, 16], "norm_num_groups": 4}},
    "clip": {
        **SHORT,
        "vocab_size": 600,
        "clip": {"text_width": 16, "text_layers": 1, "image_width": 16, "image_layers": 1},
    },
    "cache": {"check_latents": False},
    "unet": {**SHORT, "unet": {"block_out_channels": [8, 16], "norm_num_groups": 4}},
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A dozen captioned images and a file that is none."""
    build_shapes(tmp_path / "shapes", count=14, seed=0, size=64)
    folder = tmp_path / "mypics"
    shutil.copytree(tmp_path / "shapes" / "train", folder)
    return folder


def shrink(project: Path) -> None:
    """Give the project networks and runs that end in seconds."""
    for name, changes in TINY.items():
        path = project / f"{name}.yaml"
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
        for key, value in changes.items():
            options[key] = {**options.get(key, {}), **value} if isinstance(value, dict) else value
        path.write_text(yaml.safe_dump(options), encoding="utf-8")


def look(num_images: int, image_size: int = 64, **changes: Any) -> Look:
    return replace(
        Look(
            config=DataConfig(data="own", image_size=image_size),
            num_images=num_images,
            summary=Summary(),
            writing={"LATIN": num_images},
            longest=30,
            tokens=14,
            prompts=["a cat"],
        ),
        **changes,
    )


@pytest.mark.training
def test_own_images_take_two_commands(
    images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """README's four commands failed on them, and the way that worked had seven options."""
    project = tmp_path / "mine"
    assert run("new", str(project), "--data", str(images), "--no-measure") == 0
    assert "latentdiff train" in capfd.readouterr().out
    shrink(project)
    assert run("train", str(project)) == 0
    said = capfd.readouterr()
    begun = [line.partition(":")[0] for line in said.out.splitlines() if ": accelerate" in line]
    assert begun == list(MODULES)
    assert "Traceback" not in said.err
    assert "were not passed to" not in said.err  # accelerate's list of its defaults
    drawn = sorted(path.name for path in (project / "images").iterdir())
    assert (len(drawn), drawn[-1]) == (9, "grid.png")
    with Image.open(project / "images" / drawn[0]) as image:
        assert image.size == (64, 64)
    Pipeline.from_pretrained(project / "unet" / "model")
    assert run("train", str(project)) == 0  # all is done, and said
    said = capfd.readouterr()
    *lines, last = said.out.splitlines()
    assert lines == [f"cd {project}", *(f"{name}: done" for name in MODULES)]
    assert (
        last == f'to draw: latentdiff generate "a prompt" --model {project}/unet/model --out images'
    )
    assert len(list((project / "images").iterdir())) == 9


@pytest.mark.training
@pytest.mark.processes
@pytest.mark.parametrize("kind", ["NO", "MULTI_GPU"])
def test_a_refused_part_ends_with_its_own_code_and_no_traceback(
    images: Path, tmp_path: Path, kind: str
) -> None:
    """Whether accelerate starts one process or torchrun's two: it was 1, and torchrun's report."""
    project, accelerate = tmp_path / "mine", tmp_path / "home/accelerate/default_config.yaml"
    assert run("new", str(project), "--data", str(images), "--no-measure") == 0
    vae = yaml.safe_load((project / "vae.yaml").read_text())
    (project / "vae.yaml").write_text(yaml.safe_dump(vae | {"learning_rate": -1.0}))
    accelerate.parent.mkdir(parents=True)
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": kind, "use_cpu": False}
    accelerate.write_text(yaml.safe_dump(config | {"num_processes": 1 if kind == "NO" else 2}))
    done = subprocess.run(
        [sys.executable, "-m", "latentdiff.cli", "train", str(project)],
        env=os.environ | {"HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "error: learning_rate=-1.0 must be" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.training
@pytest.mark.processes
def test_control_c_stops_a_project_with_a_checkpoint_and_one_sentence(
    images: Path, tmp_path: Path
) -> None:
    """accelerate's launcher ended at once in a traceback, and the script went on alone."""
    project = tmp_path / "mine"
    assert run("new", str(project), "--data", str(images), "--no-measure") == 0
    shrink(project)
    vae, quick = (
        yaml.safe_load((project / "vae.yaml").read_text()),
        {"compile": False, "log_every": 1},
    )
    (project / "vae.yaml").write_text(yaml.safe_dump(vae | {"max_steps": 100_000, **quick}))
    process = subprocess.Popen(
        [sys.executable, "-m", "latentdiff.cli", "train", str(project)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    log, until = project / "vae" / "log.jsonl", time.monotonic() + 120
    while not (log.is_file() and log.stat().st_size) and time.monotonic() < until:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "stopped by Control-C after step" in said
    assert "Traceback" not in said
    assert len(list((project / "vae" / "checkpoints").glob("step-*"))) == 1


def test_a_project_names_its_data_once_and_its_parts_by_each_other(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "broken.png").write_bytes(b"no image")
    (images / "broken.txt").write_text("a broken one")
    metadata = images / "metadata.jsonl"
    row = '{"file_name": "broken.png", "text": "a broken one", "text_zh": "破"}\n'
    metadata.write_text(metadata.read_text(encoding="utf-8") + row, encoding="utf-8")
    project = tmp_path / "mine"
    assert run("new", str(project), "--data", str(images), "--no-measure") == 0
    found = capsys.readouterr().out
    assert "1 of 13 images cannot be used: 1 cannot be decoded" in found
    options = {
        name: yaml.safe_load((project / f"{name}.yaml").read_text(encoding="utf-8"))
        for name in MODULES
    }
    assert [options[name]["output_dir"] for name in MODULES] == list(MODULES)
    assert options["unet"]["text_encoder"] == "clip/model"
    assert options["unet"]["vae"] == options["cache"]["vae"] == "vae/model"
    for name in ("vae", "clip", "cache"):
        assert options[name]["data"] == str(images)
        assert options[name]["bad_samples"] == "check/bad_samples.jsonl"
        assert options[name]["max_bad"] == 0.08
    assert options["clip"]["caption_columns"] == ["text", "text_zh"]
    assert not (images / "bad_samples.jsonl").exists()  # own images are left as they are
    readme = (project / "README.md").read_text(encoding="utf-8")
    assert f"latentdiff train {project}" in readme
    assert "1 cannot be decoded" in readme
    assert run("new", str(project), "--data", str(images)) == 2
    assert "exists; choose another name" in capsys.readouterr().err


def test_what_new_and_train_refuse_is_not_each_others_advice(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`new` of a folder of images said to train it, and `train` of it said to make it by `new`."""
    monkeypatch.chdir(tmp_path)
    own, project = Path("mypics"), Path("mine")
    with pytest.raises(ValueError, match="mypics exists and is no project; choose another name"):
        check_free(own)
    with pytest.raises(ValueError, match=r"mypics is no project: .* new PROJECT --data mypics`"):
        check_project(own)
    with pytest.raises(ValueError, match=r"mine is no project: .* new mine --data FOLDER` makes"):
        check_project(project)
    check_free(project)
    project.mkdir()
    check_free(project)
    for name in MODULES:
        (project / f"{name}.yaml").write_text(f"output_dir: {name}\n")
    check_project(project)
    with pytest.raises(ValueError, match="or go on with it: latentdiff train mine"):
        check_free(project)
    with pytest.raises(ValueError, match=r"min is no project: .*; did you mean 'mine'\?"):
        check_project(Path("min"))
    (project / "vae").mkdir()
    with pytest.raises(ValueError, match="it is a part of one: latentdiff train mine vae"):
        check_project(project / "vae")
    (project / "clip.yaml").unlink()
    with pytest.raises(ValueError, match=r"mine has no clip\.yaml; `latentdiff new` of another"):
        check_project(project)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("output_dir: [vae", r"vae\.yaml is not YAML: .* line 1"),
        ("output_dir: vae\noutput_dir: vae", r"vae\.yaml: the key 'output_dir' is there twice"),
        ("max_steps: 2", r"vae\.yaml must be a mapping with output_dir"),
        ("output_dir: vae", r"vae\.yaml: max_steps=None must be a whole number"),
        ("output_dir: vae\nmax_steps: 1e3", r"vae\.yaml: max_steps=1000\.0 must be a whole number"),
    ],
)
def test_a_configuration_that_was_edited_wrongly_is_named(
    text: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bracket too many, or a line too few, ended in a traceback."""
    for name in MODULES:
        (tmp_path / f"{name}.yaml").write_text(f"output_dir: {name}\nmax_steps: 1\n")
    (tmp_path / "vae.yaml").write_text(text)
    assert run("train", str(tmp_path)) == 2
    said = capsys.readouterr().err
    assert re.search(sentence, said), said
    assert said.count("\n") == 1


def test_prompts_are_read_before_hours_of_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the file a trained project ended in "[Errno 2] No such file or directory"."""
    assert project_prompts(tmp_path) == []
    for name in MODULES:
        (tmp_path / f"{name}.yaml").write_text(f"output_dir: {name}\nmax_steps: 1\n")
    (tmp_path / "prompts.txt").write_text("a cat\n\n猫\n", encoding="utf-8")
    assert project_prompts(tmp_path) == ["a cat", "猫"]
    (tmp_path / "prompts.txt").write_bytes("für".encode("latin-1"))
    assert run("train", str(tmp_path)) == 2
    said = capsys.readouterr()
    assert "prompts.txt is not UTF-8 text; save it as such" in said.err
    assert "accelerate" not in said.out


def test_captions_of_images_that_are_left_out_are_neither_counted_nor_drawn(
    images: Path, tmp_path: Path
) -> None:
    """119 images had 122 captions, and a prompt was of an image that no model had seen."""
    (images / "metadata.jsonl").unlink()
    for i, path in enumerate(sorted(images.glob("*.png"))):
        path.with_suffix(".txt").write_text(f"number {i}")
    first = min(images.glob("*.png"))
    first.write_bytes(first.read_bytes()[:100])
    found = look_at(str(images), tmp_path / "check", gpu=False)
    assert found.writing == {"LATIN": found.num_images}
    assert "number 0" not in found.prompts
    assert describe(found)[0].startswith(
        f"{found.num_images} images, whose shorter sides are 64 pixels; they are trained on at 64"
    )


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("image_size", [32, 64, 128, 256])
@pytest.mark.parametrize("num_images", [4, 12, 218, 2000, 50_000])
def test_every_project_is_a_configuration_of_its_scripts(
    tmp_path: Path, num_images: int, image_size: int, gpu: bool
) -> None:
    options = configurations(look(num_images, image_size), gpu=gpu)
    assert list(options) == list(MODULES)
    for name, make in CONFIGS.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(options[name]))
        config, _ = parse_config(make, ["--config", str(path)])
        loop, (least, most) = config.loop, STEPS[name]
        assert least <= loop.max_steps <= most
        assert loop.batch_size <= num_images // 2
        assert config.optimizer.shortfall(loop.max_steps) is None
        epochs = loop.max_steps * loop.batch_size / num_images
        assert loop.max_steps in (least, most) or abs(epochs / EPOCHS[name] - 1) < 0.2


def test_the_size_is_one_that_nearly_all_images_have(images: Path, tmp_path: Path) -> None:
    assert look_at(str(images), tmp_path / "a", gpu=True).config.image_size == 128
    chosen = look_at(str(images), tmp_path / "b", gpu=False).config
    assert (chosen.image_size, chosen.upscale_limit) == (64, 1.0)
    named = look_at(str(images), tmp_path / "c", gpu=False, image_size=128).config
    assert (named.image_size, named.upscale_limit) == (128, 2.0)
    with pytest.raises(ValueError, match="image_size=100 must be one of 32, 64"):
        look_at(str(images), tmp_path / "d", gpu=False, image_size=100)
    with pytest.raises(ValueError, match=r"has 0 images of 256 pixels, and .* too small"):
        look_at(str(images), tmp_path / "e", gpu=False, image_size=256)


def test_images_without_captions_are_told_how_they_get_some(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find_columns(str(images)) == ("text", "text_zh")
    (images / "metadata.jsonl").unlink()
    project = tmp_path / "mine"
    assert run("new", str(project), "--data", str(images)) == 2
    said = capsys.readouterr().err
    assert "has no captions: write a .txt beside each image, 1.txt for 1.png, or" in said
    assert not project.exists()
    assert run("train", str(project)) == 2
    assert "is no project: it has no vae.yaml; `latentdiff new" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "word"),
    [("a cat", "LATIN"), ("一只猫 kitten!", "LATIN"), ("猫", "CJK"), ("12 :)", "OTHER")],
)
def test_the_writing_of_a_caption_is_that_of_most_letters(text: str, word: str) -> None:
    assert script(text) == word


def test_times_are_measured_on_the_configured_networks(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan by FLOP promised two to seven times the rate that the machine had."""
    project = tmp_path / "mine"
    assert run("new", str(project), "--data", str(images), "--no-measure") == 0
    shrink(project)
    batches = list[int]()
    make = measuring.make_workload

    def counted(*args: Any, **options: Any) -> Any:
        workload = make(*args, **options)

        def loss(model: Any, frozen: Any, count: int) -> Any:
            batches.append(count)
            return workload.loss(model, frozen, count)

        return replace(workload, loss=loss)

    monkeypatch.setattr(measuring, "make_workload", counted)
    seconds = measure(project, 12)
    assert set(seconds) == set(MODULES)
    assert all(0 < value < 60 for value in seconds.values())
    assert batches == [2] * 3 * measuring.NUM_STEPS
    assert [in_words(s) for s in (5, 90, 9000)] == ["5 s", "1.5 min", "2.5 h"]
