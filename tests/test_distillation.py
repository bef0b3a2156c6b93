"""Consistency distillation: its fixed points, its target by hand, and students as files."""

import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, LCMScheduler
from support.scripts import ROOT, TWO, launch, run_here, script
from support.tiny import CONTEXT_DIM, Recording, tiny_pipeline
from test_cache import write_images
from test_fine_tuning import tensors
from test_interchange import decibels
from torch import Tensor, nn

from latentdiff.cli import main
from latentdiff.diffusion import Diffusion, Network
from latentdiff.guidance import guided_denoiser
from latentdiff.levels import Denoise, NoiseLevel
from latentdiff.models.dit import DiT, DiTConfig
from latentdiff.pipeline import Pipeline
from latentdiff.request import Request
from latentdiff.samplers import SAMPLERS
from latentdiff.tasks.distill import consistency
from latentdiff.tasks.distill.config import Distill
from latentdiff.tasks.distill.consistency import (
    ConsistencyConfig,
    along,
    consistency_distance,
    consistency_weight,
    level_of,
    noise_of,
    same_draws,
    time_of,
)
from latentdiff.training.randomness import MicroBatch

SHAPE = (4, 3, 2, 2)
DIFFUSIONS = {
    "sd": Diffusion("scaled_linear", "epsilon"),
    "zero snr": Diffusion("scaled_linear", "v_prediction", rescale_betas_zero_snr=True),
    "flow": Diffusion("flow", "flow_prediction"),
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def fit(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def network_of(diffusion: Diffusion, estimate: Denoise) -> Network:
    """The network of a diffusion whose estimate of x0 is `estimate`; its context is t."""

    def network(x: Tensor, timestep: Tensor, t: Tensor) -> Tensor:
        t = timestep if diffusion.schedule == "flow" else timestep + 1
        level = level_of(diffusion, t)
        x0 = estimate(x, level)
        eps = (x - fit(level.alpha) * x0) / fit(level.sigma)
        return diffusion.target(x0, eps, level.alpha, level.sigma)

    return network


def distance(
    diffusion: Diffusion, student: Denoise, teacher: Denoise, t: Tensor, r: Tensor
) -> Tensor:
    network = network_of(diffusion, student)
    noise, x0 = randn(*SHAPE, seed=1), randn(*SHAPE)
    return consistency_distance(diffusion, network, teacher, x0, t, noise=noise, t=t, r=r)


def times(diffusion: Diffusion, stage: int) -> tuple[Tensor, Tensor]:
    flow = diffusion.schedule == "flow"
    t = torch.tensor([999.0, 700.0, 200.0, 20.0] if flow else [1000, 700, 200, 20])
    return t, ConsistencyConfig().second(diffusion, t, stage)


def wobbly(x: Tensor, level: NoiseLevel) -> Tensor:
    return torch.tanh(x) * fit(level.alpha) + 0.3 * x.flip(0)


@pytest.mark.parametrize("name", DIFFUSIONS)
@pytest.mark.parametrize("stage", [0, 3, 7])
def test_of_data_that_is_one_point_the_loss_is_zero(name: str, stage: int) -> None:
    """Its trajectories are straight, so that one step of Euler's is exact at any distance."""
    diffusion, point = DIFFUSIONS[name], randn(1, *SHAPE[1:], seed=2)

    def estimate(x: Tensor, level: NoiseLevel) -> Tensor:
        return point.expand_as(x)

    t, r = times(diffusion, stage)
    assert distance(diffusion, estimate, estimate, t, r).abs().max() < 1e-12


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_of_gaussian_data_the_exact_function_is_the_fixed_point(name: str) -> None:
    """Of N(0, s^2 I) the ODE keeps x_t over its deviation, so f is x_t s over the deviation at t.
    What is left is Euler's error: of second order, so that the square of it falls by 16."""
    diffusion, s = DIFFUSIONS[name], 0.7

    def spread(level: NoiseLevel) -> Tensor:
        return (level.alpha**2 * s**2 + level.sigma**2).sqrt()

    def mean(x: Tensor, level: NoiseLevel) -> Tensor:
        return x * fit(level.alpha * s**2 / spread(level) ** 2)

    def exact(x: Tensor, level: NoiseLevel) -> Tensor:
        return x * fit(s / spread(level))

    t, apart = torch.full((4,), 600), 16
    far, near = (distance(diffusion, exact, mean, t, t - apart // n) for n in (1, 2))
    assert torch.allclose(far / near, torch.tensor(16.0, dtype=torch.float64), rtol=0.1)
    assert near.max() < 1e-3 * distance(diffusion, mean, mean, t, t - apart).max()


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_at_equal_times_nothing_is_wrong_with_any_student(name: str) -> None:
    t, _ = times(DIFFUSIONS[name], 0)
    assert distance(DIFFUSIONS[name], wobbly, wobbly, t, t).abs().max() < 1e-12


def test_every_prediction_type_has_the_loss_of_equivalent_networks() -> None:
    kinds = {
        "scaled_linear": ("epsilon", "v_prediction", "sample", "score", "flow_prediction"),
        "flow": ("flow_prediction", "v_prediction", "sample"),
    }
    for schedule, predictions in kinds.items():
        losses = []
        for prediction in predictions:
            diffusion = Diffusion(schedule, prediction)  # pyright: ignore[reportArgumentType]
            t, r = times(diffusion, 1)
            weight = consistency_weight(diffusion, t, r)
            losses.append(weight * distance(diffusion, wobbly, mean_of_x, t, r))
        assert losses[0].min() > 1e-3
        for other in losses[1:]:
            torch.testing.assert_close(other, losses[0], rtol=1e-9, atol=0)


def mean_of_x(x: Tensor, level: NoiseLevel) -> Tensor:
    return x.mean((1, 2, 3), keepdim=True).expand_as(x)


def test_at_the_data_the_function_is_the_identity() -> None:
    """The target at r = 0 is the teacher's x0, whatever the student says there."""
    diffusion = DIFFUSIONS["sd"]
    t, r = torch.tensor([5, 4, 3, 2]), torch.zeros(4, dtype=torch.long)
    assert distance(diffusion, wobbly, wobbly, t, r).abs().max() < 1e-12
    assert distance(diffusion, wobbly, mean_of_x, t, r).min() > 1e-3


def test_a_step_along_the_trajectory_is_ddims() -> None:
    diffusion = DIFFUSIONS["flow"]
    levels = diffusion.levels(4)
    t, r = (NoiseLevel(*(v.expand(4) for v in levels[i])) for i in (1, 2))
    x = randn(*SHAPE)
    steps = SAMPLERS["ddim"](
        lambda x, level: torch.tanh(x),
        x,
        replace(
            levels,
            timestep=levels.timestep[1:3],
            alpha=levels.alpha[1:3],
            sigma=levels.sigma[1:3],
        ),
        noise=lambda: x,
    )
    torch.testing.assert_close(along(x, torch.tanh(x), t, r), list(steps)[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_times_and_noise_levels_are_each_others_inverse(name: str) -> None:
    diffusion = DIFFUSIONS[name]
    t = torch.arange(1000 if name == "flow" else 1001)
    t = t.float() if name == "flow" else t
    torch.testing.assert_close(time_of(diffusion, noise_of(diffusion, t)), t)


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_the_second_time_comes_nearer_stage_by_stage(name: str) -> None:
    diffusion, config = DIFFUSIONS[name], ConsistencyConfig(stage_every=10)
    draw = torch.Generator().manual_seed(0)
    t = config.sample_t(diffusion, 20_000, generator=draw)
    assert t.min() > 0
    assert t.max() <= (999 if name == "flow" else 1000)
    noise = noise_of(diffusion, t)
    assert abs(float(noise.log().median()) + 1.1) < 0.1
    last = torch.zeros_like(t)
    for stage in range(8):
        r = config.second(diffusion, t, stage)
        assert (r >= last).all()
        assert (r < t).all()
        if name == "flow":  # ECT's formula, where times are not rounded
            wanted = noise * (1 - (1 + 8 * torch.sigmoid(-noise)) / 2 ** (stage + 1)).clamp(min=0)
            torch.testing.assert_close(noise_of(diffusion, r), wanted, rtol=1e-3, atol=1e-5)
        last = r
    assert [config.stage(step) for step in (0, 9, 10, 79, 80, 10_000)] == [0, 0, 1, 7, 7, 7]


def test_the_target_is_the_guided_teachers_by_hand(tmp_path: Path) -> None:
    """In float64, with every formula of SD's schedule written out."""
    teacher = tiny_pipeline(tmp_path, DIFFUSIONS["sd"]).unet.double()
    student = tiny_pipeline(tmp_path, DIFFUSIONS["sd"], seed=1).unet.double()
    context, null = randn(2, 5, CONTEXT_DIM, seed=3), randn(1, 5, CONTEXT_DIM, seed=4)
    x0, noise, scale = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1), 3.5
    t, r = torch.tensor([700, 300]), torch.tensor([500, 0])
    diffusion = DIFFUSIONS["sd"]
    guided = guided_denoiser(diffusion, teacher, context, null, scale)
    ours = consistency_distance(diffusion, student, guided, x0, context, noise=noise, t=t, r=r)

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    bars = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
    for i in range(2):
        (a, s), (b, u) = ((bars[k].sqrt(), (1 - bars[k]).sqrt()) for k in (t[i], r[i]))
        x = a * x0[i : i + 1] + s * noise[i : i + 1]
        with torch.no_grad():
            with_prompt = teacher(x, t[i : i + 1] - 1, context[i : i + 1])
            without = teacher(x, t[i : i + 1] - 1, null)
            eps = without + scale * (with_prompt - without)
            x_r = b * (x - s * eps) / a + u * eps
            at_t = (x - s * student(x, t[i : i + 1] - 1, context[i : i + 1])) / a
            at_r = x_r
            if r[i] > 0:
                at_r = (x_r - u * student(x_r, r[i : i + 1] - 1, context[i : i + 1])) / b
        c = 0.00054 * 256**0.5
        by_hand = ((0.5 * (at_t - at_r)).square().sum() + c**2).sqrt() - c
        assert abs(float(by_hand - ours[i].detach()) / float(by_hand)) < 1e-12


def test_both_evaluations_have_one_dropout_mask_and_one_gradient() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout(0.5)).double()
    seen = []

    def dropping(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        output = layer(x)
        seen.append(output == 0)
        return output

    diffusion = DIFFUSIONS["flow"]
    t, r = times(diffusion, 5)
    x0, noise = randn(*SHAPE), randn(*SHAPE, seed=1)
    found = consistency_distance(
        diffusion, same_draws(dropping, 7), wobbly, x0, t, noise=noise, t=t, r=r
    )
    assert torch.equal(seen[0], seen[1])
    assert seen[0].any()
    found.sum().backward()
    with torch.no_grad():  # the target has no gradient: half of it would come from there
        x_t = diffusion.add_noise(x0, noise, t)
        level = level_of(diffusion, t)
        x_r = along(x_t, wobbly(x_t, level), level, level_of(diffusion, r))
        level_r = level_of(diffusion, r)
        target = diffusion.to_x0(
            same_draws(dropping, 7)(x_r, r, t), x_r, level_r.alpha, level_r.sigma
        )
    layer[0].weight, before = nn.Parameter(layer[0].weight.detach()), layer[0].weight.grad
    at_t = diffusion.to_x0(same_draws(dropping, 7)(x_t, t, t), x_t, level.alpha, level.sigma)
    c = consistency.HUBER * 12**0.5
    ((0.25 * (at_t - target).square().flatten(1).sum(1) + c**2).sqrt() - c).sum().backward()
    torch.testing.assert_close(layer[0].weight.grad, before)


# Students as files.


def student_of(folder: Path, diffusion: Diffusion, steps: int = 4) -> Path:
    """A folder of a tiny student; its network is random."""
    pipeline = tiny_pipeline(folder / "scratch", replace(diffusion, distilled_steps=steps))
    pipeline.save_pretrained(folder / "student")
    return folder / "student"


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_a_student_draws_by_itself_in_its_steps_without_guidance(tmp_path: Path, name: str) -> None:
    pipe = Recording.from_pretrained(student_of(tmp_path, DIFFUSIONS[name], steps=3))
    own = {"steps": 3, "guidance_scale": 1.0, "sampler": "lcm"}
    drawn = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({}, own, {"num_inference_steps": 3}, {"steps": 2}, {"sampler": "ddim"}):
            pipe("a cat", seed=1, progress=False, **options)
            drawn.append(pipe.latents)
        stream = list(pipe.stream("a cat", seed=1))
    assert len(stream) == 3
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[3])
    assert not torch.equal(drawn[0], drawn[4])
    with pytest.warns(UserWarning, match="guidance_scale=7.5: the model is a student"):
        pipe.draw(Request("a cat", seed=1, progress=False, steps=2))


def test_other_models_draw_as_before() -> None:
    request = Request.of(DIFFUSIONS["sd"], "a cat", steps=None, guidance_scale=None, seed=1)
    assert request.record(0) == Request("a cat", seed=1).record(0)
    config = DIFFUSIONS["sd"].to_scheduler_config()
    assert not [key for key in config if key.startswith("_d")]


def test_lcm_is_multistep_consistency_sampling_but_for_its_skip() -> None:
    """Whose weights are at most (0.5 / 10 t)^2 of x: below 1e-4 from timestep 5 on."""
    diffusion, x = DIFFUSIONS["sd"], randn(*SHAPE)
    levels = diffusion.levels(4, grid="lcm")
    noises = iter([randn(*SHAPE, seed=i) for i in (5, 6, 7)])
    *_, ours = SAMPLERS["lcm"](
        lambda x, level: torch.tanh(x), x, levels, noise=lambda: next(noises)
    )
    for i in range(4):
        x0 = torch.tanh(x)
        if i < 3:
            x = levels.alpha[i + 1] * x0 + levels.sigma[i + 1] * randn(*SHAPE, seed=5 + i)
    assert (ours - x0).abs().max() < 1e-6


@pytest.mark.interchange
# diffusers hands tensors to numpy in a way that numpy 2 deprecates.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(("name", "steps"), [("sd", 4), ("sd", 1), ("zero snr", 4), ("flow", 1)])
def test_diffusers_draws_the_same_image(tmp_path: Path, name: str, steps: int) -> None:
    """Of a flow in one step, as diffusers has no LCM for flows that fits its pipeline."""
    folder = student_of(tmp_path, DIFFUSIONS[name], steps)
    theirs: Any = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    kind = DPMSolverMultistepScheduler if name == "flow" else LCMScheduler
    assert type(theirs.scheduler) is kind
    theirs.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(3)
    images = theirs(
        "a cat",
        num_inference_steps=steps,
        guidance_scale=1.0,
        generator=rng,
        height=16,
        width=16,
        output_type="pt",
    ).images
    ours = Recording.from_pretrained(folder)
    ours("a cat", seed=3, progress=False)
    decoded = ours.vae.decode(ours.latents).detach()
    assert decibels((decoded / 2 + 0.5).clamp(0, 1), images) > 60


def test_the_command_line_draws_a_student_in_its_steps(tmp_path: Path) -> None:
    folder = student_of(tmp_path, DIFFUSIONS["flow"])
    drawn = ["--model", str(folder), "--seed", "1", "--device", "cpu", "a cat"]
    main(["generate", *drawn, "--out", str(tmp_path / "own")])
    options = ["--steps", "4", "--guidance_scale", "1", "--sampler", "lcm"]
    main(["generate", *drawn, *options, "--out", str(tmp_path / "given")])
    own, given = ((tmp_path / name / "0000-1.png").read_bytes() for name in ("own", "given"))
    assert own == given


def test_a_single_file_remembers_that_it_is_a_student(tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(student_of(tmp_path, DIFFUSIONS["flow"]))
    sentences = pipe.save_single_file(tmp_path / "student.safetensors")
    assert "the sampler LCM, 4 steps and a CFG scale of 1" in sentences[-1]
    again = Pipeline.from_pretrained(tmp_path / "student.safetensors")
    assert again.diffusion == pipe.diffusion


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"distilled_steps": 0}, "distilled_steps=0 must be 1 to 50"),
        ({"distilled_steps": 51}, "distilled_steps=51 must be 1 to 50"),
        (
            {"distilled_steps": 4, "learned_variance": True},
            "learned_variance=True is not for a student",
        ),
    ],
)
def test_no_diffusion_is_such_a_student(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(DIFFUSIONS["sd"], **fields)
    config = DIFFUSIONS["sd"].to_scheduler_config() | {"_distilled_steps": "four"}
    with pytest.raises(ValueError, match="_distilled_steps='four' must be a whole number"):
        Diffusion.from_scheduler_config(config)


# Runs.


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
        "stage_every": 1,
        "checkpoint_every": 2,
        "val_fraction": 0.3,
        "warmup_steps": 0,
        "mixed_precision": "no",
    } | options
    return [f"--{key}={value}" for key, value in settings.items()]


@pytest.mark.training
@pytest.mark.parametrize("teacher", ["sd", "zero snr", "flow", "dit"])
def test_a_run_leaves_a_student(home: Path, tmp_path: Path, teacher: str) -> None:
    run_here("distill", *arguments(home, tmp_path / "run", teacher, ema_decay=0))
    before = Pipeline.from_pretrained(home / teacher)
    after = Pipeline.from_pretrained(tmp_path / "run/model")
    assert after.diffusion == replace(before.diffusion, distilled_steps=4)
    assert after.unet.config == before.unet.config
    moved = [
        name
        for name, p in after.unet.state_dict().items()
        if not torch.equal(p, before.unet.state_dict()[name])
    ]
    assert len(moved) > 0.9 * len(before.unet.state_dict())
    log = (tmp_path / "run/log.jsonl").read_text(encoding="utf-8")
    assert '"distance"' in log
    assert '"val_loss"' in log
    assert list((tmp_path / "run/previews").glob("*.png"))


@pytest.mark.training
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
    mean, logvar = batch["moments"].chunk(2, dim=1)
    x0 = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * batch["posterior"]
    t, r = batch["t"], batch["r"]
    with torch.no_grad():
        distances = consistency_distance(
            task.diffusion,
            task.learner.model,
            guided,
            x0,
            context,
            noise=batch["noise"],
            t=t,
            r=r,
        )
    wanted = (distances / (noise_of(task.diffusion, t) - noise_of(task.diffusion, r))).mean()
    loss = task.step(batch, 0, MicroBatch())["loss"]
    assert abs(float(loss.detach() / wanted) - 1) < 1e-12


@pytest.mark.processes
@pytest.mark.training
def test_what_is_killed_goes_on_bit_for_bit(home: Path, tmp_path: Path) -> None:
    options = {"max_steps": 6, "ema_decay": 0.5, "mixed_precision": "bf16"}
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
@pytest.mark.training
def test_two_processes_train_the_same_student(home: Path, tmp_path: Path) -> None:
    """And so do micro-batches; up to rounding, which AdamW's first steps make more of."""
    options = {"ema_decay": 0, "learning_rate": 1e-5, "val_fraction": 0}
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


@pytest.mark.training
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


@pytest.mark.training
def test_a_student_is_not_trained_as_a_denoiser(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_here("train_unet", f"--init={home}/student", f"--output_dir={tmp_path}")
    assert "is a student of distill.py" in capsys.readouterr().err


@pytest.mark.training
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


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"guidance_scale": 0.5}, "guidance_scale=0.5 must be at least 1"),
        ({"val_fraction": 1}, "val_fraction=1 must be in"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Distill(**options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"noise_std": 0.0}, "noise_std=0.0 must be positive"),
        ({"noise_mean": float("nan")}, "noise_mean=nan must be a number"),
        ({"stage_every": 0}, "stage_every=0 must be at least 1"),
        ({"stage_factor": 1.0}, "stage_factor=1.0 must be above 1"),
        ({"num_stages": 13}, "stage_factor=2.0 to the power of num_stages=13 must be 4096 at most"),
    ],
)
def test_a_schedule_out_of_range(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ConsistencyConfig(**options)


@pytest.mark.training
def test_without_a_teacher_nothing_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_here("distill", f"--output_dir={tmp_path}")
    assert "teacher must be given" in capsys.readouterr().err
