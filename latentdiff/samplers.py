"""Samplers: functions that turn noise into a sample, given a denoiser and noise levels.

A sampler knows no network, schedule or prompt. Each yields once a step: the estimate of x0 at that
step, to be looked at, and last of all the finished sample. Nothing waits for the device: every
coefficient is computed from the levels before the first step.
"""

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from latentdiff.diffusion import (
    Denoise,
    Diffusion,
    Grid,
    NoiseLevels,
    posterior_coefficients,
    transition,
)

Noise = Callable[[], Tensor]  # fresh N(0, I) of x's shape, each call


def ddpm(
    denoise: Denoise,
    x: Tensor,
    levels: NoiseLevels,
    *,
    variance: Literal["small", "large"] = "small",
    noise: Noise,
) -> Iterator[Tensor]:
    """Ancestral sampling: DDPM (Ho et al. 2020, arXiv:2006.11239), Algorithm 2.

    x (B, C, H, W) is N(0, I). Each step draws x_s from N(mean of q(x_s | x_t, x0), variance):
    "small" is the posterior's beta_tilde, right if the data were one point; "large" is beta, right
    if they were N(0, I) (section 3.2 there). Any two levels may follow each other. The last step
    adds no noise.
    """
    if variance not in ("small", "large"):
        raise ValueError(f"variance={variance} must be small or large")
    now, after = _pairs(levels)
    from_x0, from_x, posterior = posterior_coefficients(after, now)
    if variance == "large":
        # Var(x_s | x_t) of unit Gaussian data; the fraction is 1 wherever alpha^2 + sigma^2 = 1.
        forward = transition(after, now)[1]
        posterior = forward * (after[0] ** 2 + after[1] ** 2) / (now[0] ** 2 + now[1] ** 2)
    std = posterior.sqrt()
    last = len(levels) - 1
    for i in range(last):
        x0 = denoise(x, levels[i])
        yield x0
        x = from_x0[i] * x0 + from_x[i] * x + std[i] * noise()
    yield from_x0[last] * denoise(x, levels[last]) + from_x[last] * x


def ddim(
    denoise: Denoise,
    x: Tensor,
    levels: NoiseLevels,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
) -> Iterator[Tensor]:
    """DDIM (Song et al. 2021, arXiv:2010.02502), eq. 12, with its eq. 16 for any two levels.

    x (B, C, H, W) is N(0, I). eta from 0 (deterministic; on `flow` levels, Euler's method) to 1
    (as much noise as `ddpm` with the small variance). Raises ValueError for another eta, and if
    noise is missing where eta needs it.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must be from 0 to 1")
    if eta > 0 and noise is None:
        raise ValueError(f"eta={eta} needs noise")
    now, after = _pairs(levels)
    forward = transition(after, now)[1] / now[1] ** 2
    std = eta * after[1] * forward.sqrt()
    from_eps = after[1] * (1 - eta**2 * forward).clamp(min=0).sqrt()
    last = len(levels) - 1
    for i in range(len(levels)):
        x0 = denoise(x, levels[i])
        if i < last:
            yield x0
        eps = (x - now[0][i] * x0) / now[1][i]
        x = after[0][i] * x0 + from_eps[i] * eps
        if noise is not None and eta > 0:
            x = x + std[i] * noise()
    yield x


def euler_ancestral(
    denoise: Denoise, x: Tensor, levels: NoiseLevels, *, noise: Noise
) -> Iterator[Tensor]:
    """Euler steps past each level and noise to climb back: k-diffusion's sample_euler_ancestral.

    x (B, C, H, W) is N(0, I). In the coordinates y = x / alpha, s = sigma / alpha of Karras et al.
    2022 (arXiv:2206.00364): dy/ds = (y - x0) / s down to s_down, then noise of deviation s_up,
    s_up^2 = s'^2 (s^2 - s'^2) / s^2, s_down^2 = s'^2 - s_up^2 for the next level s'. Multiplied out
    this is `ddpm` with the small variance; what differs in diffusers is the choice of levels. The
    last step adds no noise if it ends on data.
    """
    now, after = _pairs(levels)
    ratio = now[0] * after[1] / (after[0] * now[1])  # s' / s, finite at alpha = 0 too
    down = ratio**2  # s_down / s
    from_x = after[1] * ratio / now[1]  # alpha' s_down / (alpha s)
    from_x0 = after[0] * (1 - down)
    up = after[1] * (1 - down).clamp(min=0).sqrt()
    last = len(levels) - 1
    for i in range(len(levels)):
        x0 = denoise(x, levels[i])
        if i < last:
            yield x0
        x = from_x[i] * x + from_x0[i] * x0 + up[i] * noise()
    yield x


def heun(denoise: Denoise, x: Tensor, levels: NoiseLevels) -> Iterator[Tensor]:
    """Heun's second-order method: Karras et al. 2022 (arXiv:2206.00364), Algorithm 1.

    x (B, C, H, W) is N(0, I). 2N - 1 calls of the denoiser: the last step is Euler's. The slope is
    averaged in the coordinates in which the noise grows evenly: x / alpha and sigma / alpha on
    variance-preserving levels, x and sigma on a flow, where alpha may be 0.
    """
    now, after = _pairs(levels)
    # alpha + sigma = 1 is a flow's mark; it cannot be asked for without waiting for the device.
    flow = (levels.alpha + levels.sigma - 1).abs() < 8 * torch.finfo(levels.sigma.dtype).eps
    scale = torch.where(flow, 1.0, levels.alpha)
    ratio = after[1] / now[1]
    from_x0 = after[0] - now[0] * ratio  # Euler's step, which is DDIM's
    # Averaging the slopes at both ends moves Euler's end by this much times the change of x0.
    change = 0.5 * (now[1] * scale[1:] ** 2 / (scale[:-1] * after[1]) - scale[1:])
    last = len(levels) - 1
    for i in range(len(levels)):
        x0 = denoise(x, levels[i])
        if i < last:
            yield x0
        x = ratio[i] * x + from_x0[i] * x0
        if i < last:
            x = x + change[i] * (denoise(x, levels[i + 1]) - x0)
    yield x


def dpmpp_2m(denoise: Denoise, x: Tensor, levels: NoiseLevels) -> Iterator[Tensor]:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095), Algorithm 2.

    x (B, C, H, W) is N(0, I). Second order with one call a step: the previous step's estimate
    gives the slope. The first step is of first order, and so is the last if it ends on data or if
    there are fewer than 15 (diffusers' `lower_order_final`).
    """
    now, after = _pairs(levels)
    ratio = after[1] / now[1]
    from_x0 = after[0] - now[0] * ratio  # alpha' (1 - exp(-h)), finite where h is not
    h = (after[0] / after[1]).log() - (now[0] / now[1]).log()
    slope = torch.zeros_like(ratio)
    slope[1:] = torch.where(after[1][1:] > 0, 0.5 * from_x0[1:] * h[1:] / h[:-1], 0.0)
    if len(levels) < 15:
        slope[-1] = 0
    previous = None
    last = len(levels) - 1
    for i in range(len(levels)):
        x0 = denoise(x, levels[i])
        if i < last:
            yield x0
        x = ratio[i] * x + from_x0[i] * x0
        if previous is not None:
            x = x + slope[i] * (x0 - previous)
        previous = x0
    yield x


def _pairs(levels: NoiseLevels) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(alpha, sigma) before and after each step, each (N,)."""
    before = levels.alpha[:-1], levels.sigma[:-1]
    return before, (levels.alpha[1:], levels.sigma[1:])


@dataclass(frozen=True)
class Sampler:
    """A sampler by name: the function, and the noise levels that diffusers gives its scheduler."""

    function: Callable[..., Iterator[Tensor]]
    grid: Grid
    karras: bool = False
    takes_noise: bool = False

    def levels(
        self, diffusion: Diffusion, steps: int, *, device: torch.device | str | None = None
    ) -> NoiseLevels:
        """This sampler's levels; ValueError if `steps` is out of range."""
        return diffusion.levels(steps, grid=self.grid, karras=self.karras, device=device)

    def __call__(
        self, denoise: Denoise, x: Tensor, levels: NoiseLevels, *, noise: Noise
    ) -> Iterator[Tensor]:
        """Previews, then the sample. noise is called only by the samplers that add noise."""
        if self.takes_noise:
            return self.function(denoise, x, levels, noise=noise)
        return self.function(denoise, x, levels)


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(ddpm, "ddpm", takes_noise=True),
    "ddim": Sampler(ddim, "ddim"),
    "euler_ancestral": Sampler(euler_ancestral, "euler", takes_noise=True),
    "heun": Sampler(heun, "euler"),
    "dpmpp_2m": Sampler(dpmpp_2m, "dpm"),
    "dpmpp_2m_karras": Sampler(dpmpp_2m, "dpm", karras=True),
}


def find_sampler(name: str) -> Sampler:
    """The sampler of that name; ValueError names the nearest one."""
    if name in SAMPLERS:
        return SAMPLERS[name]
    nearest = difflib.get_close_matches(name.lower(), SAMPLERS, n=1, cutoff=0)[0]
    raise ValueError(
        f"sampler={name} is unknown; did you mean {nearest}? (known: {', '.join(SAMPLERS)})"
    )
