"""diffusers' schedulers as samplers: all that can sample a Stable Diffusion model.

diffusers is imported only inside functions: drawing with our own samplers does not need it.

Schedulers of diffusers for other networks or other training are left out:
EDM*, CosineDPMSolver*, KarrasVe, ScoreSdeVe (other preconditioning or score), CM*, SCM, CogVideoX*,
LTX*, Helios*, MiniMax*, Piflow, FlowMap*, RFD4*, UnCLIP, DDPMWuerstchen (other schedules), IPNDM
(no schedule to configure), Amused, VQDiffusion, EntropyBound, BlockRefinement, DiscreteDDIM
(tokens); so are those for other purposes: *Inverse (to noise), RePaint (inpainting).
"""

import copy
import difflib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from latentdiff.diffusion import Diffusion
from latentdiff.levels import Denoise, LevelSpacing, NoiseLevel, NoiseLevels, check_steps
from latentdiff.samplers.single_step import Noise

SCHEDULERS = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "PNDMScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
)

# The options of a scheduler that describe the diffusion.
_DIFFUSION_OPTIONS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
    "set_alpha_to_one",
    "rescale_betas_zero_snr",
    "clip_sample",
    "use_flow_sigmas",
)
# The options of the solver that are not each class's defaults: PNDM's as Stable Diffusion 1 ships
# it, and the one that DPMSolverSinglestepScheduler would set itself and log.
_SOLVER_OPTIONS = {"skip_prk_steps": True, "lower_order_final": True}

_SPACING_OPTIONS = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "log_snr": "use_lu_lambdas",
}


@dataclass(frozen=True, eq=False, kw_only=True)
class SchedulerLevels(NoiseLevels):
    """The noise levels of a diffusers scheduler, with the scheduler itself."""

    scheduler: Any
    begins: tuple[int, ...]  # (N,) the index in scheduler.timesteps at which each step begins

    def network_timesteps(self) -> list[float]:
        """All timesteps of the scheduler, which may be more than one a step."""
        return sorted(set(self.scheduler.timesteps.float().tolist()))

    def last(self, n: int) -> "SchedulerLevels":
        """The levels of the last n steps, from 1 to N."""
        last = super().last(n)
        return SchedulerLevels(
            timestep=last.timestep,
            alpha=last.alpha,
            sigma=last.sigma,
            scheduler=self.scheduler,
            begins=self.begins[-n:],
        )


@dataclass(frozen=True)
class SchedulerSampler:
    """A scheduler of diffusers by its class name: see `latentdiff.samplers.Sampler`.

    It samples by diffusers' loop of scale_model_input and step, with diffusers' float32 tables.
    `noise` draws the noise that the scheduler adds.
    """

    name: str

    @property
    def takes_v(self) -> bool:
        """Whether `denoise` must give v: no, a scheduler takes x0 alone."""
        return False

    def levels(
        self, diffusion: Diffusion, steps: int, *, spacing: LevelSpacing | None = None
    ) -> SchedulerLevels:
        """The scheduler's levels; a spacing sets its `timestep_spacing` or `use_…_sigmas`.

        Raises ValueError for a diffusion, steps or a spacing that the scheduler does not fit, and
        ModuleNotFoundError where diffusers is not installed.
        """
        check_steps(steps, diffusion.num_timesteps)
        scheduler = self._configured(diffusion, spacing)
        try:
            scheduler.set_timesteps(steps)
        except (ValueError, IndexError) as error:
            raise ValueError(f"sampler={self.name} cannot take steps={steps}: {error}") from error
        timesteps, flow = scheduler.timesteps, diffusion.schedule == "flow"
        begins = list(range(0, len(timesteps), scheduler.order))
        if self.name == "PNDMScheduler":
            begins = [0, *begins[2:]]  # its list has the second timestep twice
        # Some spacings run off the table at some numbers of steps, and diffusers then fails later.
        most = diffusion.num_timesteps - (not flow)
        if len(begins) != steps or timesteps.min() < 0 or timesteps.max() > most:
            raise ValueError(f"sampler={self.name} has no levels for steps={steps} in diffusers")
        if hasattr(scheduler, "sigmas"):
            alpha, sigma = _from_sigma(scheduler.sigmas[begins], flow=flow)
        else:
            alpha, sigma = _from_alpha_bar(scheduler.alphas_cumprod[timesteps[begins]])
        end = torch.tensor([0.0 if flow else -1.0, 1.0, 0.0], dtype=torch.float64)
        return SchedulerLevels(
            timestep=torch.cat([timesteps[begins].double(), end[:1]]).float(),
            alpha=torch.cat([alpha, end[1:2]]),
            sigma=torch.cat([sigma, end[2:]]),
            scheduler=scheduler,
            begins=tuple(begins),
        )

    def __call__(
        self, denoise: Denoise, x: Tensor, levels: NoiseLevels, *, noise: Noise
    ) -> Iterator[Tensor]:
        """See `latentdiff.samplers.Sampler`."""
        assert isinstance(levels, SchedulerLevels), "a scheduler samples at its own levels"
        scheduler = copy.deepcopy(levels.scheduler)  # it remembers its steps
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(levels.begins[0])
        if self.name == "DPMSolverSDEScheduler":
            scheduler.noise_sampler = _brownian_motion(noise)
        step = _step_with(noise, type(scheduler))
        flow = self.name.startswith("FlowMatch") or scheduler.config.get("use_flow_sigmas", False)
        # From x_t to the scheduler's variable, which for Euler and its kin is x / alpha; from
        # pure noise diffusers scales by init_noise_sigma instead.
        scale = getattr(scheduler, "init_noise_sigma", 1.0)
        sample = x * (scale if scale == 1 or levels.begins[0] == 0 else 1 / levels.alpha[0])
        calls = self._calls(levels)
        for i, call in ((i, call) for i, step_calls in enumerate(calls) for call in step_calls):
            timestep, x_t = scheduler.timesteps[call], sample
            if hasattr(scheduler, "scale_model_input"):
                x_t = scheduler.scale_model_input(sample, timestep)
            alpha, sigma = _level(scheduler, timestep, flow=flow)
            x0 = denoise(x_t, NoiseLevel(timestep.float(), alpha, sigma))
            if call == calls[i][0] and i < len(levels) - 1:
                yield x0  # a step may have further calls
            # The network output from which the scheduler computes this x0 again.
            match scheduler.config.get("prediction_type", "flow_prediction"):
                case "epsilon":
                    output = (x_t - alpha * x0) / sigma
                case "v_prediction":
                    output = (alpha * x_t - x0) / sigma
                case _:
                    output = (x_t - x0) / sigma
            sample = step(scheduler, output, timestep, sample).prev_sample.to(x.dtype)
        yield sample

    def _configured(self, diffusion: Diffusion, spacing: LevelSpacing | None) -> Any:
        """The scheduler for this diffusion."""
        scheduler = _class(self.name)
        known = inspect.signature(scheduler.__init__).parameters
        flow = diffusion.schedule == "flow"
        if flow and not (self.name.startswith("FlowMatch") or "use_flow_sigmas" in known):
            raise ValueError(
                f"sampler={self.name} is for beta schedules, and this model is a "
                "flow; choose another, such as ddim or dpmpp_2m"
            )
        if not flow and self.name.startswith("FlowMatch"):
            raise ValueError(f"sampler={self.name} is for schedule=flow, not {diffusion.schedule}")
        if diffusion.rescale_betas_zero_snr and "rescale_betas_zero_snr" not in known:
            raise ValueError(f"sampler={self.name} cannot do with rescale_betas_zero_snr=True")
        full = diffusion.to_scheduler_config()
        config = {key: full[key] for key in _DIFFUSION_OPTIONS if key in full}
        predicts_noise = diffusion.prediction in ("epsilon", "score")
        # v says something about x0 at every level; all of these schedulers read it.
        config["prediction_type"] = "epsilon" if predicts_noise else "v_prediction"
        if flow:
            config["prediction_type"] = "flow_prediction"
        if spacing is not None:
            option = _SPACING_OPTIONS.get(spacing, "timestep_spacing")
            if flow or option not in known or self.name in ("LCMScheduler", "TCDScheduler"):
                raise ValueError(f"level_spacing={spacing} does not fit sampler={self.name}")
            config[option] = True if spacing in _SPACING_OPTIONS else spacing
        config |= _SOLVER_OPTIONS
        return scheduler.from_config({key: config[key] for key in config if key in known})

    def _calls(self, levels: SchedulerLevels) -> list[list[int]]:
        """The indices in scheduler.timesteps at which each step calls the network."""
        ends = [*levels.begins[1:], len(levels.scheduler.timesteps)]
        calls = [list(range(*pair)) for pair in zip(levels.begins, ends, strict=True)]
        if self.name == "PNDMScheduler":
            # Wherever a run begins, its first step is taken twice, to where the second begins.
            calls[0] = list(levels.begins[:2])
        return calls


def find_scheduler(name: str) -> SchedulerSampler:
    """The sampler of that class name; ValueError for one that is unknown or not for such models."""
    if name in SCHEDULERS:
        return SchedulerSampler(name)
    nearest = difflib.get_close_matches(name, SCHEDULERS, n=1, cutoff=0)[0]
    raise ValueError(
        f"sampler={name} is no scheduler of diffusers' that samples such models; did you mean "
        f"{nearest}? (known: {', '.join(SCHEDULERS)})"
    )


def _class(name: str) -> Any:
    """The class of that name; ModuleNotFoundError names the package that it needs."""
    try:
        import diffusers
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        message = f"sampler={name} is diffusers' and needs it: pip install diffusers"
        raise ModuleNotFoundError(message, name="diffusers") from error
    scheduler = getattr(diffusers, name, None)
    if scheduler is None:
        raise ValueError(f"sampler={name} is not in diffusers {diffusers.__version__}")
    # diffusers' placeholder of a class whose packages are not installed lists them.
    if hasattr(scheduler, "_backends"):
        needs = " and ".join(scheduler._backends)
        raise ModuleNotFoundError(f"sampler={name} needs {needs}; one is not installed")
    return scheduler


def _level(scheduler: Any, timestep: Tensor, *, flow: bool) -> tuple[Tensor, Tensor]:
    """alpha and sigma, (), of the network's input at this call."""
    if not hasattr(scheduler, "sigmas"):
        return _from_alpha_bar(scheduler.alphas_cumprod[timestep])
    index = scheduler.begin_index if scheduler.step_index is None else scheduler.step_index
    sigma = scheduler.sigmas[index]
    if not getattr(scheduler, "state_in_first_order", True):  # at the second call of a step
        match type(scheduler).__name__:
            case "KDPM2DiscreteScheduler":
                sigma = scheduler.sigmas_interpol[index]
            case "KDPM2AncestralDiscreteScheduler":
                sigma = scheduler.sigmas_interpol[index - 1]
            case "DPMSolverSDEScheduler":
                sigma = scheduler.mid_point_sigma
    return _from_sigma(sigma, flow=flow)


def _from_sigma(sigma: Tensor, *, flow: bool) -> tuple[Tensor, Tensor]:
    """alpha and sigma from a scheduler's "sigma", which is sigma / alpha except on a flow."""
    sigma = sigma.double()
    if flow:
        return 1 - sigma, sigma
    alpha = 1 / (1 + sigma**2).sqrt()
    return alpha, sigma * alpha


def _from_alpha_bar(alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    alpha_bar = alpha_bar.double()
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def _step_with(noise: Noise, scheduler: type) -> Callable[..., Any]:
    """The class's `step`, with its noise from `noise`.

    Each scheduler's step calls its module's global randn_tensor. Passing it a generator would not
    do, since each image has its own. So `step` runs with a copy of its module's globals in which
    randn_tensor is replaced; the module itself is not touched.
    """
    step: Any = getattr(scheduler, "step")  # noqa: B009 (no type has it)

    def randn_tensor(
        shape: torch.Size, *args: Any, dtype: torch.dtype | None = None, **options: Any
    ) -> Tensor:
        z = noise()
        assert z.shape == shape, f"{scheduler.__name__} draws noise of shape {tuple(shape)}"
        return z.to(dtype)

    names = step.__globals__ | {"randn_tensor": randn_tensor}
    copied = FunctionType(step.__code__, names, step.__name__, step.__defaults__, step.__closure__)
    copied.__kwdefaults__ = step.__kwdefaults__
    return copied


def _brownian_motion(noise: Noise) -> Callable[[Tensor, Tensor], Tensor]:
    """DPMSolverSDEScheduler's noise sampler: increments of a Brownian motion over their deviation.

    It is called twice per step, from r to r_half and from r to r': see `dpmpp_sde`.
    """
    drawn: tuple[Tensor, Tensor, Tensor] | None = None

    def increment(start: Tensor, end: Tensor) -> Tensor:
        nonlocal drawn
        if drawn is None or drawn[0] != start:
            drawn = start, end, noise()
            return drawn[2]
        _, half, z = drawn
        drawn = None
        c_squared = (start - half) / (start - end)
        return c_squared.sqrt() * z + (1 - c_squared).sqrt() * noise()

    return increment
