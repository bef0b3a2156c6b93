"""Consistency distillation: its fixed points, its target by hand, its two times."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.students import DIFFUSIONS
from support.tiny import CONTEXT_DIM, tiny_pipeline
from torch import Tensor, nn

from latentdiff.diffusion import Diffusion, Network
from latentdiff.guidance import guided_denoiser
from latentdiff.levels import Denoise, NoiseLevel
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

SHAPE = (4, 3, 2, 2)


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
    diffusion, config = DIFFUSIONS[name], ConsistencyConfig(stage_every=10, num_stages=8)
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


class SmallNetwork(nn.Module):
    """Three layers over one number and sines of its time."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies = torch.linspace(1, 36, 32)
        widths = (65, 128, 128, 1)
        linear = [nn.Linear(*pair) for pair in itertools.pairwise(widths)]
        self.layers = nn.Sequential(linear[0], nn.SiLU(), linear[1], nn.SiLU(), linear[2])

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        phase = timestep[:, None] / 1000 * self.frequencies
        return fit(self.layers(torch.cat([x[:, :, 0, 0], phase.sin(), phase.cos()], 1))[:, 0])


@pytest.mark.exhaustive
def test_a_small_network_learns_where_the_teachers_trajectories_end() -> None:
    """Of data near -1 and 1 the teacher's first estimate is 0, their mean: an error of 1."""
    diffusion, s = DIFFUSIONS["flow"], 0.1
    draw = torch.Generator().manual_seed(0)

    def mean(x: Tensor, level: NoiseLevel) -> Tensor:  # of two Gaussians, in closed form
        alpha, sigma = (v.to(x.dtype).reshape(-1, 1, 1, 1) for v in level[1:])
        variance = (alpha * s) ** 2 + sigma**2
        centre = torch.tanh(alpha * x / variance)
        return centre + alpha * s**2 / variance * (x - alpha * centre)

    torch.manual_seed(0)
    student, config = SmallNetwork(), ConsistencyConfig(stage_every=300, num_stages=3)
    optimizer, steps = torch.optim.AdamW(student.parameters(), lr=2e-3), 1200
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, 2 * (steps - step) / steps)
        t = config.sample_t(diffusion, 256, generator=draw)
        r = config.second(diffusion, t, config.stage(step))
        eps, noise = (torch.randn(256, 1, 1, 1, generator=draw) for _ in range(2))
        x0 = s * eps + torch.randint(0, 2, (256, 1, 1, 1), generator=draw) * 2 - 1
        found = consistency_distance(diffusion, student, mean, x0, t, noise=noise, t=t, r=r)
        (consistency_weight(diffusion, t, r) * found).mean().backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    x = torch.randn(1000, 1, 1, 1, generator=draw)
    *_, ends = SAMPLERS["ddim"](mean, x, diffusion.levels(500), noise=lambda: x)
    first = level_of(diffusion, torch.full((1000,), 999.0))
    with torch.no_grad():
        drawn = diffusion.to_x0(student(x, first.timestep, x), x, first.alpha, first.sigma)
    errors = [(one - ends).square().mean().sqrt() for one in (drawn, mean(x, first))]
    assert errors[1] > 0.9
    assert errors[0] < 0.4


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
