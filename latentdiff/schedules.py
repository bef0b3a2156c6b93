"""Noise schedules as betas: beta_t is the variance of the noise that step t adds.

A flow, on which sigma = t / T, has no betas: see `diffusion.Diffusion`.
"""

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

Schedule = Literal["linear", "scaled_linear", "cosine", "flow"]

BETA_RANGES = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}
"""The default beta_1 and beta_T: DDPM's (Ho et al. 2020) and Stable Diffusion's."""


def linear_betas(num_timesteps: int, start: float, end: float) -> Tensor:
    """beta_1 … beta_T, (T,) float64, evenly spaced: DDPM (Ho et al. 2020), section 4."""
    return torch.linspace(start, end, num_timesteps, dtype=torch.float64, device="cpu")


def scaled_linear_betas(num_timesteps: int, start: float, end: float) -> Tensor:
    """beta_1 … beta_T, (T,) float64, whose roots are evenly spaced: Stable Diffusion's."""
    return linear_betas(num_timesteps, start**0.5, end**0.5) ** 2


def cosine_betas(num_timesteps: int) -> Tensor:
    """beta_1 … beta_T, (T,) float64: Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 17.

    As in the paper, no beta is above 0.999.
    """
    n = num_timesteps
    bars = [math.cos((i / n + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(n + 1)]
    betas = [min(1 - after / before, 0.999) for before, after in pairwise(bars)]
    return torch.tensor(betas, dtype=torch.float64, device="cpu")


def zero_snr(betas: Tensor) -> Tensor:
    """Betas stretched so that alpha_bar_T is 0: Lin et al. 2023 (arXiv:2305.08891), Algorithm 1."""
    roots = (1 - betas).cumprod(0).sqrt()
    bars = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2
    return 1 - torch.cat([bars[:1], bars[1:] / bars[:-1]])
