"""The likelihood of data under a diffusion model: its variational bound and probability flow.

DDPM (Ho et al. 2020, arXiv:2006.11239), eq. 5:

    -log p(x0) <= KL(q(x_T | x0) || p(x_T))                              prior
                + sum over t > 1 of KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t))   denoising
                - log p(x0 | x_1)                                        reconstruction

each in expectation over the noise. Everything is in nats; `bits_per_dim` converts.
"""

import math
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from latentdiff.gaussians import (
    Variance,
    divergence,
    learned_log_variance,
    log_density,
    posterior_coefficients,
    reverse_variances,
)
from latentdiff.levels import Denoise, NoiseLevel, NoiseLevels
from latentdiff.models.vae import Posterior


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
    `reconstruction` (B,). With `bins`, x0 has pixels in [-1, 1] of that many values (256 for 8
    bits), and `reconstruction` is -log of their probability (DDPM, eq. 13), else of the density of
    real numbers. In the last step, where beta_tilde is 0, the small variance is that of the step
    before (Nichol & Dhariwal). For "learned", `denoise` gives v after x0: see
    `guidance.guided_denoiser`. Raises ValueError for an unknown variance and for fewer than two
    steps.
    """
    if variance not in get_args(Variance):
        allowed = ", ".join(get_args(Variance))
        raise ValueError(f"variance={variance!r} must be one of {allowed}")
    steps = len(levels)
    if steps < 2:
        raise ValueError(f"levels has {steps} steps and must have 2 or more")
    s, t = levels.ends()
    from_x0, _, _ = posterior_coefficients(s, t)
    small, large = reverse_variances(s, t)
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
        if variance == "learned":
            estimate, v = estimate.chunk(2, dim=1)
            log_variance = learned_log_variance(v, small[i], large[i])
        else:
            chosen = large[i] if variance == "large" else small[i]
            log_variance = chosen.log().to(x0).expand(x0.shape)
        if i == steps - 1:  # from the least noise to data: q is a point, so no KL
            log_p = log_density(x0, estimate, log_variance, bins=bins)
            return {
                "prior": prior.to(x0.dtype),
                "denoising": torch.stack(denoising, dim=1),
                "reconstruction": -log_p.flatten(1).sum(1),
            }
        log_small = small[i].log()
        kl = divergence(x0, estimate, log_variance, from_x0=from_x0[i], log_small=log_small)
        denoising.append(kl.flatten(1).sum(1))
    raise AssertionError("the loop returns in its last step")


def bits_per_dim(nats: Tensor, num_dimensions: int) -> Tensor:
    """Nats of an example of `num_dimensions` elements as bits per dimension."""
    return nats / (num_dimensions * math.log(2))


def composed_bound_terms(
    images: Tensor,
    posterior: Posterior,
    decode: Callable[[Tensor], Tensor],
    denoise: Denoise,
    levels: NoiseLevels,
    *,
    log_variance: Tensor,
    variance: Variance = "small",
    bins: int | None = 256,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """One draw of the bound on -log p(images) of an autoencoder with a diffusion prior, in nats.

        -log p(x) <= E[-log p(x | z)] + E[log q(z | x)] + E[bound on -log p(z)],  z ~ q(z | x)

    (Vahdat et al. 2021, arXiv:2106.05931, eq. 4): the last two are KL(q(z | x) || p(z)), bounded.
    images are (B, 3, H, W) in [-1, 1], `decode` gives the mean of p(x | z), whose `log_variance`
    is () or of an image's shape, and `bins` is as in `bound_terms`. Gives `pixels`, `code` (the
    negative entropy of q) and the three terms of `bound_terms` for z, of which `reconstruction` is
    that of the latents; each (B,), and `denoising` (B, N - 1).
    """
    mean = posterior.mean
    z = posterior.sample(torch.randn(mean.shape, generator=generator, dtype=mean.dtype).to(mean))
    log_p = log_density(images, decode(z), log_variance.to(images), bins=bins)
    terms = bound_terms(denoise, z, levels, variance=variance, generator=generator)
    return {"pixels": -log_p.flatten(1).sum(1), "code": -posterior.entropy(), **terms}


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
    with so little noise. The flow is dx = x0 d alpha + eps d sigma with the network's estimates of
    x0 and eps at x; Heun's method follows it to the noisiest level, where p is N(0, I). The
    divergence is Hutchinson's unbiased estimate from `probes` random sign vectors; with None it is
    exact, and takes a backward pass per dimension.
    """
    if probes is None:
        unit = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device)
        directions = [row.reshape(x.shape[1:]).expand(x.shape) for row in unit]
    else:
        draws = torch.randint(2, (probes, *x.shape), generator=generator)
        directions = list((2 * draws - 1).to(x))

    def change(x: Tensor, level: NoiseLevel, d: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """dx where alpha and sigma change by d, and its divergence, (B,)."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            x0 = denoise(x, level)
            field = d[0] * x0 + d[1] * (x - level.alpha * x0) / level.sigma
            sums = x.new_zeros(len(x))
            for probe in directions:
                (gradient,) = torch.autograd.grad(field, x, probe, retain_graph=True)
                sums = sums + (gradient * probe).flatten(1).sum(1)
        return field.detach(), sums / (1 if probes is None else probes)

    total = x.new_zeros(len(x))
    for i in range(len(levels) - 1, 0, -1):
        s, t = levels[i], levels[i - 1]
        d = t.alpha - s.alpha, t.sigma - s.sigma
        dx_s, divergence_s = change(x, s, d)
        dx_t, divergence_t = change(x + dx_s, t, d)
        x = x + 0.5 * (dx_s + dx_t)
        total = total + 0.5 * (divergence_s + divergence_t)
    square = x.square().flatten(1).sum(1)
    return total - 0.5 * (square + x[0].numel() * math.log(2 * math.pi))
