"""Samplers: functions that turn noise into a sample, given a denoiser and noise levels.

A sampler knows no network, schedule or prompt. Each yields once a step: the estimate of x0 at that
step, to be looked at, and last of all the finished sample. Nothing waits for the device: every
coefficient is computed from the levels, on the CPU.
"""

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, get_args

from torch import Tensor

from latentdiff.diffusion import Diffusion
from latentdiff.formats.timesteps import Grid, Spacing
from latentdiff.levels import Denoise, LevelSpacing, NoiseLevels
from latentdiff.samplers.adapter import find_scheduler
from latentdiff.samplers.multistep import dpmpp_2m, dpmpp_2m_sde, lms, pndm, unipc
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
    """What `find_sampler` gives: how to sample, and at which noise levels."""

    @property
    def shares(self) -> bool:
        """Whether `denoise` is to give the share of a learned variance after x0."""
        ...

    def levels(
        self, diffusion: Diffusion, steps: int, *, spacing: LevelSpacing | None = None
    ) -> NoiseLevels:
        """The noise levels of `steps` steps; ValueError for steps or a spacing that do not fit."""
        ...

    def __call__(
        self, denoise: Denoise, x: Tensor, levels: NoiseLevels, *, noise: Noise
    ) -> Iterator[Tensor]:
        """An item a step: estimates of x0, and last the sample. x is (B, C, H, W), at levels[0].

        noise is called only where noise is added.
        """
        ...


@dataclass(frozen=True)
class BuiltInSampler:
    """A sampler of this package: its function, and whose noise levels it takes in diffusers."""

    function: Callable[..., Iterator[Tensor]]
    grid: Grid
    takes_noise: bool = False
    spacings: tuple[LevelSpacing, ...] = get_args(LevelSpacing)
    flow: bool = True  # whether it can sample from schedule=flow
    shares: bool = False

    def levels(
        self, diffusion: Diffusion, steps: int, *, spacing: LevelSpacing | None = None
    ) -> NoiseLevels:
        """See `Sampler`."""
        name = self.function.__name__
        if diffusion.schedule == "flow" and not self.flow:
            raise ValueError(f"sampler={name} is for beta schedules, not schedule=flow")
        if spacing in get_args(LevelSpacing) and spacing not in self.spacings:
            fitting = ", ".join(self.spacings) or "levels of its own: leave level_spacing out"
            raise ValueError(f"level_spacing={spacing} does not fit sampler={name}, only {fitting}")
        return diffusion.levels(steps, grid=self.grid, spacing=spacing)

    def __call__(
        self, denoise: Denoise, x: Tensor, levels: NoiseLevels, *, noise: Noise
    ) -> Iterator[Tensor]:
        """See `Sampler`."""
        options: dict[str, Any] = {"noise": noise} if self.takes_noise else {}
        if self.shares:
            options["variance"] = "learned"
        return self.function(denoise, x, levels, **options)


SAMPLERS: dict[str, BuiltInSampler] = {
    "ddpm": BuiltInSampler(ddpm, "ddpm", takes_noise=True),
    "ddim": BuiltInSampler(ddim, "ddim"),
    "euler": BuiltInSampler(euler, "euler"),
    "euler_ancestral": BuiltInSampler(euler_ancestral, "euler", takes_noise=True),
    "heun": BuiltInSampler(heun, "euler"),
    "lms": BuiltInSampler(lms, "euler"),
    # Its weights are those of levels evenly spaced in t.
    "pndm": BuiltInSampler(pndm, "ddim", spacings=get_args(Spacing), flow=False),
    "dpmpp_2m": BuiltInSampler(dpmpp_2m, "dpm"),
    "dpmpp_2m_sde": BuiltInSampler(dpmpp_2m_sde, "dpm", takes_noise=True),
    "dpmpp_sde": BuiltInSampler(dpmpp_sde, "sde", takes_noise=True),
    "unipc": BuiltInSampler(unipc, "dpm"),
    # Its networks were distilled at fixed timesteps.
    "lcm": BuiltInSampler(lcm, "lcm", takes_noise=True, spacings=()),
}


def find_sampler(name: str, *, learned_variance: bool = False) -> Sampler:
    """The sampler of that name, of `SAMPLERS` or a scheduler class of diffusers.

    With `learned_variance` ddpm draws with the network's own; the others have no use for it.
    Raises ValueError, with the nearest name, if there is none.
    """
    if name in SAMPLERS:
        sampler = SAMPLERS[name]
        learned = learned_variance and sampler.function is ddpm
        return replace(sampler, shares=True) if learned else sampler
    if name.endswith("Scheduler"):
        return find_scheduler(name)
    nearest = difflib.get_close_matches(name.lower(), SAMPLERS, n=1, cutoff=0)[0]
    raise ValueError(
        f"sampler={name} is unknown; did you mean {nearest}? (known: {', '.join(SAMPLERS)}, "
        "and diffusers' schedulers by their class names)"
    )
