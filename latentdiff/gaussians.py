"""The Gaussians between two noise levels: forward, posterior and reverse process, KL.

Of two levels t is the noisier one and s the other.
Papers: DDPM (Ho et al. 2020, arXiv:2006.11239), and Nichol & Dhariwal 2021 (arXiv:2102.09672) for
variances that a network learns.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Level(NamedTuple):
    """alpha and sigma of x_t = alpha x0 + sigma eps, of one shape."""

    alpha: Tensor
    sigma: Tensor


Variance = Literal["small", "large", "learned"]
"""The variance of p(x_s | x_t): beta_tilde, beta, or one between them that the network learned. For
"learned" the denoiser gives v after x0: see `guidance.guided_denoiser`."""


def transition(s: Level, t: Level) -> tuple[Tensor, Tensor]:
    """a and b of q(x_t | x_s) = N(a x_s, b I), from (alpha, sigma) of t and of a less noisy s.

    Kingma et al. 2021 (arXiv:2107.00630), eq. 23; the variance b is DDPM's beta_t if s = t - 1.
    """
    alpha = t.alpha / s.alpha
    return alpha, (t.sigma**2 - (alpha * s.sigma) ** 2).clamp(min=0)


def posterior_coefficients(s: Level, t: Level) -> tuple[Tensor, Tensor, Tensor]:
    """a, b and c of q(x_s | x_t, x_0) = N(a x_0 + b x_t, c I), levels as in `transition`.

    DDPM, eq. 7, for any two levels: the variance c is beta_tilde_t if s = t - 1.
    """
    alpha, variance = transition(s, t)
    ratio = (s.sigma / t.sigma) ** 2
    return s.alpha * variance / t.sigma**2, alpha * ratio, variance * ratio


def reverse_variances(s: Level, t: Level) -> tuple[Tensor, Tensor]:
    """The small and the large variance of p(x_s | x_t): DDPM, section 3.2, for any two levels.

    The small one is the posterior's, beta_tilde, right if the data were one point; the large one
    is beta, right if they were N(0, I).
    """
    forward = transition(s, t)[1]
    # Var(x_s | x_t) of unit Gaussian data; the fraction is 1 wherever alpha^2 + sigma^2 = 1.
    large = forward * (s.alpha**2 + s.sigma**2) / (t.alpha**2 + t.sigma**2)
    return posterior_coefficients(s, t)[2], large


def learned_log_variance(v: Tensor, small: Tensor, large: Tensor) -> Tensor:
    """log of the variance exp(v log beta + (1 - v) log beta_tilde): Nichol & Dhariwal, eq. 15."""
    return v * large.log() + (1 - v) * small.log()


def divergence(
    x0: Tensor, estimate: Tensor, log_variance: Tensor, *, from_x0: Tensor, log_small: Tensor
) -> Tensor:
    """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) of each element, in nats: DDPM, eq. 5, L_{t-1}.

    The mean of p is the mean of q with `estimate` in place of x0; `from_x0` is the coefficient of
    x0 in it. `log_variance` and `log_small` are the log-variances of p and q.
    """
    error = (from_x0 * (estimate - x0)).square() / log_variance.exp()
    ratio = log_small - log_variance
    return 0.5 * (error + ratio.exp() - 1 - ratio)


def log_density(x: Tensor, mean: Tensor, log_variance: Tensor, *, bins: int | None) -> Tensor:
    """log N(x; mean, variance) of each element, or with `bins` the log-probability of its bin.

    DDPM, eq. 13: `bins` bins divide [-1, 1], and the outermost two reach to infinity.
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
