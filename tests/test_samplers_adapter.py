"""diffusers' schedulers as samplers of ours: the same samples as from diffusers' own loop."""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from support.parity import no_warning_logged
from support.schedulers import STEPS
from support.toys import network, noise_from, normal
from test_samplers_parity import BrownianMotion
from torch import Tensor

from latentdiff.diffusion import Diffusion
from latentdiff.formats import scheduler as configuration
from latentdiff.guidance import guided_denoiser
from latentdiff.samplers import find_sampler, pndm
from latentdiff.samplers.adapter import SCHEDULERS

pytestmark = [
    # diffusers hands tensors to numpy in ways that numpy 2 deprecates.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]

ON_FLOWS = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)


EXHAUSTIVE = pytest.mark.exhaustive


def case(name: str, *values: str) -> Any:
    # KDPM2's classes take half a second to be constructed.
    return pytest.param(name, *values, marks=[EXHAUSTIVE] * name.startswith("KDPM2"))


NAMES = [case(name) for name in SCHEDULERS]
CASES = [
    case(name, schedule, prediction)
    for name in SCHEDULERS
    if not name.startswith("FlowMatch")
    for schedule, prediction in (("scaled_linear", "epsilon"), ("linear", "v_prediction"))
] + [
    case(name, "flow", "flow_prediction")
    for name in SCHEDULERS
    if name.startswith("FlowMatch") or name in ON_FLOWS
]


def plain_scheduler(name: str, diffusion: Diffusion, steps: int, **options: Any) -> Any:
    """Of the keywords that a user of diffusers would write for such a model."""
    cls = getattr(diffusers, name)
    known = inspect.signature(cls.__init__).parameters
    flow = diffusion.schedule == "flow"
    keywords = {
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "beta_schedule": diffusion.schedule,
        "prediction_type": diffusion.prediction,
        "timestep_spacing": diffusion.timestep_spacing,
        "steps_offset": diffusion.steps_offset,
        "use_flow_sigmas": flow,
        "set_alpha_to_one": True,
        "clip_sample": False,
        "skip_prk_steps": True,
        "lower_order_final": True,
    }
    if flow:
        keywords = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        keywords["lower_order_final"] = True
    scheduler = cls(**{key: keywords[key] for key in keywords if key in known}, **options)
    scheduler.set_timesteps(steps)
    return scheduler


def plain_loop(scheduler: Any, x: Tensor, start: int = 0) -> Tensor:
    """StableDiffusionPipeline's, and from a later start StableDiffusionImg2ImgPipeline's."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * scheduler.order)
    options = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = torch.Generator().manual_seed(5)
    if isinstance(scheduler, diffusers.DPMSolverSDEScheduler):
        scheduler.noise_sampler = BrownianMotion(noise_from(5))
    for timestep in scheduler.timesteps[start * scheduler.order :]:
        x_t = x
        if hasattr(scheduler, "scale_model_input"):
            x_t = scheduler.scale_model_input(x, timestep)
        output = network(x_t, timestep, normal(7))
        x = scheduler.step(output, timestep, x, **options).prev_sample
    return x


def assert_same(ours: Tensor, theirs: Tensor, within: float = 1e-12) -> None:
    largest = max(1.0, float(theirs.abs().max()))
    assert float((ours - theirs).abs().max()) < within * largest


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("name", "schedule", "prediction"), CASES)
def test_a_scheduler_gives_the_samples_of_its_own_loop(name, schedule, prediction, steps):
    diffusion, sampler = Diffusion(schedule, prediction), find_sampler(name)
    denoise = guided_denoiser(diffusion, network, normal(7), None, 1.0)
    with no_warning_logged():
        levels = sampler.levels(diffusion, steps)
    previews = list(sampler(denoise, normal(1), levels, noise=noise_from(5)))
    assert len(previews) == len(levels) == steps
    scheduler = plain_scheduler(name, diffusion, steps)
    x = normal(1) * getattr(scheduler, "init_noise_sigma", 1.0)
    # The Brownian motion's increments are scaled in float32.
    within = 1e-6 if name == "DPMSolverSDEScheduler" else 1e-12
    assert_same(previews[-1], plain_loop(scheduler, x), within)
    again = list(sampler(denoise, normal(1), levels, noise=noise_from(5)))
    assert all(map(torch.equal, previews, again))  # nothing is remembered from run to run


@EXHAUSTIVE
@pytest.mark.parametrize(("name", "schedule", "prediction"), CASES)
def test_the_last_steps_are_those_of_diffusers_image_to_image(name, schedule, prediction):
    """Noise is added to an image as add_noise does it, in the scheduler's coordinates."""
    diffusion, sampler = Diffusion(schedule, prediction), find_sampler(name)
    levels = sampler.levels(diffusion, 10).last(6)
    alpha, sigma = levels.alpha[0], levels.sigma[0]
    image, eps = normal(3), normal(4)
    denoise = guided_denoiser(diffusion, network, normal(7), None, 1.0)
    previews = list(sampler(denoise, alpha * image + sigma * eps, levels, noise=noise_from(5)))
    assert len(previews) == 6
    if name == "PNDMScheduler":
        # diffusers takes its second step from the wrong level then; ours is `pndm`.
        own = find_sampler("pndm").levels(diffusion, 10).last(6)
        *_, expected = pndm(denoise, alpha * image + sigma * eps, own)
        if prediction == "epsilon":  # diffusers averages v, and `pndm` the noise
            assert_same(previews[-1], expected, within=1e-5)
        return
    scheduler = plain_scheduler(name, diffusion, 10)
    scale = getattr(scheduler, "init_noise_sigma", 1.0)
    x = image * (alpha if scale == 1 else 1) + eps * (sigma if scale == 1 else sigma / alpha)
    within = 1e-6 if name == "DPMSolverSDEScheduler" else 1e-12
    assert_same(previews[-1], plain_loop(scheduler, x, start=4), within)


@pytest.mark.parametrize("name", NAMES)
def test_each_preview_is_the_estimate_of_the_data(name):
    flow = name.startswith("FlowMatch")
    diffusion = Diffusion("flow" if flow else "scaled_linear", "v_prediction")
    point, sampler = normal(4), find_sampler(name)
    levels = sampler.levels(diffusion, 20)
    *previews, sample = sampler(lambda x, level: point, normal(1), levels, noise=noise_from(5))
    assert len(previews) == 19
    assert all(torch.equal(preview, point) for preview in previews)
    # Some classes end a little above data.
    torch.testing.assert_close(sample, point, atol=0.2, rtol=0)


def noise_of_each(seeds: list[int]) -> Callable[[], Tensor]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda: torch.cat([torch.randn(1, 3, 4, 4, generator=g) for g in generators])


@pytest.mark.parametrize("name", NAMES)
def test_noise_is_drawn_from_each_images_own_seed(name):
    """And the module of the scheduler is as it was."""
    flow = name.startswith("FlowMatch")
    diffusion = Diffusion("flow" if flow else "scaled_linear", "v_prediction")
    sampler = find_sampler(name)
    levels = sampler.levels(diffusion, 4)
    module = sys.modules[type(levels.scheduler).__module__]
    before = dict(vars(module))

    def sample(seeds: list[int]) -> Tensor:
        noise = noise_of_each(seeds)
        denoise = guided_denoiser(
            diffusion, lambda x, *_: x.tanh(), torch.zeros(len(seeds)), None, 1.0
        )
        return list(sampler(denoise, noise(), levels, noise=noise))[-1]

    both = sample([3, 8])
    assert torch.equal(both, torch.cat([sample([3]), sample([8])]))
    assert both.dtype == torch.float32
    assert all(vars(module)[key] is value for key, value in before.items())


SPACINGS = [
    ("EulerDiscreteScheduler", "karras", {"use_karras_sigmas": True}),
    ("LMSDiscreteScheduler", "exponential", {"use_exponential_sigmas": True}),
    ("DPMSolverMultistepScheduler", "log_snr", {"use_lu_lambdas": True}),
    ("UniPCMultistepScheduler", "karras", {"use_karras_sigmas": True}),
]


@pytest.mark.parametrize(("name", "spacing", "options"), SPACINGS)
def test_a_spacing_sets_the_schedulers_option(name, spacing, options):
    diffusion, sampler = Diffusion("scaled_linear", "epsilon"), find_sampler(name)
    denoise = guided_denoiser(diffusion, network, normal(7), None, 1.0)
    levels = sampler.levels(diffusion, 8, spacing=spacing)
    *_, sample = sampler(denoise, normal(1), levels, noise=noise_from(5))
    scheduler = plain_scheduler(name, diffusion, 8, **options)
    assert_same(sample, plain_loop(scheduler, normal(1) * scheduler.init_noise_sigma))
    even = sampler.levels(diffusion, 8, spacing="linspace")
    assert not torch.equal(even.sigma, levels.sigma)


@pytest.mark.parametrize("prediction", ["sample", "score", "flow_prediction"])
def test_predictions_that_a_scheduler_has_no_word_for_are_sampled_in_another(prediction):
    """Whatever the network's output is called, the samplers are given x0."""
    diffusion, own = Diffusion("scaled_linear", prediction), find_sampler("ddim")
    denoise = guided_denoiser(diffusion, network, normal(7), None, 1.0)
    levels = find_sampler("DDIMScheduler").levels(diffusion, 10)
    *_, theirs = find_sampler("DDIMScheduler")(denoise, normal(1), levels, noise=noise_from(5))
    *_, ours = own(denoise, normal(1), own.levels(diffusion, 10), noise=noise_from(5))
    assert_same(ours, theirs, within=1e-4)


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "LCMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
def test_zero_terminal_snr_is_passed_on(name):
    diffusion = Diffusion("scaled_linear", "v_prediction", rescale_betas_zero_snr=True)
    levels = find_sampler(name).levels(diffusion, 6)
    assert levels.alpha[0] < 3e-4
    denoise = guided_denoiser(diffusion, network, normal(7), None, 1.0)
    for preview in find_sampler(name)(denoise, normal(1), levels, noise=noise_from(5)):
        assert preview.isfinite().all()


@pytest.mark.parametrize(
    ("name", "diffusion", "steps", "spacing", "message"),
    [
        (
            "DDIMScheduler",
            ("flow", "sample"),
            5,
            None,
            "for beta schedules, and this model is",
        ),
        ("FlowMatchLCMScheduler", ("linear", "sample"), 5, None, "for schedule=flow, not linear"),
        ("PNDMScheduler", None, 5, None, "cannot do with rescale_betas_zero_snr=True"),
        ("DDIMScheduler", ("linear", "sample"), 5, "karras", "level_spacing=karras does not fit"),
        ("LCMScheduler", ("linear", "sample"), 5, "leading", "level_spacing=leading does not fit"),
        ("LCMScheduler", ("linear", "sample"), 51, None, "LCMScheduler cannot take steps=51: "),
        ("DDIMScheduler", ("linear", "sample"), 61, None, "no levels for steps=61 in diffusers"),
        ("DDIMScheduler", ("linear", "sample"), 0, None, "steps=0 must be from 1 to 1000"),
    ],
)
def test_what_a_scheduler_cannot_do_is_refused(name, diffusion, steps, spacing, message):
    zero_snr = Diffusion("linear", "v_prediction", rescale_betas_zero_snr=True)
    process = zero_snr if diffusion is None else Diffusion(*diffusion)
    with pytest.raises(ValueError, match=message):
        find_sampler(name).levels(process, steps, spacing=spacing)


def test_a_scheduler_that_is_none_or_not_for_such_models_is_refused_by_name():
    with pytest.raises(ValueError, match=r"sampler=EulerScheduler is no .* EulerDiscreteSched"):
        find_sampler("EulerScheduler")
    with pytest.raises(ValueError, match=r"sampler=IPNDMScheduler is no scheduler of diffusers"):
        find_sampler("IPNDMScheduler")


def test_a_missing_package_is_named(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "diffusers", None)
        with pytest.raises(ModuleNotFoundError, match=r"sampler=DDIMScheduler .* pip install diff"):
            find_sampler("DDIMScheduler").levels(Diffusion("linear", "epsilon"), 5)
    from diffusers.utils import dummy_torch_and_torchsde_objects as dummies

    monkeypatch.setattr(diffusers, "DPMSolverSDEScheduler", dummies.DPMSolverSDEScheduler)
    with pytest.raises(ModuleNotFoundError, match="DPMSolverSDEScheduler needs torch and torchsde"):
        find_sampler("DPMSolverSDEScheduler").levels(Diffusion("linear", "epsilon"), 5)


def test_all_that_diffusers_calls_compatible_with_stable_diffusion_are_there():
    """And their configurations are read. EDM's is for networks of another kind."""
    compatible = {scheduler.name for scheduler in diffusers.schedulers.KarrasDiffusionSchedulers}
    compatible -= {"EDMEulerScheduler"}
    assert compatible <= set(SCHEDULERS)
    assert compatible <= set(configuration._CLASS_DEFAULTS)
