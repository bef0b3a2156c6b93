"""Samplers against diffusers' schedulers: the network must see the same inputs at every step."""

from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from toys import network, noise_from, normal

from latentdiff.diffusion import Diffusion, NoiseLevels
from latentdiff.samplers import SAMPLERS, ddim, ddpm, dpmpp_2m, euler_ancestral, find_sampler, heun

# diffusers hands tensors to numpy in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

WORDS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
# Every prediction type on every schedule, and every spacing and offset.
CASES = [
    (schedule, prediction, "trailing", 0)
    for schedule in WORDS
    for prediction in ("epsilon", "sample", "v_prediction")
] + [
    (schedule, prediction, spacing, offset)
    for schedule, prediction in (("linear", "epsilon"), ("scaled_linear", "v_prediction"))
    for spacing, offset in (("leading", 0), ("leading", 1), ("linspace", 0))
]


def our_path(
    diffusion: Diffusion,
    sampler: Callable[..., Iterator[Tensor]],
    x: Tensor,
    levels: NoiseLevels,
    **options: Any,
) -> list[Tensor]:
    inputs = []

    def recorded(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        inputs.append(x)
        return network(x, timestep, context)

    denoise = diffusion.denoiser(recorded, normal(7), None, 1.0)
    samples = list(sampler(denoise, x, levels, **options))
    assert len(samples) == len(levels)
    return [*inputs, samples[-1]]


def their_path(
    scheduler: Any, steps: int, x: Tensor, *, levels: NoiseLevels | None = None, **options: Any
) -> list[Tensor]:
    scheduler.set_timesteps(steps)
    if levels is not None:  # the same levels as theirs, but not rounded to float32
        ratio = levels.sigma / levels.alpha
        if scheduler.order == 2:  # Heun's list holds the inner ones twice
            ratio = torch.cat([ratio[:1], ratio[1:-1].repeat_interleave(2), ratio[-1:]])
        torch.testing.assert_close(scheduler.sigmas, ratio.float(), atol=0, rtol=1e-5)
        scheduler.sigmas = ratio
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    x, inputs = x * scheduler.init_noise_sigma, []
    for timestep in scheduler.timesteps:
        inputs.append(scheduler.scale_model_input(x, timestep))
        output = network(inputs[-1], timestep, normal(7))
        x = scheduler.step(output, timestep, x, **options).prev_sample
    return [*inputs, x]


def processes(
    scheduler: type,
    schedule: str,
    prediction: str,
    spacing: str,
    offset: int,
    *,
    set_alpha_to_one: bool | None = None,
    as_it_comes: bool = False,
    **options: Any,
) -> tuple[Diffusion, Any]:
    """Ours and theirs, with our table of alpha_bar; theirs as it comes is rounded to float32."""
    keywords: dict[str, Any] = {"timestep_spacing": spacing, "steps_offset": offset}
    if set_alpha_to_one is not None:
        keywords["set_alpha_to_one"] = set_alpha_to_one
    diffusion = Diffusion(schedule, prediction, **keywords)
    if scheduler in (diffusers.DDIMScheduler, diffusers.DDPMScheduler):
        keywords["clip_sample"] = False
    start, end = diffusion.beta_start or 1e-4, diffusion.beta_end or 0.02
    keywords["prediction_type"] = prediction
    theirs = scheduler(1000, start, end, WORDS[schedule], **keywords, **options)
    if not as_it_comes:
        table = diffusion.alphas_cumprod
        torch.testing.assert_close(theirs.alphas_cumprod, table.float(), atol=1e-7, rtol=1e-4)
        theirs.alphas_cumprod = table
        if set_alpha_to_one is False:
            theirs.final_alpha_cumprod = table[0]
    return diffusion, theirs


def assert_same_path(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Within 1e-5 of the largest value: what predicts noise badly makes pictures of hundreds."""
    assert len(ours) == len(theirs)
    largest = max(1.0, *(float(x.abs().max()) for x in theirs))
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        difference = float((a - b).abs().max())
        assert difference < 1e-5 * largest, f"step {step}: {difference} of {largest}"


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


@pytest.mark.parametrize("steps", [2, 20])
@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_dpmpp_2m_takes_the_steps_of_diffusers(case, karras, steps):
    diffusion, scheduler = processes(
        diffusers.DPMSolverMultistepScheduler, *case, use_karras_sigmas=karras
    )
    levels = diffusion.levels(steps, grid="dpm", karras=karras)
    theirs = their_path(scheduler, steps, normal(1), levels=levels)
    assert_same_path(our_path(diffusion, dpmpp_2m, normal(1), levels), theirs)


@pytest.mark.parametrize("steps", [10, 20])
def test_dpmpp_2m_that_ends_above_data_takes_the_steps_of_diffusers(steps):
    case = ("scaled_linear", "epsilon", "trailing", 0)
    _, scheduler = processes(
        diffusers.DPMSolverMultistepScheduler, *case, final_sigmas_type="sigma_min"
    )
    diffusion = Diffusion(*case[:2], set_alpha_to_one=False)
    levels = diffusion.levels(steps)
    theirs = their_path(scheduler, steps, normal(1), levels=levels)
    assert_same_path(our_path(diffusion, dpmpp_2m, normal(1), levels), theirs)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("name", "scheduler", "spacing"),
    [
        ("ddpm", diffusers.DDPMScheduler, "leading"),
        ("ddim", diffusers.DDIMScheduler, "leading"),
        ("euler_ancestral", diffusers.EulerAncestralDiscreteScheduler, "linspace"),
        ("heun", diffusers.HeunDiscreteScheduler, "linspace"),
        ("dpmpp_2m", diffusers.DPMSolverMultistepScheduler, "linspace"),
        ("dpmpp_2m_karras", diffusers.DPMSolverMultistepScheduler, "linspace"),
    ],
)
def test_on_stable_diffusions_schedule_diffusers_as_it_comes_agrees(
    name, scheduler, spacing, prediction
):
    """In float32, with its own tables: what a user sees who changes from one to the other."""
    options = {"use_karras_sigmas": True} if name.endswith("_karras") else {}
    diffusion, theirs = processes(
        scheduler, "scaled_linear", prediction, spacing, 1, as_it_comes=True, **options
    )
    sampler, step_options = SAMPLERS[name], {}
    if sampler.takes_noise:
        step_options["generator"] = torch.Generator().manual_seed(5)
    expected = their_path(theirs, 50, normal(1, torch.float32), **step_options)
    levels = sampler.levels(diffusion, 50)
    noise = noise_from(5, torch.float32)
    assert_same_path(our_path(diffusion, sampler, expected[0], levels, noise=noise), expected)


@pytest.mark.parametrize("steps", [1, 2, 10, 20, 50])
@pytest.mark.parametrize("prediction", ["flow_prediction", "sample"])
def test_dpmpp_2m_on_a_flow_takes_the_steps_of_diffusers(prediction, steps):
    diffusion = Diffusion("flow", prediction)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type=prediction, use_flow_sigmas=True
    )
    theirs = their_path(scheduler, steps, normal(1))
    levels = find_sampler("dpmpp_2m").levels(diffusion, steps)
    assert_same_path(our_path(diffusion, dpmpp_2m, normal(1), levels), theirs)


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
