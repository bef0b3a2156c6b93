"""Samplers against diffusers' schedulers: the network must see the same inputs at every step."""

import math
from collections.abc import Callable

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler
from support.schedulers import CASES, STEPS, assert_same_path, our_path, processes, their_path
from support.toys import network, noise_from, normal
from torch import Tensor

from latentdiff.diffusion import Diffusion
from latentdiff.samplers import SAMPLERS, ddim, ddpm, dpmpp_sde, euler, euler_ancestral, heun, lcm

# diffusers hands tensors to numpy in a way that numpy 2 deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("case", CASES)
def test_ddpm_takes_the_steps_of_diffusers(case, variance):
    diffusion, scheduler = processes(
        diffusers.DDPMScheduler, *case, variance_type=f"fixed_{variance}"
    )
    generator = torch.Generator().manual_seed(5)
    theirs = their_path(scheduler, 10, normal(1), generator=generator)
    levels = diffusion.levels(10, grid="ddpm")
    ours = our_path(diffusion, ddpm, normal(1), levels, variance=variance, noise=noise_from(5))
    if variance == "large" and levels.timestep[-2] > 0:
        # diffusers adds noise to the finished sample unless it comes from timestep 0.
        ours, theirs = ours[:-1], theirs[:-1]
    assert_same_path(ours, theirs)


@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("case", [case for case in CASES if case[2] != "linspace"])
def test_ddim_takes_the_steps_of_diffusers(case, eta, set_alpha_to_one):
    """Not with linspace, nor numbers of steps that do not divide 1000.

    There diffusers' DDIM steps to levels other than those that it then tells the network.
    """
    diffusion, scheduler = processes(
        diffusers.DDIMScheduler, *case, set_alpha_to_one=set_alpha_to_one
    )
    generator = torch.Generator().manual_seed(5)
    theirs = their_path(scheduler, 10, normal(1), eta=eta, generator=generator)
    levels = diffusion.levels(10)
    ours = our_path(diffusion, ddim, normal(1), levels, eta=eta, noise=noise_from(5))
    assert_same_path(ours, theirs)


@pytest.mark.parametrize("steps", [10, 17])
# EulerAncestralDiscreteScheduler does not implement "sample".
@pytest.mark.parametrize("case", [case for case in CASES if case[1] != "sample"])
def test_euler_ancestral_takes_the_steps_of_diffusers(case, steps):
    diffusion, scheduler = processes(diffusers.EulerAncestralDiscreteScheduler, *case)
    levels = diffusion.levels(steps, grid="euler")
    generator = torch.Generator().manual_seed(5)
    theirs = their_path(scheduler, steps, normal(1), levels=levels, generator=generator)
    ours = our_path(diffusion, euler_ancestral, theirs[0], levels, noise=noise_from(5))
    assert_same_path(ours, theirs)


@pytest.mark.parametrize("steps", [10, 17])
@pytest.mark.parametrize("case", CASES)
def test_heun_takes_the_steps_of_diffusers(case, steps):
    diffusion, scheduler = processes(diffusers.HeunDiscreteScheduler, *case)
    levels = diffusion.levels(steps, grid="euler")
    theirs = their_path(scheduler, steps, normal(1), levels=levels)
    assert_same_path(our_path(diffusion, heun, theirs[0], levels), theirs)


@pytest.mark.parametrize("steps", STEPS)
# EulerDiscreteScheduler does not implement "sample" either.
@pytest.mark.parametrize("case", [case for case in CASES if case[1] != "sample"])
def test_euler_takes_the_steps_of_diffusers(case, steps):
    diffusion, scheduler = processes(diffusers.EulerDiscreteScheduler, *case)
    levels = diffusion.levels(steps, grid="euler")
    theirs = their_path(scheduler, steps, normal(1), levels=levels)
    assert_same_path(our_path(diffusion, euler, theirs[0], levels), theirs, within=1e-6)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("case", CASES)
def test_lcm_takes_the_steps_of_diffusers(case, steps):
    diffusion, scheduler = processes(diffusers.LCMScheduler, *case)
    generator = torch.Generator().manual_seed(5)
    theirs = their_path(scheduler, steps, normal(1), generator=generator)
    levels = diffusion.levels(steps, grid="lcm")
    ours = our_path(diffusion, lcm, normal(1), levels, noise=noise_from(5))
    assert_same_path(ours, theirs, within=1e-6)


class BrownianMotion:
    """What DPMSolverSDEScheduler draws from, of the normals that our sampler draws."""

    def __init__(self, noise: Callable[[], Tensor]) -> None:
        self.noise, self.half = noise, None

    def __call__(self, start: Tensor, end: Tensor) -> Tensor:
        if self.half is None:
            self.half = (start - end).sqrt() * self.noise(), end
            return self.half[0] / (start - end).sqrt()
        (increment, half), self.half = self.half, None
        return (increment + (half - end).sqrt() * self.noise()) / (start - end).sqrt()


@pytest.mark.exhaustive
@pytest.mark.parametrize("steps", STEPS)
# DPMSolverSDEScheduler does not implement "sample" either.
@pytest.mark.parametrize(
    ("case", "karras"),
    [(case, False) for case in CASES if case[1] != "sample"]
    # Only so is its range of Karras levels the whole schedule.
    + [(case, True) for case in CASES if case[2] == "linspace"],
)
def test_dpmpp_sde_takes_the_steps_of_diffusers(case, karras, steps):
    if karras and steps == 1:
        return  # with one step it begins at the least noise
    diffusion, scheduler = processes(
        diffusers.DPMSolverSDEScheduler, *case, use_karras_sigmas=karras
    )
    levels = diffusion.levels(steps, grid="sde", spacing="karras" if karras else None)
    noise = BrownianMotion(noise_from(5))
    theirs = their_path(scheduler, steps, normal(1), levels=levels, noise_sampler=noise)
    ours = our_path(diffusion, dpmpp_sde, theirs[0], levels, noise=noise_from(5))
    assert_same_path(ours, theirs, within=1e-6)


@pytest.mark.parametrize("h", [0.1, 1.0, 4.0])
def test_the_noises_of_a_dpmpp_sde_step_have_the_law_of_a_brownian_tree(h):
    """Of two overlapping increments, s to s_half and s to s': their correlation is all of it."""
    n, start = 2**15, torch.tensor(3.0)
    tree = BrownianTreeNoiseSampler(torch.zeros(1, n), 0.01, 4.0, seed=0)
    half, whole = tree(start, start * math.exp(-h / 2)), tree(start, start * math.exp(-h))
    correlation = 1 / math.sqrt(1 + math.exp(-h / 2))
    assert half.square().mean() == pytest.approx(1, abs=5 * math.sqrt(2 / n))
    assert whole.square().mean() == pytest.approx(1, abs=5 * math.sqrt(2 / n))
    assert (half * whole).mean() == pytest.approx(correlation, abs=5 * math.sqrt(2 / n))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("name", "scheduler", "spacing"),
    [
        ("ddpm", diffusers.DDPMScheduler, "leading"),
        ("ddim", diffusers.DDIMScheduler, "leading"),
        ("euler_ancestral", diffusers.EulerAncestralDiscreteScheduler, "linspace"),
        ("heun", diffusers.HeunDiscreteScheduler, "linspace"),
        ("dpmpp_2m", diffusers.DPMSolverMultistepScheduler, "linspace"),
        ("euler", diffusers.EulerDiscreteScheduler, "linspace"),
        ("lms", diffusers.LMSDiscreteScheduler, "linspace"),
        ("unipc", diffusers.UniPCMultistepScheduler, "linspace"),
        ("lcm", diffusers.LCMScheduler, "leading"),
    ],
)
def test_on_stable_diffusions_schedule_diffusers_as_it_comes_agrees(
    name, scheduler, spacing, prediction
):
    """In float32, with its own tables: what a user sees who changes from one to the other."""
    diffusion, theirs = processes(
        scheduler, "scaled_linear", prediction, spacing, 1, as_it_comes=True
    )
    sampler, step_options = SAMPLERS[name], {}
    if sampler.takes_noise:
        step_options["generator"] = torch.Generator().manual_seed(5)
    expected = their_path(theirs, 50, normal(1, torch.float32), **step_options)
    levels = sampler.levels(diffusion, 50)
    noise = noise_from(5, torch.float32)
    assert_same_path(our_path(diffusion, sampler, expected[0], levels, noise=noise), expected)


@pytest.mark.parametrize("steps", [10, 50])
def test_ddim_on_a_flow_takes_the_steps_of_diffusers(steps):
    """Euler's method on the flow's ODE, as FlowMatchEulerDiscreteScheduler has it."""
    diffusion = Diffusion("flow", "flow_prediction")
    levels = diffusion.levels(steps)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=levels.sigma[:-1].tolist())
    x, theirs = normal(1), []
    for i, timestep in enumerate(scheduler.timesteps):
        theirs.append(x)
        output = network(x, levels.timestep[i], normal(7))
        x = scheduler.step(output, timestep, x).prev_sample
    assert_same_path(our_path(diffusion, ddim, normal(1), levels), [*theirs, x])


@pytest.mark.parametrize("steps", [2, 10, 50])
def test_heun_on_a_flow_takes_the_steps_of_diffusers(steps):
    """FlowMatchHeunDiscreteScheduler, which is Heun's method in x and sigma."""
    diffusion = Diffusion("flow", "flow_prediction")
    levels = diffusion.levels(steps)
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(steps)
    inner = levels.sigma[1:-1].repeat_interleave(2)
    scheduler.sigmas = torch.cat([levels.sigma[:1], inner, levels.sigma[-1:]])
    told = torch.cat([levels.timestep[:1], levels.timestep[1:-1].repeat_interleave(2)])
    x, theirs = normal(1), []
    for mine, timestep in zip(told, scheduler.timesteps, strict=True):
        theirs.append(x)
        x = scheduler.step(network(x, mine, normal(7)), timestep, x).prev_sample
    assert_same_path(our_path(diffusion, heun, normal(1), levels), [*theirs, x])
