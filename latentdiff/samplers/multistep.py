"""Samplers whose steps use the estimates of earlier ones: DPM-Solver++(2M), UniPC, LMS, PNDM.

A step goes from the level t to the less noisy s.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from latentdiff.levels import Denoise, NoiseLevels
from latentdiff.samplers.single_step import Noise


def dpmpp_2m(denoise: Denoise, x: Tensor, levels: NoiseLevels) -> Iterator[Tensor]:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095), Algorithm 2.

    x (B, C, H, W) is N(0, I). Second order with one call a step: the previous step's estimate
    gives the slope. The first step is of first order, and so is the last if it ends on data or if
    there are fewer than 15 (diffusers' `lower_order_final`).
    """
    s, t = levels.ends()
    ratio = s.sigma / t.sigma
    from_x0 = s.alpha - t.alpha * ratio  # alpha_s (1 - exp(-h)), finite where h is not
    slope = from_x0 * _slope(levels, first_order_at_last=len(levels) < 15)
    previous = None
    last = len(levels) - 1
    for i in range(len(levels)):
        x0 = denoise(x, levels[i])
        x = ratio[i] * x + from_x0[i] * x0
        if previous is not None:
            x = x + slope[i] * (x0 - previous)
        previous = x0
        yield x0 if i < last else x


def dpmpp_2m_sde(
    denoise: Denoise, x: Tensor, levels: NoiseLevels, *, noise: Noise
) -> Iterator[Tensor]:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095): `dpmpp_2m` with fresh noise.

    x (B, C, H, W) is N(0, I). x_s = sigma_s / sigma_t e^-h x_t + alpha_s (1 - e^-2h) (x0 + slope)
    + sigma_s sqrt(1 - e^-2h) z, with `dpmpp_2m`'s slope (diffusers' solver_type "midpoint") and its
    steps of first order.
    """
    s, t = levels.ends()
    ratio = s.sigma / t.sigma
    shrink = t.alpha * ratio / s.alpha  # exp(-h)
    from_x, from_x0 = ratio * shrink, s.alpha * (1 - shrink**2)
    slope = from_x0 * _slope(levels, first_order_at_last=len(levels) < 15)
    std = s.sigma * (1 - shrink**2).sqrt()
    previous = None
    last = len(levels) - 1
    for i in range(len(levels)):
        x0 = denoise(x, levels[i])
        x = from_x[i] * x + from_x0[i] * x0
        if previous is not None:
            x = x + slope[i] * (x0 - previous)
        if std[i] > 0:
            x = x + std[i] * noise()
        previous = x0
        yield x0 if i < last else x


def unipc(denoise: Denoise, x: Tensor, levels: NoiseLevels) -> Iterator[Tensor]:
    """UniPC of order 2 with B(h) = e^h - 1 (Zhao et al. 2023, arXiv:2302.04867).

    x (B, C, H, W) is N(0, I). This is diffusers' default configuration ("bh2"). The predictor is
    the step of `dpmpp_2m`; the corrector repeats the step with the estimate at its end, which the
    next step needs anyway, so it takes no further call. The last step is of first order and is not
    corrected.
    """
    s, t = levels.ends()
    ratio = s.sigma / t.sigma
    from_x0 = s.alpha - t.alpha * ratio  # alpha_s (1 - exp(-h)), finite where h is not
    slope = from_x0 * _slope(levels, first_order_at_last=True)
    from_old, from_new = (from_x0 * weight for weight in _corrector(_steps(levels)))
    start = previous = torch.zeros(())
    last = len(levels) - 1
    for i in range(len(levels)):
        x0 = denoise(x, levels[i])
        if i > 0:
            x = start + from_new[i - 1] * (x0 - previous)
        x = start = ratio[i] * x + from_x0[i] * x0
        if 0 < i < last:
            x = start + slope[i] * (x0 - previous)
            start = start + from_old[i] * (x0 - previous)  # of the corrector
        previous = x0
        yield x0 if i < last else x


def lms(denoise: Denoise, x: Tensor, levels: NoiseLevels) -> Iterator[Tensor]:
    """Adams-Bashforth steps of up to fourth order: k-diffusion's sample_lms, LMSDiscreteScheduler.

    x (B, C, H, W) is N(0, I). In y = x / scale and sigma' = sigma / scale (`NoiseLevels.scaling`)
    the ODE is dy/dsigma' = d = (x - scale x0) / sigma. The polynomial through the last slopes d is
    integrated exactly over the step.
    """
    s, t = levels.ends()
    ratio = s.sigma / t.sigma
    from_x0 = s.alpha - t.alpha * ratio
    scale = levels.scaling()
    sigmas = levels.sigma / scale
    slopes: list[Tensor] = []
    last = len(levels) - 1
    for i in range(len(levels)):
        x0 = denoise(x, levels[i])
        if scale[i] > 0:  # else sigmas[i] is infinite, and no polynomial goes through it
            slopes = [*slopes[-3:], (x - scale[i] * x0) / t.sigma[i]]
        if len(slopes) < 2:
            x = ratio[i] * x + from_x0[i] * x0
        else:
            x = scale[i + 1] / scale[i] * x
            nodes = sigmas[i + 1 - len(slopes) : i + 1]
            weights = _integrals(nodes, sigmas[i], sigmas[i + 1])
            for weight, slope in zip(weights, slopes, strict=True):
                x = x + scale[i + 1] * weight * slope
        yield x0 if i < last else x


def pndm(denoise: Denoise, x: Tensor, levels: NoiseLevels) -> Iterator[Tensor]:
    """PLMS, pseudo linear multistep: PNDM (Liu et al. 2022, arXiv:2202.09778), eq. 9 and 12.

    x (B, C, H, W) is N(0, I). As Stable Diffusion 1 ships it (`skip_prk_steps`): DDIM's step
    with the Adams-Bashforth average of the last four noise estimates, for levels evenly spaced in
    t. The first step is taken twice, the second time with the mean of the noise estimates at its
    two ends, so N > 1 steps make N + 1 calls.
    Raises ValueError if alpha is 0 at the first level: there the noise says nothing about x0.
    """
    if levels.alpha[0] == 0:
        raise ValueError("sampler=pndm works with the noise, which says nothing of x0 at alpha=0")
    s, t = levels.ends()
    from_x = s.alpha / t.alpha
    from_eps = s.sigma - t.sigma * from_x
    history: list[Tensor] = []
    last = len(levels) - 1
    for i in range(len(levels)):
        x0 = denoise(x, levels[i])
        eps = (x - t.alpha[i] * x0) / t.sigma[i]
        history = [*history[-3:], eps]
        if i == 0 < last:
            trial = from_x[i] * x + from_eps[i] * eps
            trial_x0 = denoise(trial, levels[1])
            eps = (eps + (trial - t.alpha[1] * trial_x0) / t.sigma[1]) / 2
        elif i > 0:
            *older, newest = _ADAMS_BASHFORTH[len(history)]
            eps = newest * eps
            for weight, old in zip(older, history, strict=False):
                eps = eps + weight * old
        x = from_x[i] * x + from_eps[i] * eps
        yield x0 if i < last else x


# The weights for equal steps, by the number of slopes; the oldest slope first.
_ADAMS_BASHFORTH = {
    2: (-1 / 2, 3 / 2),
    3: (5 / 12, -16 / 12, 23 / 12),
    4: (-9 / 24, 37 / 24, -59 / 24, 55 / 24),
}


def _steps(levels: NoiseLevels) -> Tensor:
    """h, the steps in log(alpha / sigma), (N,); infinite from pure noise and to data."""
    s, t = levels.ends()
    return (s.alpha / s.sigma).log() - (t.alpha / t.sigma).log()


def _slope(levels: NoiseLevels, *, first_order_at_last: bool) -> Tensor:
    """The weight h / (2 h_before) of the last change of x0, (N,); 0 in steps of first order."""
    h = _steps(levels)
    slope = torch.zeros_like(h)
    slope[1:] = torch.where(levels.sigma[2:] > 0, 0.5 * h[1:] / h[:-1], 0.0)
    if first_order_at_last:
        slope[-1] = 0
    return slope


def _corrector(h: Tensor) -> tuple[Tensor, Tensor]:
    """UniC-2's weights of the change of x0 over the step before, and over the step, each (N,).

    UniPC's rho, solved for r_1 = -h_before / h and r_2 = 1; that of order 1 at the first step.
    """
    decay = torch.expm1(-h)
    first = decay / -h - 1
    b1, b2 = first / decay, 2 * (first / -h - 0.5) / decay
    from_old, from_new = torch.zeros_like(h), torch.full_like(h, 0.5)
    growth = h[:-1] / h[1:]
    rho = (b1 - b2)[1:] / (1 + growth)
    from_old[1:], from_new[1:] = rho / growth, b1[1:] - rho
    return from_old, from_new


def _integrals(nodes: Tensor, start: Tensor, end: Tensor) -> list[Tensor]:
    """Integrals, from start to end, of the polynomials that are 1 at one node and 0 at the others.

    By Gauss's rule of two points, which is exact up to the third degree.
    """
    middle, half = (start + end) / 2, (end - start) / 2
    points = middle + half * nodes.new_tensor([-1.0, 1.0]) / 3**0.5
    integrals = []
    for j in range(len(nodes)):
        others = torch.cat([nodes[:j], nodes[j + 1 :]])
        values = ((points[:, None] - others) / (nodes[j] - others)).prod(1)
        integrals.append(half * values.sum())
    return integrals
