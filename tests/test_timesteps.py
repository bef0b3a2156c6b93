"""The levels of a sampling run: their laws, and diffusers' timesteps, number for number."""

import diffusers
import numpy as np
import pytest
import torch

from latentdiff.diffusion import Diffusion
from latentdiff.schedules import Schedule

# diffusers hands tensors to numpy in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCHEDULES: list[Schedule] = ["linear", "scaled_linear", "cosine", "flow"]


def diffusion(schedule: Schedule, **options) -> Diffusion:
    return Diffusion(schedule, "flow_prediction", **options)


@pytest.mark.parametrize("ratio", [None, "karras", "exponential", "log_snr"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_levels_fall_to_data_and_lie_on_the_path(schedule, spacing, ratio):
    process = diffusion(schedule, timestep_spacing=spacing)
    levels = process.levels(20, spacing=ratio)
    assert len(levels) == 20
    assert levels.timestep.shape == levels.alpha.shape == levels.sigma.shape == (21,)
    assert (levels.sigma.diff() < 0).all()
    assert tuple(levels[20]) == (0.0 if schedule == "flow" else -1.0, 1.0, 0.0)
    power = 1 if schedule == "flow" else 2
    torch.testing.assert_close(
        levels.alpha**power + levels.sigma**power, torch.ones(21).double(), atol=1e-14, rtol=0
    )
    if ratio is None and schedule != "flow":
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


# Where diffusers has each spacing. Euler's kind spaces the range of the timesteps that it would
# take otherwise: with linspace, its default, and more than one step that is the whole schedule.
OPTIONS = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "log_snr": "use_lu_lambdas",
}
SPACED = [
    (grid, scheduler, spacing)
    for grid, scheduler, spacings in (
        ("euler", diffusers.EulerDiscreteScheduler, ("karras", "exponential")),
        ("euler", diffusers.HeunDiscreteScheduler, ("karras", "exponential")),
        ("euler", diffusers.LMSDiscreteScheduler, ("karras", "exponential")),
        ("sde", diffusers.DPMSolverSDEScheduler, ("karras", "exponential")),
        ("dpm", diffusers.DPMSolverMultistepScheduler, ("karras", "exponential", "log_snr")),
        ("dpm", diffusers.DPMSolverSinglestepScheduler, ("karras", "exponential")),
        ("dpm", diffusers.UniPCMultistepScheduler, ("karras", "exponential")),
    )
    for spacing in spacings
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("word", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize(("grid", "scheduler", "spacing"), SPACED)
def test_spaced_levels_are_those_of_diffusers(grid, scheduler, spacing, word):
    start, end = (0.00085, 0.012) if word == "scaled_linear" else (1e-4, 0.02)
    final = {"lower_order_final": True} if "Singlestep" in scheduler.__name__ else {}
    theirs = scheduler(1000, start, end, word, **{OPTIONS[spacing]: True}, **final)
    schedule = "cosine" if word == "squaredcos_cap_v2" else word
    for steps in (1, 2, 10, 20, 25, 30, 50)[grid != "dpm" :]:
        theirs.set_timesteps(steps)
        levels = Diffusion(schedule, "epsilon").levels(steps, grid=grid, spacing=spacing)
        # Heun's and DPMSolverSDE's lists hold the inner levels twice, the latter the middles too.
        sigmas = torch.cat([theirs.sigmas[: -1 : theirs.order], theirs.sigmas[-1:]])
        ratio = (levels.sigma / levels.alpha).float()
        torch.testing.assert_close(ratio, sigmas, atol=2e-5, rtol=3e-4)
        told = theirs.timesteps[:: theirs.order].double()
        # Some are whole, or halfway between, but for float32 rounding: the next is told then.
        off = 1 if grid == "dpm" else 0.1
        assert (levels.timestep[:-1].double() - told).abs().max() <= off
        if grid == "sde":
            assert levels.middle is not None
            middle = theirs.timesteps[1::2].double()
            torch.testing.assert_close(
                levels.middle.timestep[:-1].double(), middle, atol=0.1, rtol=0
            )


def test_middle_levels_lie_halfway_in_log_snr():
    for schedule in SCHEDULES:
        levels = diffusion(schedule).levels(9, grid="sde")
        log_snr = (levels.alpha / levels.sigma).log()[:-1]
        for i in range(8):
            timestep, alpha, sigma = levels.halfway(i)
            torch.testing.assert_close((alpha / sigma).log(), (log_snr[i] + log_snr[i + 1]) / 2)
            assert levels.timestep[i + 1] < timestep < levels.timestep[i]


@pytest.mark.parametrize("grid", ["ddim", "sde"])
def test_the_last_levels_are_the_end_of_the_run(grid):
    levels = diffusion("scaled_linear").levels(9, grid=grid)
    for n in (1, 4, 9):
        last = levels.last(n)
        assert len(last) == n
        for i in range(n + 1):
            assert last[i] == levels[9 - n + i]
        if grid == "sde":
            assert [last.halfway(i) for i in range(n)] == [
                levels.halfway(9 - n + i) for i in range(n)
            ]


def test_levels_are_on_the_cpu_in_float64_whatever_the_default_device():
    with torch.device("meta"):
        levels = diffusion("cosine").levels(3, grid="sde")
    for values in (levels.alpha, levels.sigma, *levels.halfway(0)[1:]):
        assert (values.device.type, values.dtype) == ("cpu", torch.float64)
    assert levels.timestep.dtype == torch.float32


@pytest.mark.parametrize("num_timesteps", [1000, 2049])
def test_lcm_levels_are_those_of_diffusers(num_timesteps):
    theirs = diffusers.LCMScheduler(num_timesteps)
    for steps in range(1, 51):
        theirs.set_timesteps(steps)
        levels = diffusion("scaled_linear", num_timesteps=num_timesteps).levels(steps, grid="lcm")
        assert torch.equal(levels.timestep[:-1].long(), theirs.timesteps)
    with pytest.raises(ValueError, match="steps=51 must be from 1 to 50"):
        diffusion("linear").levels(51, grid="lcm")


@pytest.mark.parametrize("word", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize(
    ("grid", "scheduler"),
    [
        ("euler", diffusers.EulerDiscreteScheduler),
        ("euler", diffusers.EulerAncestralDiscreteScheduler),
        ("dpm", diffusers.DPMSolverMultistepScheduler),
        ("dpm", diffusers.UniPCMultistepScheduler),
    ],
)
def test_levels_of_zero_terminal_snr_are_those_of_diffusers(grid, scheduler, word):
    start, end = (0.00085, 0.012) if word == "scaled_linear" else (1e-4, 0.02)
    keywords = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    theirs = scheduler(1000, start, end, word, **keywords)
    schedule = "cosine" if word == "squaredcos_cap_v2" else word
    process = diffusion(schedule, rescale_betas_zero_snr=True)
    for steps in (1, 2, 20, 50):
        theirs.set_timesteps(steps)
        levels = process.levels(steps, grid=grid)
        assert torch.equal(levels.timestep[:-1].double(), theirs.timesteps.double())
        ratio = (levels.sigma / levels.alpha).float()
        torch.testing.assert_close(ratio[0], torch.tensor(4096.0), atol=0.01, rtol=0)
        # alpha_bar is the square of small differences of float32 numbers there.
        torch.testing.assert_close(ratio, theirs.sigmas, atol=2e-5, rtol=1e-3)
    for spacing in OPTIONS:
        ratio = (lambda levels: levels.sigma / levels.alpha)(process.levels(9, spacing=spacing))
        torch.testing.assert_close(ratio[0], torch.tensor(4096.0).double(), atol=0.01, rtol=0)


@pytest.mark.parametrize("grid", ["ddim", "ddpm", "lcm"])
def test_zero_terminal_snr_starts_in_pure_noise_where_a_sampler_can(grid):
    process = diffusion("scaled_linear", rescale_betas_zero_snr=True)
    levels = process.levels(10, grid=grid)
    assert levels[0] == (999, 0, 1)
    bars = diffusers.DDIMScheduler(
        1000, 0.00085, 0.012, "scaled_linear", rescale_betas_zero_snr=True
    ).alphas_cumprod[levels.timestep[:-1].long()]
    torch.testing.assert_close(levels.alpha[:-1].float() ** 2, bars, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(levels.sigma[:-1].float() ** 2, 1 - bars, atol=1e-6, rtol=1e-4)


def test_karras_levels_of_flow_are_eq_5_in_noise_to_signal():
    levels = diffusion("flow").levels(10, spacing="karras")
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


@pytest.mark.parametrize(
    ("schedule", "spacing", "message"),
    [
        ("linear", "beta", "level_spacing=beta must be one of leading, trailing, linspace, karras"),
        ("flow", "leading", "level_spacing=leading is for beta schedules; for schedule=flow leave"),
    ],
)
def test_spacings_that_do_not_exist_are_refused(schedule, spacing, message):
    with pytest.raises(ValueError, match=message):
        diffusion(schedule).levels(5, spacing=spacing)


def test_a_spacing_replaces_the_diffusions_own():
    for spacing in ("leading", "trailing", "linspace"):
        other = diffusion("linear", timestep_spacing=spacing).levels(7)
        assert torch.equal(diffusion("linear").levels(7, spacing=spacing).alpha, other.alpha)
