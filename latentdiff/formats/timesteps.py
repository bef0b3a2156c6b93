"""The timesteps at which diffusers' schedulers sample, down to their rounding.

Equal images need equal timesteps, and diffusers' schedulers choose them in different ways.
"""

import math
from typing import Literal

import torch
from torch import Tensor

Spacing = Literal["leading", "trailing", "linspace"]
Grid = Literal["ddim", "ddpm", "euler", "sde", "dpm", "lcm"]


def spaced(num_timesteps: int, steps: int, *, spacing: Spacing, offset: int, grid: Grid) -> Tensor:
    """`steps` of the timesteps 0 … T - 1 of a beta schedule, falling, (steps,) float64.

    The spacings are those of Lin et al. 2023 (arXiv:2305.08891), Table 2. The schedulers of the
    "dpm" grid (DPM-Solver, UniPC) take a timestep more and leave out the last, except with
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
        timesteps = linspace(0.0, num_timesteps - 1, points).flip(0)[:steps]
        return timesteps if grid in ("euler", "sde") else timesteps.round()
    timesteps = (torch.arange(points) * (num_timesteps // points)).flip(0)[:steps]
    return (timesteps + min(offset, num_timesteps - 1 - int(timesteps[0]))).double()


def _distilled(num_timesteps: int, steps: int) -> Tensor:
    """`steps` of the 50 timesteps that LCMs are distilled at, falling, (steps,) float64."""
    distilled = min(50, num_timesteps)
    check_steps(steps, distilled)
    chosen = torch.arange(steps) * distilled // steps
    return ((distilled - chosen) * (num_timesteps // distilled) - 1).double()


def flow_sigmas(num_timesteps: int, steps: int) -> Tensor:
    """sigmas of DPMSolverMultistepScheduler with `use_flow_sigmas`, without the final 0, (steps,).

    Its timesteps are T sigma, truncated.
    """
    check_steps(steps, num_timesteps)
    return (1 - linspace(1.0, 1 / num_timesteps, steps + 1)).flip(0)[:-1]


def falling(table: Tensor, steps: int, *, rho: float) -> Tensor:
    """`steps` values from the last of a rising table of sigma / alpha to its first.

    Even in their rho-th root, Karras et al. 2022 (arXiv:2206.00364), eq. 5, or, if rho is infinite,
    in their logarithm. Raises ValueError for steps out of range.
    """
    check_steps(steps, len(table))
    if math.isinf(rho):
        most, least = table[-1].log(), table[0].log()
        return (most + linspace(0.0, 1.0, steps) * (least - most)).exp()
    most, least = table[-1] ** (1 / rho), table[0] ** (1 / rho)
    return (most + linspace(0.0, 1.0, steps) * (least - most)) ** rho


def position(table: Tensor, values: Tensor) -> Tensor:
    """Where values lie in a rising table, as real indices, linear in the logarithm."""
    logs, log = table.log(), values.log()
    below = (torch.searchsorted(logs, log, right=True) - 1).clamp(0, len(logs) - 2)
    return below + ((log - logs[below]) / (logs[below + 1] - logs[below])).clamp(0, 1)


def interpolate(table: Tensor, position: Tensor) -> Tensor:
    """The table's values at real indices, linear between them; whole indices may hold infinity."""
    below = position.long()
    above = (below + 1).clamp(max=len(table) - 1)
    between = torch.lerp(table[below], table[above], position - below)
    return torch.where(position == below, table[below], between)


def linspace(start: float, end: float, n: int) -> Tensor:
    """numpy's linspace, whose last digits torch's does not share, in float64."""
    if n == 1:
        return torch.tensor([start], dtype=torch.float64)
    points = torch.arange(n).double() * ((end - start) / (n - 1)) + start
    points[-1] = end
    return points


def check_steps(steps: int, most: int) -> None:
    """Raise ValueError unless 1 <= steps <= most."""
    if not 1 <= steps <= most:
        raise ValueError(f"steps={steps} must be from 1 to {most}")
