"""The noise levels of a sampling run: how noisy each step's input is, and what the network is told.

Which levels there are is chosen here, for any `Diffusion`, of which this module knows only a table.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from latentdiff.formats import timesteps
from latentdiff.formats.timesteps import Grid, Spacing

# leading, trailing and linspace space timesteps evenly: see `formats.timesteps.spaced`. The others
# space sigma / alpha from the schedule's most to its least: karras by Karras et al. 2022, eq. 5
# (diffusers' `use_karras_sigmas`), exponential and log_snr evenly in the logarithm. These are
# diffusers' `use_exponential_sigmas` and DPM-Solver's `use_lu_lambdas`: the same levels, but for
# the timestep told, which "dpm" grids truncate with the one and round with the other. diffusers'
# Euler, Heun, LMS and DPMSolverSDE take the range from their own timestep_spacing, which is the
# whole schedule with linspace, their default.
LevelSpacing = Literal["leading", "trailing", "linspace", "karras", "exponential", "log_snr"]

# sigma / alpha where zero terminal SNR would make it infinite and a sampler cannot have that: of
# alpha_bar = 2^-24, as in diffusers.
LARGEST_RATIO = math.sqrt(2.0**24 - 1)


class NoiseLevel(NamedTuple):
    """A noise level, x_t = alpha x0 + sigma eps, and what the network is told of it; () or (B,)."""

    timestep: Tensor
    alpha: Tensor
    sigma: Tensor


Denoise = Callable[[Tensor, NoiseLevel], Tensor]  # x_t (B, C, H, W), level -> estimate of x0


@dataclass(frozen=True, eq=False)
class NoiseLevels:
    """The N + 1 noise levels of a sampling run of N steps, noisiest first; the last is data.

    `len` is N; index i from 0 to N gives one level. They stay on the CPU: its 0-dimensional tensors
    multiply those of any device, and reading one back waits for nobody.
    """

    timestep: Tensor  # (N + 1,) float32
    alpha: Tensor
    sigma: Tensor  # each (N + 1,) float64
    # Halfway through each step, each (N,), for samplers that call the network there.
    middle: NoiseLevel | None = None

    def __len__(self) -> int:
        return len(self.sigma) - 1

    def __getitem__(self, i: int) -> NoiseLevel:
        return NoiseLevel(self.timestep[i], self.alpha[i], self.sigma[i])

    def pairs(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(alpha, sigma) before and after each step, each (N,)."""
        return (self.alpha[:-1], self.sigma[:-1]), (self.alpha[1:], self.sigma[1:])

    def straight_scale(self) -> Tensor:
        """The coordinates, x / scale, in which solvers step along sigma / scale; (N + 1,).

        scale is alpha on a variance-preserving path (Karras et al. 2022: there x / alpha is data
        and noise of deviation sigma / alpha) and 1 on a flow, where alpha may be 0.
        """
        flow = ((self.alpha + self.sigma - 1).abs() < 1e-12).all()
        return torch.ones_like(self.alpha) if flow else self.alpha

    def halfway(self, i: int) -> NoiseLevel:
        """The level halfway through step i, from 0 to N - 1."""
        assert self.middle is not None, "these levels were not made for a sampler that calls there"
        return NoiseLevel(*(values[i] for values in self.middle))

    def last(self, n: int) -> "NoiseLevels":
        """The last n steps, from 1 to N, as a run of their own: how image-to-image begins."""
        assert 1 <= n <= len(self), f"{n} of {len(self)} steps"
        here, middle = slice(len(self) - n, None), self.middle
        if middle is not None:
            middle = NoiseLevel(*(values[here] for values in middle))
        return NoiseLevels(self.timestep[here], self.alpha[here], self.sigma[here], middle)


def noise_levels(
    ratios: Tensor,
    steps: int,
    *,
    flow: bool,
    num_timesteps: int,
    grid: Grid,
    spacing: LevelSpacing | None,
    default: Spacing,
    offset: int,
    set_alpha_to_one: bool,
    truncates: bool,
) -> NoiseLevels:
    """The levels of a `Diffusion`, whose sigma / alpha at its timesteps, rising, are `ratios`.

    `grid` says whose levels, of diffusers' schedulers: "ddim" (PNDM's too), where the last is
    alpha_bar_1 instead of data if `set_alpha_to_one` is false, "ddpm", "euler" (Heun's and LMS's
    too), "sde" (DPMSolverSDE's, with a middle), "dpm" (UniPC's too) or "lcm". A flow has but one,
    DPMSolverMultistepScheduler's. `default` is the spacing if there is none, and `truncates` says
    whether a network is told the lower of two timesteps between which a level lies, or the nearest.
    Raises ValueError for steps out of range and a spacing that does not exist.
    """
    finite = torch.where(ratios.isinf(), LARGEST_RATIO, ratios)
    if spacing is not None and spacing not in get_args(LevelSpacing):
        allowed = ", ".join(get_args(LevelSpacing))
        raise ValueError(f"level_spacing={spacing} must be one of {allowed}")
    ends_on_data = grid != "ddim" or set_alpha_to_one
    if spacing in ("karras", "exponential", "log_snr"):
        ends_on_data = True  # their last level is the one on which the run would end otherwise
        ratio = timesteps.falling(finite, steps, rho=7.0 if spacing == "karras" else math.inf)
        alpha, sigma = _from_ratio(ratio, flow)
        timestep = num_timesteps * sigma if flow else timesteps.position(finite, ratio)
        if not flow and grid not in ("euler", "sde"):
            truncates = truncates or spacing == "exponential"
            timestep = timestep.trunc() if truncates else timestep.round()
    elif flow:
        if spacing is not None:
            raise ValueError(
                f"level_spacing={spacing} is for beta schedules; for schedule=flow leave it out, "
                "or choose karras, exponential or log_snr"
            )
        sigma = timesteps.flow_sigmas(num_timesteps, steps)
        timestep, alpha = (num_timesteps * sigma).trunc(), 1 - sigma
    else:
        timestep = timesteps.spaced(
            num_timesteps, steps, spacing=spacing or default, offset=offset, grid=grid
        )
        # Only these compute with alpha alone, which may be 0, and not with sigma / alpha.
        table = ratios if grid in ("ddim", "ddpm", "lcm") else finite
        alpha, sigma = _from_ratio(timesteps.interpolate(table, timestep), flow)
    end = torch.zeros(1, dtype=torch.float64)
    last = _from_ratio(end if ends_on_data else ratios[:1], flow)
    alpha, sigma = torch.cat([alpha, last[0]]), torch.cat([sigma, last[1]])
    timestep = torch.cat([timestep, end if flow or not ends_on_data else end - 1])
    middle = _halfway(finite, alpha, sigma, flow, num_timesteps) if grid == "sde" else None
    return NoiseLevels(timestep.float(), alpha, sigma, middle)


def _halfway(
    ratios: Tensor, alpha: Tensor, sigma: Tensor, flow: bool, num_timesteps: int
) -> NoiseLevel:
    """The levels halfway through each step in the logarithm of sigma / alpha, each (N,)."""
    ratio = sigma / alpha
    ratio = (ratio[:-1] * ratio[1:]).sqrt()
    alpha, sigma = _from_ratio(ratio, flow)
    # The last step ends on data and has no such level: 0 there, and never asked for.
    told = num_timesteps * sigma if flow else timesteps.position(ratios, ratio.clamp(min=1e-10))
    return NoiseLevel(told.float(), alpha, sigma)


def _from_ratio(ratio: Tensor, flow: bool) -> tuple[Tensor, Tensor]:
    """alpha and sigma on a flow's path, or a variance-preserving one, from sigma / alpha."""
    if flow:
        return 1 / (1 + ratio), 1 / (1 + 1 / ratio)
    return 1 / (1 + ratio**2).sqrt(), 1 / (1 + ratio**-2).sqrt()
