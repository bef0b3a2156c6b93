"""Samplers that remember earlier steps against diffusers: the network must see the same inputs."""

import diffusers
import pytest
import torch
from support.schedulers import CASES, STEPS, assert_same_path, our_path, processes, their_path
from support.toys import network, noise_from, normal
from torch import Tensor

from latentdiff.diffusion import Diffusion
from latentdiff.samplers import dpmpp_2m, dpmpp_2m_sde, find_sampler, lms, pndm, unipc

# diffusers hands tensors to numpy in a way that numpy 2 deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_dpmpp_2m_takes_the_steps_of_diffusers(case, karras, steps):
    diffusion, scheduler = processes(
        diffusers.DPMSolverMultistepScheduler, *case, use_karras_sigmas=karras
    )
    levels = diffusion.levels(steps, grid="dpm", spacing="karras" if karras else None)
    theirs = their_path(scheduler, steps, normal(1), levels=levels)
    assert_same_path(our_path(diffusion, dpmpp_2m, normal(1), levels), theirs, within=1e-6)


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


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("case", CASES)
def test_dpmpp_2m_sde_takes_the_steps_of_diffusers(case, steps):
    diffusion, scheduler = processes(
        diffusers.DPMSolverMultistepScheduler, *case, algorithm_type="sde-dpmsolver++"
    )
    levels = diffusion.levels(steps, grid="dpm")
    generator = torch.Generator().manual_seed(5)
    theirs = their_path(scheduler, steps, normal(1), levels=levels, generator=generator)
    noise = noise_from(5, torch.float32)  # drawn in float32 there, whatever x is
    ours = our_path(diffusion, dpmpp_2m_sde, normal(1), levels, noise=noise)
    assert_same_path(ours, theirs, within=1e-6)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("case", CASES)
def test_unipc_takes_the_steps_of_diffusers(case, steps):
    diffusion, scheduler = processes(diffusers.UniPCMultistepScheduler, *case)
    levels = diffusion.levels(steps, grid="dpm")
    theirs = their_path(scheduler, steps, normal(1), levels=levels)
    assert_same_path(our_path(diffusion, unipc, normal(1), levels), theirs, within=1e-13)


@pytest.mark.exhaustive
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("case", CASES)
def test_lms_takes_the_steps_of_diffusers(case, steps):
    diffusion, scheduler = processes(diffusers.LMSDiscreteScheduler, *case)
    levels = diffusion.levels(steps, grid="euler")
    theirs = their_path(scheduler, steps, normal(1), levels=levels)
    assert_same_path(our_path(diffusion, lms, theirs[0], levels), theirs, within=1e-11)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("case", [c for c in CASES if c[1] == "epsilon" and c[2] != "linspace"])
def test_pndm_takes_the_steps_of_diffusers(case, prediction, set_alpha_to_one, steps):
    """In noise, as in the paper.

    diffusers averages the outputs of a v-prediction network and makes noise of them afterwards, at
    the last of their levels.

    With the spacings and numbers of steps that diffusers' DDIM can do.
    """
    _, scheduler = processes(diffusers.PNDMScheduler, *case, set_alpha_to_one=set_alpha_to_one)
    schedule, _, spacing, offset = case
    options = {"set_alpha_to_one": set_alpha_to_one}
    diffusion = Diffusion(
        schedule, prediction, timestep_spacing=spacing, steps_offset=offset, **options
    )
    levels = diffusion.levels(steps)

    def in_noise(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        output = network(x, timestep, context)
        alpha, sigma = diffusion.alpha_sigma(timestep.long() + 1)
        return output if prediction == "epsilon" else alpha * output + sigma * x

    theirs = their_path(scheduler, steps, normal(1), network=in_noise)
    assert_same_path(our_path(diffusion, pndm, normal(1), levels), theirs, within=1e-10)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction", ["flow_prediction", "sample"])
@pytest.mark.parametrize(
    ("sampler", "scheduler", "options", "within"),
    [
        (dpmpp_2m, diffusers.DPMSolverMultistepScheduler, {}, 1e-6),
        (
            dpmpp_2m_sde,
            diffusers.DPMSolverMultistepScheduler,
            {"algorithm_type": "sde-dpmsolver++"},
            1e-6,
        ),
        (unipc, diffusers.UniPCMultistepScheduler, {}, 1e-13),
    ],
)
def test_on_a_flow_the_steps_are_those_of_diffusers(
    sampler, scheduler, options, within, prediction, steps
):
    """UniPCMultistepScheduler on our levels: its own start at 1 - 1e-6."""
    diffusion = Diffusion("flow", prediction)
    levels = diffusion.levels(steps, grid="dpm")
    theirs = scheduler(prediction_type=prediction, use_flow_sigmas=True, **options)
    theirs.set_timesteps(steps)
    theirs.sigmas, theirs.timesteps = levels.sigma, levels.timestep[:-1].long()
    theirs.set_timesteps = lambda steps: None
    draws, draw = {}, {}
    if sampler is dpmpp_2m_sde:
        draws["generator"] = torch.Generator().manual_seed(5)
        draw["noise"] = noise_from(5, torch.float32)
    expected = their_path(theirs, steps, normal(1), **draws)
    ours = our_path(diffusion, sampler, normal(1), levels, **draw)
    assert_same_path(ours, expected, within=within)


@pytest.mark.parametrize("steps", [1, 2, 10, 20, 50])
@pytest.mark.parametrize("prediction", ["flow_prediction", "sample"])
def test_dpmpp_2m_on_a_flow_takes_the_steps_of_diffusers(prediction, steps):
    """As it comes, levels and all."""
    diffusion = Diffusion("flow", prediction)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type=prediction, use_flow_sigmas=True
    )
    theirs = their_path(scheduler, steps, normal(1))
    levels = find_sampler("dpmpp_2m").levels(diffusion, steps)
    assert_same_path(our_path(diffusion, dpmpp_2m, normal(1), levels), theirs)
