"""The levels of a sampling run: their laws, and diffusers' timesteps, number for number."""

import diffusers
import numpy as np
import pytest
import torch

from latentdiff.diffusion import Diffusion, Schedule

# diffusers hands tensors to numpy in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCHEDULES: list[Schedule] = ["linear", "scaled_linear", "cosine", "flow"]


def diffusion(schedule: Schedule, **options) -> Diffusion:
    return Diffusion(schedule, "flow_prediction", **options)


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_levels_fall_to_data_and_lie_on_the_path(schedule, spacing, karras):
    process = diffusion(schedule, timestep_spacing=spacing)
    levels = process.levels(20, karras=karras)
    assert len(levels) == 20
    assert levels.timestep.shape == levels.alpha.shape == levels.sigma.shape == (21,)
    assert (levels.sigma.diff() < 0).all()
    assert tuple(levels[20]) == (0.0 if schedule == "flow" else -1.0, 1.0, 0.0)
    power = 1 if schedule == "flow" else 2
    torch.testing.assert_close(
        levels.alpha**power + levels.sigma**power, torch.ones(21).double(), atol=1e-14, rtol=0
    )
    if not karras and schedule != "flow":
        alpha, sigma = process.alpha_sigma(levels.timestep + 1)
        torch.testing.assert_close(levels.alpha, alpha, atol=1e-14, rtol=0)
        torch.testing.assert_close(levels.sigma, sigma, atol=1e-12, rtol=0)


def test_all_steps_of_a_beta_schedule_are_the_whole_chain():
    process = Diffusion("linear", "epsilon")
    levels = process.levels(1000)
    t = torch.arange(1000, -1, -1)
    assert torch.equal(levels.timestep, process.timestep(t).float())
    torch.testing.assert_close(levels.alpha, process.alpha_sigma(t)[0])


STEPS = [1, 2, 3, 7, 10, 14, 15, 20, 25, 28, 30, 48, 50, 64, 100, 250, 333, 500, 999, 1000]


@pytest.mark.parametrize("num_timesteps", [1000, 250])
def test_flow_levels_are_those_of_diffusers(num_timesteps):
    theirs = diffusers.DPMSolverMultistepScheduler(
        num_timesteps, prediction_type="flow_prediction", use_flow_sigmas=True
    )
    for steps in range(1, num_timesteps + 1, 3):
        theirs.set_timesteps(steps)
        levels = diffusion("flow", num_timesteps=num_timesteps).levels(steps)
        assert torch.equal(levels.sigma.float(), theirs.sigmas)
        assert torch.equal(levels.timestep[:-1].long(), theirs.timesteps)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    ("grid", "scheduler"),
    [
        ("ddim", diffusers.DDIMScheduler),
        ("ddpm", diffusers.DDPMScheduler),
        ("euler", diffusers.EulerAncestralDiscreteScheduler),
        ("dpm", diffusers.DPMSolverMultistepScheduler),
    ],
)
def test_levels_are_those_of_diffusers(grid, scheduler, spacing, offset):
    theirs = scheduler(timestep_spacing=spacing, steps_offset=offset)
    process = Diffusion("linear", "epsilon", timestep_spacing=spacing, steps_offset=offset)
    for steps in STEPS:
        if steps >= 999 and spacing != "trailing":
            continue  # see test_levels_stay_within_the_schedule
        theirs.set_timesteps(steps)
        levels = process.levels(steps, grid=grid)
        assert torch.equal(levels.timestep[:-1].double(), theirs.timesteps.double())
        if grid in ("euler", "dpm"):
            ratio = (levels.sigma / levels.alpha).float()
            torch.testing.assert_close(ratio, theirs.sigmas, atol=2e-5, rtol=2e-5)


def test_levels_stay_within_the_schedule():
    """diffusers reads past its table's end at 1000 steps with an offset, and has a 62nd of 61."""
    leading = Diffusion("linear", "epsilon", timestep_spacing="leading", steps_offset=1)
    assert leading.levels(1000).timestep[0] == 999
    trailing = Diffusion("linear", "epsilon", timestep_spacing="trailing")
    theirs = diffusers.DDIMScheduler(timestep_spacing="trailing")
    theirs.set_timesteps(61)
    assert theirs.timesteps[-1] == -1
    assert torch.equal(trailing.levels(61).timestep[:-1].long(), theirs.timesteps[:-1])


@pytest.mark.parametrize("word", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_karras_levels_are_those_of_diffusers(word):
    start, end = (0.00085, 0.012) if word == "scaled_linear" else (1e-4, 0.02)
    theirs = diffusers.DPMSolverMultistepScheduler(1000, start, end, word, use_karras_sigmas=True)
    schedule = "cosine" if word == "squaredcos_cap_v2" else word
    for steps in (1, 2, 10, 20, 25, 30, 50):
        theirs.set_timesteps(steps)
        levels = Diffusion(schedule, "epsilon").levels(steps, karras=True)
        ratio = (levels.sigma / levels.alpha).float()
        torch.testing.assert_close(ratio, theirs.sigmas, atol=2e-5, rtol=1e-4)
        # diffusers truncates cosine's timesteps, of which some are whole but for float32 rounding.
        off = 1 if schedule == "cosine" else 0
        assert (levels.timestep[:-1].long() - theirs.timesteps).abs().max() <= off


def test_karras_levels_of_flow_are_eq_5_in_noise_to_signal():
    levels = diffusion("flow").levels(10, karras=True)
    ratio = (levels.sigma / levels.alpha)[:-1]
    np.testing.assert_allclose(ratio[[0, -1]], [999.0, 1 / 999])
    roots = ratio ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(9))
    torch.testing.assert_close(levels.timestep, (1000 * levels.sigma).float())


def test_set_alpha_to_one_chooses_where_ddim_ends():
    process = Diffusion("scaled_linear", "epsilon", set_alpha_to_one=False)
    alpha, sigma = process.alpha_sigma(torch.tensor(1))
    end = process.levels(5)[5]
    assert end.timestep == 0
    torch.testing.assert_close(torch.stack(end[1:]), torch.stack([alpha, sigma]))
    for grid in ("ddpm", "euler", "dpm"):
        assert process.levels(5, grid=grid).sigma[-1] == 0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_steps_out_of_range_are_refused(schedule, steps):
    with pytest.raises(ValueError, match=f"steps={steps} must be from 1 to 1000"):
        diffusion(schedule).levels(steps)


def test_a_grid_that_leaves_a_timestep_out_has_one_step_less():
    with pytest.raises(ValueError, match="steps=1000 must be from 1 to 999"):
        Diffusion("linear", "epsilon", timestep_spacing="leading").levels(1000, grid="dpm")
