"""How probable a diffusion model finds data: its bound term by term, and its probability flow.

DDPM (Ho et al. 2020, arXiv:2006.11239), eq. 5:

    -log p(x0) <= KL(q(x_T | x0) || p(x_T))                              prior
                + sum over t > 1 of KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t))   denoising
                - log p(x0 | x_1)                                        reconstruction

each in expectation over the noise. Everything is in nats; `bits_per_dim` converts.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from latentdiff.diffusion import posterior_coefficients, transition
from latentdiff.levels import Denoise, NoiseLevel, NoiseLevels

Fraction = Callable[[Tensor, NoiseLevel], Tensor]
Variance = Literal["small", "large"] | Fraction
"""Of p(x_{t-1} | x_t): beta_tilde, beta, or a share in [0, 1] of the way from the one to the other,
in logarithms, of x_t's shape, which is how a network learns it (Nichol & Dhariwal 2021, eq. 15)."""


def bound_terms(
    denoise: Denoise,
    x0: Tensor,
    levels: NoiseLevels,
    *,
    variance: Variance = "small",
    bins: int | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """One draw of every term of the bound on -log p(x0), in nats.

    x0 is (B, …). `levels` is the chain, noisiest first, such as `diffusion.levels(T)` for all of a
    beta schedule: N steps. Gives `prior` (B,), `denoising` (B, N - 1) from the noisiest on, and
    `reconstruction` (B,). With `bins`, x0 is pixels in [-1, 1] of so many values (256 for 8 bits)
    and the reconstruction their probability (DDPM, eq. 13), else the density of real numbers.
    Its variance in the last step, where beta_tilde is 0, is the step before's (Nichol & Dhariwal).
    Raises ValueError for another variance and for fewer than two steps.
    """
    if not callable(variance) and variance not in ("small", "large"):
        raise ValueError(f"variance={variance!r} must be small, large or a function")
    steps = len(levels)
    if steps < 2:
        raise ValueError(f"levels has {steps} steps and must have 2 or more")
    now, after = levels.pairs()
    from_x0, _, small = posterior_coefficients(after, now)
    forward = transition(after, now)[1]
    # Var(x_s | x_t) of unit Gaussian data; the fraction is 1 wherever alpha^2 + sigma^2 = 1.
    large = forward * (after[0] ** 2 + after[1] ** 2) / (now[0] ** 2 + now[1] ** 2)
    small = torch.cat([small[:-1], small[-2:-1]])
    first = levels[0]
    mean_square = (first.alpha * x0).square().flatten(1).sum(1)
    size = x0[0].numel()
    prior = 0.5 * (mean_square + size * (first.sigma**2 - 1 - 2 * first.sigma.log()))
    denoising = []
    for i in range(steps):
        level = levels[i]
        noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype).to(x0.device)
        x_t = level.alpha * x0 + level.sigma * noise
        estimate = denoise(x_t, level)
        log_small, log_large = small[i].log(), large[i].log()
        if callable(variance):
            share = variance(x_t, level)
            log_variance = share * log_large + (1 - share) * log_small
        else:
            chosen = log_large if variance == "large" else log_small
            log_variance = chosen.to(x0).expand(x0.shape)
        if i == steps - 1:  # from the least noise to data: q is a point, so no KL
            log_p = log_density(x0, estimate, log_variance, bins=bins)
            return {
                "prior": prior.to(x0.dtype),
                "denoising": torch.stack(denoising, dim=1),
                "reconstruction": -log_p.flatten(1).sum(1),
            }
        error = (from_x0[i] * (estimate - x0)).square() / log_variance.exp()
        ratio = log_small - log_variance  # of q's variance to p's
        kl = 0.5 * (error + ratio.exp() - 1 - ratio)
        denoising.append(kl.flatten(1).sum(1))
    raise AssertionError("the loop returns in its last step")


def log_density(x: Tensor, mean: Tensor, log_variance: Tensor, *, bins: int | None) -> Tensor:
    """log N(x; mean, variance) of each number, or with `bins` that of its bin in [-1, 1].

    DDPM, eq. 13: the outermost bins reach to infinity.
    """
    if bins is None:
        error = (x - mean).square() / log_variance.exp()
        return -0.5 * (error + log_variance + math.log(2 * math.pi))
    scale = torch.exp(-0.5 * log_variance)
    half = 1 / (bins - 1)
    below, above = (scale * (x - mean + side) for side in (-half, half))
    edge = 1 - half / 2
    below = torch.where(x < -edge, -math.inf, below)
    above = torch.where(x > edge, math.inf, above)
    # Phi(above) - Phi(below) in the tail where both are small, so that nothing cancels.
    swap = below > 0
    low, high = torch.where(swap, -above, below), torch.where(swap, -below, above)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return log_high + torch.log(-torch.expm1(log_low - log_high))


def bits_per_dim(nats: Tensor, num_dimensions: int) -> Tensor:
    """Nats of a whole example as bits of each of its dimensions."""
    return nats / (num_dimensions * math.log(2))


def flow_log_density(
    denoise: Denoise,
    x: Tensor,
    levels: NoiseLevels,
    *,
    probes: int | None = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """log p(x), (B,) in nats, along the probability flow (Song et al. 2021, arXiv:2011.13456, D.2).

    x (B, …) is at the least noisy level that is not data, `levels[-2]`: p is the density of data
    with so little noise. The flow is dx = x0 d alpha + eps d sigma with both as the network sees
    them at x; Heun's method follows it through the levels to the noisiest, where p is N(0, I).
    The divergence is Hutchinson's estimate of `probes` draws of signs (unbiased), or exact, at a
    backward pass a dimension, if None.
    """
    if probes is None:
        unit = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device)
        directions = [row.reshape(x.shape[1:]).expand(x.shape) for row in unit]
    else:
        draws = torch.randint(2, (probes, *x.shape), generator=generator)
        directions = list((2 * draws - 1).to(x))

    def change(x: Tensor, level: NoiseLevel, by: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What x changes by as alpha and sigma do, and the divergence of that, (B,)."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            x0 = denoise(x, level)
            field = by[0] * x0 + by[1] * (x - level.alpha * x0) / level.sigma
            sums = x.new_zeros(len(x))
            for probe in directions:
                (gradient,) = torch.autograd.grad(field, x, probe, retain_graph=True)
                sums = sums + (gradient * probe).flatten(1).sum(1)
        return field.detach(), sums / (1 if probes is None else probes)

    total = x.new_zeros(len(x))
    for i in range(len(levels) - 1, 0, -1):
        after = levels[i - 1]
        by = after.alpha - levels[i].alpha, after.sigma - levels[i].sigma
        here, here_sum = change(x, levels[i], by)
        there, there_sum = change(x + here, after, by)
        x = x + 0.5 * (here + there)
        total = total + 0.5 * (here_sum + there_sum)
    square = x.square().flatten(1).sum(1)
    return total - 0.5 * (square + x[0].numel() * math.log(2 * math.pi))
