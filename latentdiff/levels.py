"""The noise levels of a sampling run: the noise level and the timestep at which each step begins.

This module chooses them for any `Diffusion`, of which it knows only a table of sigma / alpha. They
are the levels of diffusers' schedulers, down to their rounding: equal images need equal timesteps,
and those schedulers choose them in different ways.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from latentdiff.gaussians import Level

Spacing = Literal["leading", "trailing", "linspace"]

# leading, trailing and linspace space timesteps evenly: see `_spaced`. The others space
# sigma / alpha from the largest of the schedule to the smallest: karras by Karras et al. 2022,
# eq. 5 (diffusers' `use_karras_sigmas`), exponential and log_snr evenly in the logarithm
# (diffusers' `use_exponential_sigmas` and DPM-Solver's `use_lu_lambdas`). The latter two have the
# same levels, but grids with integer timesteps truncate the network's timestep for exponential and
# round it for log_snr. diffusers' Euler, Heun, LMS and DPMSolverSDE take the range from their
# timestep_spacing, which is the whole schedule with linspace, their default.
LevelSpacing = Literal["leading", "trailing", "linspace", "karras", "exponential", "log_snr"]

# The schedulers of diffusers whose timesteps a run has; see `noise_levels`.
Grid = Literal["ddim", "ddpm", "euler", "sde", "dpm", "lcm"]

# sigma / alpha at alpha_bar = 2^-24, as in diffusers. It replaces the infinite ratio of a schedule
# with zero terminal SNR for samplers that compute with the ratio.
LARGEST_RATIO = math.sqrt(2.0**24 - 1)

# The timesteps that LCMs are distilled at (Luo et al. 2023), of which the grid "lcm" takes some.
MOST_DISTILLED_STEPS = 50


class NoiseLevel(NamedTuple):
    """A noise level, x_t = alpha x0 + sigma eps, and the network's timestep there; () or (B,)."""

    timestep: Tensor
    alpha: Tensor
    sigma: Tensor


Denoise = Callable[[Tensor, NoiseLevel], Tensor]  # x_t (B, C, H, W), level -> estimate of x0


@dataclass(frozen=True, eq=False)
class NoiseLevels:
    """The N + 1 noise levels of a sampling run of N steps, noisiest first; the last is data.

    `len` is N; index i from 0 to N gives one level. The tensors stay on the CPU: 0-dimensional ones
    multiply those of any device, and reading one needs no synchronisation.
    """

    timestep: Tensor  # (N + 1,) float32
    alpha: Tensor
    sigma: Tensor  # each (N + 1,) float64
    # Halfway through each step, each (N,), for samplers that evaluate the network there.
    middle: NoiseLevel | None = None

    def __len__(self) -> int:
        return len(self.sigma) - 1

    def __getitem__(self, i: int) -> NoiseLevel:
        return NoiseLevel(self.timestep[i], self.alpha[i], self.sigma[i])

    def network_timesteps(self) -> list[float]:
        """All timesteps at which a sampler may evaluate the network, rising, each once."""
        middles = [] if self.middle is None else self.middle.timestep.tolist()
        # Halfway from pure noise to data is nowhere.
        return sorted({*self.timestep[:-1].tolist(), *filter(math.isfinite, middles)})

    def ends(self) -> tuple[Level, Level]:
        """The levels s and t of each step, which goes from x_t to x_s, each (N,)."""
        return Level(self.alpha[1:], self.sigma[1:]), Level(self.alpha[:-1], self.sigma[:-1])

    def scaling(self) -> Tensor:
        """s(t) of Karras et al. 2022, Table 1: solvers step x / s(t) along sigma / s(t); (N + 1,).

        It is alpha on a variance-preserving path (there x / alpha is data and noise of deviation
        sigma / alpha) and 1 on a flow, where alpha may be 0.
        """
        flow = ((self.alpha + self.sigma - 1).abs() < 1e-12).all()
        return torch.ones_like(self.alpha) if flow else self.alpha

    def halfway(self, i: int) -> NoiseLevel:
        """The level halfway through step i, from 0 to N - 1."""
        assert self.middle is not None, "these levels have no middles: their grid is not sde"
        return NoiseLevel(*(values[i] for values in self.middle))

    def last(self, n: int) -> "NoiseLevels":
        """The levels of the last n steps, n from 1 to N, which image-to-image takes."""
        assert 1 <= n <= len(self), f"{n} of {len(self)} steps"
        last, middle = slice(len(self) - n, None), self.middle
        if middle is not None:
            middle = NoiseLevel(*(values[last] for values in middle))
        return NoiseLevels(self.timestep[last], self.alpha[last], self.sigma[last], middle)


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
    """The levels of a sampling run; `ratios` is the schedule's sigma / alpha by timestep, rising.

    `grid` names the diffusers scheduler whose levels they are: "ddim" (also PNDM), where the run
    ends at alpha_bar_1 instead of data if `set_alpha_to_one` is false, "ddpm", "euler" (also Heun
    and LMS), "sde" (DPMSolverSDE, with a middle), "dpm" (also UniPC) or "lcm". On a flow all grids
    have the levels of DPMSolverMultistepScheduler. `default` is the spacing if `spacing` is None. A
    level between two timesteps has the lower one if `truncates`, else the nearest. Raises
    ValueError for steps out of range and an unknown spacing.
    """
    finite = torch.where(ratios.isinf(), LARGEST_RATIO, ratios)
    if spacing is not None and spacing not in get_args(LevelSpacing):
        allowed = ", ".join(get_args(LevelSpacing))
        raise ValueError(f"level_spacing={spacing} must be one of {allowed}")
    ends_on_data = grid != "ddim" or set_alpha_to_one
    if spacing in ("karras", "exponential", "log_snr"):
        ends_on_data = True  # their last level is the one on which the run would end otherwise
        ratio = _falling(finite, steps, rho=7.0 if spacing == "karras" else math.inf)
        alpha, sigma = _from_ratio(ratio, flow)
        timestep = num_timesteps * sigma if flow else _position(finite, ratio)
        if not flow and grid not in ("euler", "sde"):
            truncates = truncates or spacing == "exponential"
            timestep = timestep.trunc() if truncates else timestep.round()
    elif flow:
        if spacing is not None:
            raise ValueError(
                f"level_spacing={spacing} is for beta schedules; for schedule=flow leave it out, "
                "or choose karras, exponential or log_snr"
            )
        check_steps(steps, num_timesteps)
        sigma = (1 - _linspace(1.0, 1 / num_timesteps, steps + 1)).flip(0)[:-1]
        timestep, alpha = (num_timesteps * sigma).trunc(), 1 - sigma
    else:
        timestep = _spaced(
            num_timesteps, steps, spacing=spacing or default, offset=offset, grid=grid
        )
        # Samplers of these grids work at alpha = 0, since they do not divide by it.
        table = ratios if grid in ("ddim", "ddpm", "lcm") else finite
        alpha, sigma = _from_ratio(_interpolate(table, timestep), flow)
    zero = torch.zeros(1, dtype=torch.float64)
    last = (zero + 1, zero) if ends_on_data else _from_ratio(ratios[:1], flow)
    alpha, sigma = torch.cat([alpha, last[0]]), torch.cat([sigma, last[1]])
    timestep = torch.cat([timestep, zero if flow or not ends_on_data else zero - 1])
    middle = _halfway(finite, alpha, sigma, flow, num_timesteps) if grid == "sde" else None
    return NoiseLevels(timestep.float(), alpha, sigma, middle)


def _halfway(
    ratios: Tensor, alpha: Tensor, sigma: Tensor, flow: bool, num_timesteps: int
) -> NoiseLevel:
    """The levels halfway through each step in the logarithm of sigma / alpha, each (N,)."""
    ratio = sigma / alpha
    ratio = (ratio[:-1] * ratio[1:]).sqrt()
    alpha, sigma = _from_ratio(ratio, flow)
    # The last step ends on data, where the logarithm is -inf: its entry is never read.
    timestep = num_timesteps * sigma if flow else _position(ratios, ratio.clamp(min=1e-10))
    return NoiseLevel(timestep.float(), alpha, sigma)


def _from_ratio(ratio: Tensor, flow: bool) -> tuple[Tensor, Tensor]:
    """alpha and sigma on a flow's path, or a variance-preserving one, from sigma / alpha."""
    if flow:
        return 1 / (1 + ratio), 1 / (1 + 1 / ratio)
    return 1 / (1 + ratio**2).sqrt(), 1 / (1 + ratio**-2).sqrt()


def _spaced(num_timesteps: int, steps: int, *, spacing: Spacing, offset: int, grid: Grid) -> Tensor:
    """The timesteps of a run on a beta schedule, falling, from 0 … T - 1: (steps,) float64.

    The spacings are those of Lin et al. 2023 (arXiv:2305.08891), Table 2. The schedulers of the
    "dpm" grid (DPM-Solver, UniPC) choose one timestep more and leave out the last, except with
    "trailing"; those of "euler" (Euler, Heun, LMS) and "sde" (DPMSolverSDEScheduler) do not round
    "linspace"; those of "lcm" are LCMScheduler's, whatever the spacing. Where an offset leads past
    T - 1 it is reduced: diffusers would run off the end of its table. Raises ValueError for steps
    out of range.
    """
    if grid == "lcm":
        return _distilled(num_timesteps, steps)
    points = steps + 1 if grid == "dpm" and spacing != "trailing" else steps
    most = num_timesteps - (points - steps)
    check_steps(steps, most)
    if spacing == "trailing":
        stride = num_timesteps - (num_timesteps - num_timesteps / steps)
        return (num_timesteps - torch.arange(steps).double() * stride).round() - 1
    if spacing == "linspace":
        timesteps = _linspace(0.0, num_timesteps - 1, points).flip(0)[:steps]
        return timesteps if grid in ("euler", "sde") else timesteps.round()
    timesteps = (torch.arange(points) * (num_timesteps // points)).flip(0)[:steps]
    return (timesteps + min(offset, num_timesteps - 1 - int(timesteps[0]))).double()


def _distilled(num_timesteps: int, steps: int) -> Tensor:
    """`steps` of the timesteps that LCMs are distilled at, falling, (steps,) float64."""
    distilled = min(MOST_DISTILLED_STEPS, num_timesteps)
    check_steps(steps, distilled)
    chosen = torch.arange(steps) * distilled // steps
    return ((distilled - chosen) * (num_timesteps // distilled) - 1).double()


def _falling(table: Tensor, steps: int, *, rho: float) -> Tensor:
    """`steps` values from the last of a rising table of sigma / alpha to its first.

    Even in their rho-th root, Karras et al. 2022 (arXiv:2206.00364), eq. 5, or, if rho is infinite,
    in their logarithm. Raises ValueError for steps out of range.
    """
    check_steps(steps, len(table))
    if math.isinf(rho):
        most, least = table[-1].log(), table[0].log()
        return (most + _linspace(0.0, 1.0, steps) * (least - most)).exp()
    most, least = table[-1] ** (1 / rho), table[0] ** (1 / rho)
    return (most + _linspace(0.0, 1.0, steps) * (least - most)) ** rho


def _position(table: Tensor, values: Tensor) -> Tensor:
    """Real indices of values in a rising table, linear in the logarithm."""
    logs, log = table.log(), values.log()
    below = (torch.searchsorted(logs, log, right=True) - 1).clamp(0, len(logs) - 2)
    return below + ((log - logs[below]) / (logs[below + 1] - logs[below])).clamp(0, 1)


def _interpolate(table: Tensor, position: Tensor) -> Tensor:
    """The table's values at real indices, linear between them; a value may be infinite."""
    below = position.long()
    above = (below + 1).clamp(max=len(table) - 1)
    between = torch.lerp(table[below], table[above], position - below)
    return torch.where(position == below, table[below], between)


def _linspace(start: float, end: float, n: int) -> Tensor:
    """numpy's linspace in float64, from which torch's differs in the last digits."""
    if n == 1:
        return torch.tensor([start], dtype=torch.float64)
    points = torch.arange(n).double() * ((end - start) / (n - 1)) + start
    points[-1] = end
    return points


def check_steps(steps: int, most: int) -> None:
    """Raise ValueError unless 1 <= steps <= most."""
    if not 1 <= steps <= most:
        raise ValueError(f"steps={steps} must be from 1 to {most}")
