"""Distilling trajectories: the exact student, the target by hand, what a network learns."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from support.students import DIFFUSIONS
from support.tiny import CONTEXT_DIM, tiny_pipeline
from torch import Tensor, nn

from latentdiff.diffusion import Diffusion, Network
from latentdiff.guidance import guided_denoiser
from latentdiff.levels import Denoise, NoiseLevel, NoiseLevels
from latentdiff.samplers import ddim, dpmpp_2m
from latentdiff.tasks.distill.config import Distill
from latentdiff.tasks.distill.trajectories import step_errors, trajectory

SHAPE = (4, 3, 2, 2)
DEVIATION = 0.7


def randn(*shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def fit(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)


def spread(level: NoiseLevel) -> Tensor:
    """The deviation of x_t for data of N(0, DEVIATION^2 I)."""
    return fit((level.alpha**2 * DEVIATION**2 + level.sigma**2).sqrt())


def gaussian(x: Tensor, level: NoiseLevel) -> Tensor:
    """The exact estimate of x0 for that data: its ODE keeps x_t over its deviation."""
    return x * fit(level.alpha) * DEVIATION**2 / spread(level) ** 2


def exact_states(noise: Tensor, levels: NoiseLevels) -> Tensor:
    """Where that ODE is at each level, from noise at the first."""
    unit = noise / spread(levels[0])
    return torch.stack([unit * spread(levels[i]) for i in range(len(levels) + 1)])


def exact_student(levels: NoiseLevels) -> Denoise:
    """The estimate from which a step of DDIM's ends where that ODE does."""

    def estimate(x: Tensor, level: NoiseLevel) -> Tensor:
        i = [int((levels.timestep[:-1] == t).nonzero()) for t in level.timestep.reshape(-1)]
        end = levels.alpha[1:][i], levels.sigma[1:][i]
        kept = end[1] / level.sigma
        there = x * spread(NoiseLevel(level.timestep, *end)) / spread(level)
        return (there - fit(kept) * x) / fit(end[0] - level.alpha * kept)

    return estimate


def network_of(diffusion: Diffusion, levels: NoiseLevels, estimate: Denoise) -> Network:
    """The network of a diffusion whose estimate of x0 at these levels is `estimate`."""

    def network(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        i = [int((levels.timestep[:-1] == t).nonzero()) for t in timestep]
        level = NoiseLevel(timestep, levels.alpha[i], levels.sigma[i])
        x0 = estimate(x, level)
        eps = (x - fit(level.alpha) * x0) / fit(level.sigma)
        return diffusion.target(x0, eps, level.alpha, level.sigma)

    return network


def wobbly(x: Tensor, level: NoiseLevel) -> Tensor:
    return torch.tanh(x) * fit(level.alpha) + 0.3 * x.flip(0)


@pytest.mark.parametrize("name", [*DIFFUSIONS, "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 8])
def test_a_students_levels_are_among_its_teachers(name: str, steps: int) -> None:
    diffusion = DIFFUSIONS.get(name) or Diffusion("cosine", "v_prediction")
    own, finer = diffusion.levels(steps), diffusion.levels(24)
    for field in ("timestep", "alpha", "sigma"):
        every = getattr(finer, field)[:: 24 // steps]
        torch.testing.assert_close(getattr(own, field), every, rtol=0, atol=1e-15)


def test_a_student_draws_from_pure_noise_to_data_whatever_its_teachers_levels() -> None:
    sd = Diffusion("scaled_linear", "epsilon", timestep_spacing="leading", set_alpha_to_one=False)
    levels = sd.student(4).levels(4)
    assert levels.timestep.tolist() == [999, 749, 499, 249, -1]
    assert levels.sigma[-1] == 0


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_a_trajectory_is_the_teachers_own(name: str) -> None:
    """It begins at the noise, and its end is the sampler's."""
    levels, noise = DIFFUSIONS[name].levels(12), randn(*SHAPE)
    states = trajectory(wobbly, noise, levels, 4)
    *_, image = dpmpp_2m(wobbly, noise, levels)
    assert states.shape == (5, *SHAPE)
    assert torch.equal(states[0], noise)
    assert torch.equal(states[-1], image)


@pytest.mark.parametrize("name", ["sd", "flow"])
def test_a_trajectory_nears_the_ode_with_the_square_of_its_steps(name: str) -> None:
    diffusion, noise = DIFFUSIONS[name], randn(*SHAPE)
    exact = exact_states(noise, diffusion.levels(4))
    errors = [
        (trajectory(gaussian, noise, diffusion.levels(n), 4) - exact)[1:-1].abs().max()
        for n in (64, 128)
    ]
    assert 3 < float(errors[0] / errors[1]) < 5


@pytest.mark.parametrize("name", DIFFUSIONS)
@pytest.mark.parametrize("steps", [1, 4])
def test_the_exact_student_has_no_error_and_draws_the_teachers_image(name: str, steps: int) -> None:
    diffusion, noise = DIFFUSIONS[name], randn(*SHAPE)
    levels = diffusion.levels(steps)
    student, states = exact_student(levels), exact_states(noise, levels)
    network, context = network_of(diffusion, levels, student), torch.zeros(4, 1, 1)
    assert step_errors(diffusion, network, states, context, levels).max() < 1e-20
    *_, image = ddim(student, noise, levels)
    torch.testing.assert_close(image, states[-1], rtol=0, atol=1e-12)
    plain = network_of(diffusion, levels, gaussian)
    assert step_errors(diffusion, plain, states, context, levels).min() > 1e-4


def test_the_loss_is_the_same_for_every_prediction_type() -> None:
    for schedule, predictions in (
        ("scaled_linear", ("epsilon", "sample", "v_prediction", "score")),
        ("flow", ("flow_prediction", "sample", "v_prediction")),
    ):
        losses = []
        for prediction in predictions:
            diffusion = Diffusion(schedule, prediction)  # pyright: ignore[reportArgumentType]
            levels = diffusion.levels(4)
            states = trajectory(gaussian, randn(*SHAPE), diffusion.levels(8), 4)
            network, context = network_of(diffusion, levels, wobbly), torch.zeros(4, 1, 1)
            losses.append(step_errors(diffusion, network, states, context, levels))
        assert losses[0].min() > 1e-3
        for other in losses[1:]:
            torch.testing.assert_close(other, losses[0], rtol=1e-9, atol=0)


def test_the_target_is_the_guided_teachers_by_hand(tmp_path: Path) -> None:
    """In float64, with every formula of SD's schedule written out, for steps of one teacher's."""
    diffusion = DIFFUSIONS["sd"]
    teacher = tiny_pipeline(tmp_path, diffusion).unet.double()
    student = tiny_pipeline(tmp_path, diffusion, seed=1).unet.double()
    context, null = randn(2, 5, CONTEXT_DIM, seed=3), randn(1, 5, CONTEXT_DIM, seed=4)
    noise, scale, levels = randn(2, 4, 8, 8), 3.5, diffusion.levels(1)
    guided = guided_denoiser(diffusion, teacher, context, null, scale)
    states = trajectory(guided, noise, levels, 1)
    ours = step_errors(diffusion, student, states, context, levels)

    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    bar = (1 - betas).prod()
    a, s = bar.sqrt(), (1 - bar).sqrt()
    for i in range(2):
        x, t = noise[i : i + 1], torch.tensor([999])
        with torch.no_grad():
            with_prompt = teacher(x, t, context[i : i + 1])
            without = teacher(x, t, null)
            image = (x - s * (without + scale * (with_prompt - without))) / a
            by_hand = ((x - s * student(x, t, context[i : i + 1])) / a - image).square().mean()
        assert abs(float(by_hand / ours[0, i].detach()) - 1) < 1e-12


def test_the_gradient_reaches_the_student_alone() -> None:
    diffusion, levels = DIFFUSIONS["flow"], DIFFUSIONS["flow"].levels(2)
    teacher, student = nn.Conv2d(3, 3, 1).double(), nn.Conv2d(3, 3, 1).double()
    states = trajectory(lambda x, level: teacher(x), randn(*SHAPE), diffusion.levels(4), 2)
    assert not states.requires_grad
    context = torch.zeros(4, 1, 1)
    step_errors(diffusion, lambda x, t, c: student(x), states, context, levels).sum().backward()
    assert student.weight.grad is not None
    assert teacher.weight.grad is None


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
    """In one step. Of data near -1 and 1 the teacher's is 0, their mean: an error of 1."""
    diffusion, s = DIFFUSIONS["flow"], 0.1
    draw = torch.Generator().manual_seed(0)
    levels, finer = diffusion.levels(1), diffusion.levels(20)

    def mean(x: Tensor, level: NoiseLevel) -> Tensor:  # of two Gaussians, in closed form
        alpha, sigma = (fit(v).to(x.dtype) for v in level[1:])
        variance = (alpha * s) ** 2 + sigma**2
        centre = torch.tanh(alpha * x / variance)
        return centre + alpha * s**2 / variance * (x - alpha * centre)

    torch.manual_seed(0)
    student, context, steps = SmallNetwork(), torch.zeros(256, 1, 1), 1200
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, 2 * (steps - step) / steps)
        states = trajectory(mean, torch.randn(256, 1, 1, 1, generator=draw), finer, 1)
        step_errors(diffusion, student, states, context, levels).mean().backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    x = torch.randn(1000, 1, 1, 1, generator=draw)
    *_, ends = ddim(mean, x, diffusion.levels(500))
    t, alpha, sigma = levels[0]
    with torch.no_grad():
        drawn = diffusion.to_x0(student(x, t.expand(1000), context), x, alpha, sigma)
    errors = [(one - ends).square().mean().sqrt() for one in (drawn, mean(x, levels[0]))]
    assert errors[1] > 0.9
    assert errors[0] < 0.2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"guidance_scale": 0.5}, "guidance_scale=0.5 must be at least 1"),
        ({"val_fraction": 1}, "val_fraction=1 must be in"),
        ({"distilled_steps": 0}, "distilled_steps=0 must be at least 1"),
        ({"teacher_steps": 0}, "teacher_steps=0 must be at least 1"),
        (
            {"distilled_steps": 3},
            "teacher_steps=20 must be a multiple of distilled_steps=3, such as 21",
        ),
    ],
)
def test_options_out_of_range(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Distill(**options)
