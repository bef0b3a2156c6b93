"""Samplers: functions that turn noise into a sample, given a denoiser and noise levels.

A sampler knows no network, schedule or prompt. It yields once per step: the estimate of x0, as a
preview, and in the last step the sample. Every coefficient is computed from the levels,
on the CPU, so no step waits for the device.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, get_args

from torch import Tensor

from latentdiff.diffusion import Diffusion
from latentdiff.levels import Denoise, Grid, LevelSpacing, NoiseLevels, Spacing
from latentdiff.samplers.adapter import find_scheduler
from latentdiff.samplers.multistep import dpmpp_2m, dpmpp_2m_sde, lms, pndm, unipc
from latentdiff.samplers.names import likely_meant
from latentdiff.samplers.single_step import (
    Noise,
    ddim,
    ddpm,
    dpmpp_sde,
    euler,
    euler_ancestral,
    heun,
    lcm,
)

__all__ = [
    "SAMPLERS",
    "BuiltInSampler",
    "Noise",
    "Sampler",
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_sde",
    "euler",
    "euler_ancestral",
    "find_sampler",
    "heun",
    "lcm",
    "lms",
    "pndm",
    "unipc",
]


class Sampler(Protocol):
    """What `find_sampler` returns: it chooses the noise levels of a run, and a call samples."""

    @property
    def takes_v(self) -> bool:
        """Whether `denoise` must give v of a learned variance after x0."""
        ...

    def levels(
        self, diffusion: Diffusion, steps: int, *, spacing: LevelSpacing | None = None
    ) -> NoiseLevels:
        """The noise levels of `steps` steps; ValueError for steps or a spacing that do not fit."""
        ...

    def __call__(
        self, denoise: Denoise, x: Tensor, levels: NoiseLevels, *, noise: Noise
    ) -> Iterator[Tensor]:
        """Yield the estimate of x0 at each step but the last, and then the sample.

        x is (B, C, H, W), at levels[0]. `noise` is called only where noise is added.
        """
        ...


@dataclass(frozen=True)
class BuiltInSampler:
    """A sampler of this package: its function, and the diffusers scheduler whose levels it uses."""

    function: Callable[..., Iterator[Tensor]]
    grid: Grid
    takes_noise: bool = False
    spacings: tuple[LevelSpacing, ...] = get_args(LevelSpacing)
    flow: bool = True  # whether it can sample from schedule=flow
    takes_v: bool = False

    def levels(
        self, diffusion: Diffusion, steps: int, *, spacing: LevelSpacing | None = None
    ) -> NoiseLevels:
        """See `Sampler`."""
        name = self.function.__name__
        if diffusion.schedule == "flow" and not self.flow:
            raise ValueError(
                f"sampler={name} is for beta schedules, and this model is a "
                "flow; choose another, such as ddim or dpmpp_2m"
            )
        if spacing in get_args(LevelSpacing) and spacing not in self.spacings:
            fitting = ", ".join(self.spacings) or "its default: leave level_spacing out"
            raise ValueError(f"level_spacing={spacing} does not fit sampler={name}, only {fitting}")
        return diffusion.levels(steps, grid=self.grid, spacing=spacing)

    def __call__(
        self, denoise: Denoise, x: Tensor, levels: NoiseLevels, *, noise: Noise
    ) -> Iterator[Tensor]:
        """See `Sampler`."""
        options: dict[str, Any] = {"noise": noise} if self.takes_noise else {}
        if self.takes_v:
            options["variance"] = "learned"
        return self.function(denoise, x, levels, **options)


SAMPLERS: dict[str, BuiltInSampler] = {
    "ddpm": BuiltInSampler(ddpm, "ddpm", takes_noise=True),
    "ddim": BuiltInSampler(ddim, "ddim"),
    "euler": BuiltInSampler(euler, "euler"),
    "euler_ancestral": BuiltInSampler(euler_ancestral, "euler", takes_noise=True),
    "heun": BuiltInSampler(heun, "euler"),
    "lms": BuiltInSampler(lms, "euler"),
    # Its Adams-Bashforth weights are for levels evenly spaced in t.
    "pndm": BuiltInSampler(pndm, "ddim", spacings=get_args(Spacing), flow=False),
    "dpmpp_2m": BuiltInSampler(dpmpp_2m, "dpm"),
    "dpmpp_2m_sde": BuiltInSampler(dpmpp_2m_sde, "dpm", takes_noise=True),
    "dpmpp_sde": BuiltInSampler(dpmpp_sde, "sde", takes_noise=True),
    "unipc": BuiltInSampler(unipc, "dpm"),
    # Its networks were distilled at fixed timesteps.
    "lcm": BuiltInSampler(lcm, "lcm", takes_noise=True, spacings=()),
}


def find_sampler(name: str, *, learned_variance: bool = False) -> Sampler:
    """The sampler of that name in `SAMPLERS`, or of that scheduler class of diffusers.

    A1111's and ComfyUI's names are made ours by `names.our_names`, as a `Request` does.

    With `learned_variance` ddpm uses the variance that the network learned; the others ignore it.
    Raises ValueError, with the name that was perhaps meant, if there is none.
    """
    if not isinstance(name, str):
        raise ValueError(f"sampler={name!r} must be a name: {', '.join(SAMPLERS)}")
    if name in SAMPLERS:
        sampler = SAMPLERS[name]
        learned = learned_variance and sampler.function is ddpm
        return replace(sampler, takes_v=True) if learned else sampler
    if name.endswith("Scheduler"):
        return find_scheduler(name)
    meant = likely_meant(name, SAMPLERS)
    asked = "" if meant is None else f"; did you mean {meant}?"
    raise ValueError(
        f"sampler={name} is unknown{asked} (known: {', '.join(SAMPLERS)}, and diffusers' "
        "schedulers by their class names)"
    )
