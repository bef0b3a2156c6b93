"""The timesteps at which diffusers' schedulers sample, down to their rounding.

Equal pictures need equal timesteps, and diffusers' schedulers choose them in different ways.
"""

from typing import Literal

import torch
from torch import Tensor

Spacing = Literal["leading", "trailing", "linspace"]
Grid = Literal["ddim", "ddpm", "euler", "dpm"]


def spaced(num_timesteps: int, steps: int, *, spacing: Spacing, offset: int, grid: Grid) -> Tensor:
    """`steps` of the timesteps 0 … T - 1 of a beta schedule, falling, (steps,) float64.

    The spacings are those of Lin et al. 2023 (arXiv:2305.08891), Table 2. The schedulers of the
    "dpm" grid (DPM-Solver, UniPC) take a timestep more and leave out the last, except with
    "trailing"; those of "euler" (Euler, Heun) do not round "linspace". Where an offset leads past
    T - 1 it is reduced: diffusers would run off the end of its table. Raises ValueError for steps
    out of range.
    """
    points = steps + 1 if grid == "dpm" and spacing != "trailing" else steps
    most = num_timesteps - (points - steps)
    check_steps(steps, most)
    if spacing == "trailing":
        stride = num_timesteps - (num_timesteps - num_timesteps / steps)
        return (num_timesteps - torch.arange(steps).double() * stride).round() - 1
    if spacing == "linspace":
        timesteps = linspace(0.0, num_timesteps - 1, points).flip(0)[:steps]
        return timesteps if grid == "euler" else timesteps.round()
    timesteps = (torch.arange(points) * (num_timesteps // points)).flip(0)[:steps]
    return (timesteps + min(offset, num_timesteps - 1 - int(timesteps[0]))).double()


def flow_sigmas(num_timesteps: int, steps: int) -> Tensor:
    """sigmas of DPMSolverMultistepScheduler with `use_flow_sigmas`, without the final 0, (steps,).

    Its timesteps are T sigma, truncated.
    """
    check_steps(steps, num_timesteps)
    return (1 - linspace(1.0, 1 / num_timesteps, steps + 1)).flip(0)[:-1]


def karras(table: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """`steps` values from the last of a rising table of sigma / alpha to its first.

    Karras et al. 2022 (arXiv:2206.00364), eq. 5, rho = 7. Also where they lie in the table, as real
    indices, linear in the logarithm. Raises ValueError for steps out of range.
    """
    check_steps(steps, len(table))
    rho = 7.0
    most, least = table[-1] ** (1 / rho), table[0] ** (1 / rho)
    values = (most + linspace(0.0, 1.0, steps) * (least - most)) ** rho
    logs, log = table.log(), values.log()
    below = (torch.searchsorted(logs, log, right=True) - 1).clamp(0, len(logs) - 2)
    return values, below + ((log - logs[below]) / (logs[below + 1] - logs[below])).clamp(0, 1)


def interpolate(table: Tensor, position: Tensor) -> Tensor:
    """The table's values at real indices, linear between them."""
    below = position.long().clamp(max=len(table) - 2)
    return torch.lerp(table[below], table[below + 1], position - below)


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
