"""train/distill.py: what a run leaves, resuming, processes, and one sentence for what is wrong."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from support.scripts import ROOT, TWO, launch, run_here, script
from support.settings import HALF
from support.students import DIFFUSIONS, student_of
from support.tiny import CONTEXT_DIM, tiny_pipeline
from test_cache import write_images
from test_fine_tuning import tensors
from torch import nn

from latentdiff.cli import main
from latentdiff.diffusion import Diffusion
from latentdiff.guidance import guided_denoiser
from latentdiff.models.dit import DiT, DiTConfig
from latentdiff.pipeline import Pipeline
from latentdiff.tasks.distill.trajectories import step_errors, trajectory
from latentdiff.training.loop import fit
from latentdiff.training.randomness import MicroBatch

pytestmark = pytest.mark.training
LORA: dict[str, Any] = {"lora.rank": 4, "learning_rate": 1e-2, "ema_decay": 0}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Teachers, a student, and images with captions."""
    home = tmp_path_factory.mktemp("home")
    for name, diffusion in DIFFUSIONS.items():
        pipeline = tiny_pipeline(home / "scratch", diffusion)
        pipeline.save_pretrained(home / name)
    student_of(home, DIFFUSIONS["sd"])
    learned = Diffusion("linear", "epsilon", learned_variance=True)
    tiny_pipeline(home / "scratch", learned).save_pretrained(home / "learned")
    tiny_pipeline(home / "scratch", inpaints=True).save_pretrained(home / "inpainting")
    dit = DiT(
        DiTConfig(
            sample_size=8,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=CONTEXT_DIM,
        )
    )
    for parameter in dit.parameters():  # those that begin at zero draw nothing
        nn.init.normal_(parameter, std=0.1)
    Pipeline(
        unet=dit, vae=pipeline.vae, text_encoder=pipeline.text_encoder, diffusion=diffusion
    ).save_pretrained(home / "dit")
    write_images(home / "data", 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(home / "datasets"))
        yield home


def arguments(home: Path, out: Path, teacher: str = "flow", **options: Any) -> list[str]:
    """Of distill.py on the images; `options` are added."""
    settings = {
        "teacher": home / teacher,
        "data": home / "data",
        "image_size": 16,
        "upscale_limit": 4,
        "output_dir": out,
        "batch_size": 4,
        "max_steps": 4,
        "teacher_steps": 8,
        "checkpoint_every": 2,
        "val_fraction": 0.3,
        "validate_every": 4,
        "warmup_steps": 0,
        "mixed_precision": "no",
    } | options
    return [f"--{key}={value}" for key, value in settings.items()]


@pytest.mark.parametrize("teacher", ["sd", "zero snr", "flow", "dit"])
def test_a_run_leaves_a_student(home: Path, tmp_path: Path, teacher: str) -> None:
    run_here("distill", *arguments(home, tmp_path / "run", teacher, ema_decay=0))
    before = Pipeline.from_pretrained(home / teacher)
    after = Pipeline.from_pretrained(tmp_path / "run/model")
    assert after.diffusion == before.diffusion.student(4)
    assert after.unet.config == before.unet.config
    moved = [
        name
        for name, p in after.unet.state_dict().items()
        if not torch.equal(p, before.unet.state_dict()[name])
    ]
    assert len(moved) > 0.9 * len(before.unet.state_dict())
    log = (tmp_path / "run/log.jsonl").read_text(encoding="utf-8")
    assert '"val_loss"' in log
    assert '"val_loss_3"' in log  # one for each step
    assert '"val_loss_4"' not in log
    assert list((tmp_path / "run/previews").glob("*.png"))


def test_the_target_of_a_run_is_of_the_guided_teacher(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's loss is that of the networks in float64; the empty caption is given to none."""
    found: list[Any] = []

    def keep(task: Any, loader: Any, run: Any) -> None:
        found.extend((task, next(loader(0))))
        run.folder.close()

    monkeypatch.setattr(script("distill"), "fit", keep)
    run_here("distill", *arguments(home, tmp_path, guidance_scale=3))
    task, batch = found
    task.learner._averages = None  # they are in float32
    for network in (task.learner.model, task.teacher):
        network.double()
    batch = {n: v.double() if v.is_floating_point() else v for n, v in batch.items()}
    context = task.denoiser.captions.context(batch["caption"]).double()
    null = task.null_context.double()
    assert not any(torch.equal(one, null[0]) for one in context)
    task.denoiser.captions.states = task.denoiser.captions.states.double()
    guided = guided_denoiser(task.diffusion, task.teacher, context, null, 3.0)
    states = trajectory(guided, batch["noise"], task.diffusion.levels(8), 4)
    with torch.no_grad():
        network, levels = task.learner.model, task.diffusion.levels(4)
        wanted = step_errors(task.diffusion, network, states, context, levels).mean()
    loss = task.step(batch, 0, MicroBatch())["loss"]
    assert abs(float(loss.detach() / wanted) - 1) < 1e-12


def test_as_a_lora_a_student_draws_as_it_did_in_training(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On its teacher, and merged into a model of its own."""
    tasks: list[Any] = []
    monkeypatch.setattr(script("distill"), "fit", keeping(tasks))
    run_here("distill", *arguments(home, tmp_path / "run", "sd", **LORA))
    [file] = (tmp_path / "run/model").glob("*.safetensors")
    student = tasks[0].denoiser.pipeline
    call = {"seed": 3, "progress": False, "output_type": "latent"}
    wanted = student("a cat", **call).images
    pipe = Pipeline.from_pretrained(home / "sd")
    teacher, plain = pipe.diffusion, pipe("a cat", **call).images
    pipe.loras.load(file)
    assert pipe.diffusion == teacher.student(4)
    drawn = pipe("a cat", **call).images
    assert torch.allclose(drawn, wanted, atol=5e-3)  # the file has float16
    assert not torch.allclose(drawn, plain, atol=0.1)
    main(["convert", str(home / "sd"), str(tmp_path / "merged"), "--lora", str(file)])
    merged = Pipeline.from_pretrained(tmp_path / "merged")
    assert merged.diffusion == teacher.student(4)
    assert torch.allclose(merged("a cat", **call).images, drawn, atol=1e-4)
    named = str(tmp_path / "named.safetensors")
    main(["convert", str(file), named, "--lora_names", "diffusers", "--lora_rank", "3"])
    made_of = ["--lora_of", str(home / "sd"), "--lora_rank", "4"]
    main(["convert", str(tmp_path / "merged"), str(tmp_path / "again.safetensors"), *made_of])
    pipe.loras.set_scales({})
    assert pipe.diffusion == teacher
    pipe.loras.unload()
    assert torch.equal(pipe("a cat", **call).images, plain)
    pipe.loras.load(named)
    assert pipe.diffusion == teacher.student(4)
    pipe.loras.unload()
    pipe.loras.load(tmp_path / "again.safetensors")
    assert pipe.diffusion == teacher.student(4)
    assert torch.allclose(pipe("a cat", **call).images, drawn, atol=2e-2)
    with pytest.raises(ValueError, match="a student of 4 steps, and this is one already"):
        pipe.loras.load(file)
    with pytest.raises(ValueError, match="a student of 4 steps, and this is one already"):
        merged.loras.load(file)
    card = (tmp_path / "run/model/README.md").read_text(encoding="utf-8")
    assert "in the student's steps" in card


def keeping(tasks: list[Any]) -> Callable[..., None]:
    """The training loop, which leaves its task in a list."""

    def keep(task: Any, loader: Any, run: Any) -> None:
        tasks.append(task)
        fit(task, loader, run)

    return keep


def test_the_command_line_draws_with_a_students_lora_as_the_student(
    home: Path, tmp_path: Path
) -> None:
    run_here("distill", *arguments(home, tmp_path / "run", **LORA, max_steps=1))
    drawn = ["--model", str(home / "flow"), "--lora", str(tmp_path / "run/model"), "--seed", "1"]
    main(["generate", *drawn, "--device", "cpu", "a cat", "--out", str(tmp_path / "own")])
    options = ["--steps", "4", "--guidance_scale", "1", "--sampler", "ddim"]
    main(["generate", *drawn, "--device", "cpu", "a cat", *options, "--out", str(tmp_path)])
    assert (tmp_path / "own/0000-1.png").read_bytes() == (tmp_path / "0000-1.png").read_bytes()


@pytest.mark.parametrize(
    ("teacher", "options", "sentence"),
    [
        ("dit", {}, "is a DiT, and a LoRA needs a UNet: leave lora out"),
        ("sd", {"lora.text_encoder": "true"}, "lora.text_encoder=.* has no effect"),
        ("sd", {"lora.rank": 99}, "lora.rank=99 must be at most"),
    ],
)
def test_what_is_no_student_as_a_lora_is_one_sentence(
    home: Path,
    tmp_path: Path,
    teacher: str,
    options: dict[str, Any],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        run_here("distill", *arguments(home, tmp_path, teacher, **LORA | options))
    assert re.search(sentence, capsys.readouterr().err)


@pytest.mark.processes
@pytest.mark.parametrize("lora", [False, True], ids=["network", "lora"])
def test_what_is_killed_goes_on_bit_for_bit(home: Path, tmp_path: Path, lora: bool) -> None:
    options: dict[str, Any] = {"max_steps": 6, "ema_decay": 0.5, "mixed_precision": HALF}
    options |= LORA | {"lora.dropout": 0.2} if lora else {}
    run_here("distill", *arguments(home, tmp_path / "whole", **options))
    args = arguments(home, tmp_path / "killed", **options)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, ROOT / "train/distill.py", *args], env=environment)
    first = tmp_path / "killed/checkpoints/step-2/manifest.json"
    while not first.is_file():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    run_here("distill", *args)
    for part in ("model", "checkpoints/step-6"):
        whole, killed = tmp_path / "whole" / part, tmp_path / "killed" / part
        files = sorted(path.relative_to(whole) for path in whole.rglob("*.safetensors"))
        assert files
        for file in files:
            assert tensors(whole / file) == tensors(killed / file)


@pytest.mark.processes
def test_two_processes_train_the_same_student(home: Path, tmp_path: Path) -> None:
    """And so do micro-batches; up to rounding, which AdamW's first steps make more of."""
    options = {"ema_decay": 0, "learning_rate": 1e-5}
    run_here("distill", *arguments(home, tmp_path / "one", **options))
    launch(TWO, "distill", *arguments(home, tmp_path / "two", **options))
    run_here(
        "distill",
        *arguments(home, tmp_path / "micro", gradient_accumulation_steps=2, **options),
    )
    one, *others = (
        Pipeline.from_pretrained(tmp_path / name / "model").unet.state_dict()
        for name in ("one", "two", "micro")
    )
    for other in others:
        for name, weight in one.items():
            assert torch.allclose(weight, other[name], rtol=0, atol=1e-5), name


@pytest.mark.parametrize(
    ("teacher", "sentence"),
    [
        ("student", "teacher=.*student is a student already, of 4 steps: give its own teacher"),
        ("inpainting", "teacher=.*inpainting is an inpainting model"),
        ("learned", "teacher=.*learned is a model with a learned variance"),
        ("nowhere", "^teacher: .*nowhere"),
    ],
)
def test_no_teacher_is_one_sentence(
    home: Path, tmp_path: Path, teacher: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run_here("distill", *arguments(home, tmp_path, teacher))
    assert end.value.code == 2
    said = capsys.readouterr().err.removeprefix("error: ")
    assert re.search(sentence, said.strip())


def test_a_student_is_not_trained_as_a_denoiser(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_here("train_unet", f"--init={home}/student", f"--output_dir={tmp_path}")
    assert "is a student of distill.py" in capsys.readouterr().err


def test_a_cache_of_another_vae_is_refused(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here("distill", *arguments(home, tmp_path / "run", max_steps=1))
    other = tiny_pipeline(home / "scratch", DIFFUSIONS["flow"], seed=5)
    other.save_pretrained(tmp_path / "other")
    options = {"teacher": tmp_path / "other", "cache": tmp_path / "run/cache", "batch_size": 4}
    args = [f"--{name}={value}" for name, value in options.items()]
    with pytest.raises(SystemExit):
        run_here("distill", *args, f"--output_dir={tmp_path}/again", "--mixed_precision=no")
    assert "VAE" in capsys.readouterr().err


def test_without_a_teacher_nothing_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_here("distill", f"--output_dir={tmp_path}")
    assert "teacher must be given" in capsys.readouterr().err
