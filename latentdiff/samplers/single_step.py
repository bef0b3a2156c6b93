"""Samplers whose steps do not depend on earlier ones: DDPM, DDIM, Euler, Heun, …

A step goes from the level t to the less noisy s.
"""

from collections.abc import Callable, Iterator
from typing import get_args

import torch
from torch import Tensor

from latentdiff.gaussians import (
    Variance,
    learned_log_variance,
    posterior_coefficients,
    reverse_variances,
    transition,
)
from latentdiff.levels import Denoise, NoiseLevels

Noise = Callable[[], Tensor]  # fresh N(0, I) of x's shape, each call


def ddpm(
    denoise: Denoise,
    x: Tensor,
    levels: NoiseLevels,
    *,
    variance: Variance = "small",
    noise: Noise,
) -> Iterator[Tensor]:
    """Ancestral sampling: DDPM (Ho et al. 2020, arXiv:2006.11239), Algorithm 2.

    x (B, C, H, W) is N(0, I). Each step draws x_s from N(mean of q(x_s | x_t, x0), variance):
    "small" is the posterior's beta_tilde, right if the data were one point; "large" is beta, right
    if they were N(0, I) (section 3.2 there); "learned" lies between, at the v that denoise gives
    after x0 (Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15). Any two levels may follow
    each other. The last step adds no noise.
    """
    if variance not in get_args(Variance):
        raise ValueError(f"variance={variance} must be one of {', '.join(get_args(Variance))}")
    s, t = levels.ends()
    from_x0, from_x, _ = posterior_coefficients(s, t)
    small, large = reverse_variances(s, t)
    fixed = (large if variance == "large" else small).sqrt()
    last = len(levels) - 1
    for i in range(len(levels)):
        x0, v = denoise(x, levels[i]), None
        if variance == "learned":
            x0, v = x0.chunk(2, dim=1)
        x = mean = from_x0[i] * x0 + from_x[i] * x
        if i < last:
            std = fixed[i]
            if v is not None:
                std = torch.exp(0.5 * learned_log_variance(v, small[i], large[i]))
            x = mean + std * noise()
        yield x0 if i < last else x


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
    s, t = levels.ends()
    from_eps, std = s.sigma, torch.zeros_like(s.sigma)
    if eta > 0:
        fraction = transition(s, t)[1] / t.sigma**2  # of the variance of x_t's noise
        from_eps = s.sigma * (1 - eta**2 * fraction).clamp(min=0).sqrt()
        std = eta * s.sigma * fraction.sqrt()
    last = len(levels) - 1
    for i in range(len(levels)):
        x0 = denoise(x, levels[i])
        eps = (x - t.alpha[i] * x0) / t.sigma[i]
        x = s.alpha[i] * x0 + from_eps[i] * eps
        if noise is not None and eta > 0:
            x = x + std[i] * noise()
        yield x0 if i < last else x


def euler(denoise: Denoise, x: Tensor, levels: NoiseLevels) -> Iterator[Tensor]:
    """Euler's method on the probability-flow ODE: Karras et al. 2022 (arXiv:2206.00364), eq. 1.

    x (B, C, H, W) is N(0, I). In their coordinates y = x / alpha, r = sigma / alpha:
    y' = y + (r' - r) (y - x0) / r, first order. Multiplied out this is `ddim` with eta = 0, on a
    flow's levels too; what differs in diffusers is the choice of levels.
    """
    return ddim(denoise, x, levels)


def euler_ancestral(
    denoise: Denoise, x: Tensor, levels: NoiseLevels, *, noise: Noise
) -> Iterator[Tensor]:
    """Euler steps past each level and noise to climb back: k-diffusion's sample_euler_ancestral.

    x (B, C, H, W) is N(0, I). In the coordinates y = x / alpha, r = sigma / alpha of Karras et al.
    2022 (arXiv:2206.00364): dy/dr = (y - x0) / r down to r_down, then noise of deviation r_up,
    r_up^2 = r'^2 (r^2 - r'^2) / r^2, r_down^2 = r'^2 - r_up^2 for the next level r'. Multiplied out
    this is `ddpm` with the small variance; what differs in diffusers is the choice of levels. The
    last step adds no noise if it ends on data.
    """
    s, t = levels.ends()
    ratio = t.alpha * s.sigma / (s.alpha * t.sigma)  # r' / r, finite at alpha = 0 too
    down = ratio**2  # r_down / r
    from_x = s.sigma * ratio / t.sigma  # alpha' r_down / (alpha r)
    from_x0 = s.alpha * (1 - down)
    up = s.sigma * (1 - down).clamp(min=0).sqrt()
    last = len(levels) - 1
    for i in range(len(levels)):
        x0 = denoise(x, levels[i])
        x = from_x[i] * x + from_x0[i] * x0 + up[i] * noise()
        yield x0 if i < last else x


def heun(denoise: Denoise, x: Tensor, levels: NoiseLevels) -> Iterator[Tensor]:
    """Heun's second-order method: Karras et al. 2022 (arXiv:2206.00364), Algorithm 1.

    x (B, C, H, W) is N(0, I). 2N - 1 calls of the denoiser: the last step is Euler's. The slope is
    averaged in the coordinates in which the noise grows evenly: x / alpha and sigma / alpha on
    variance-preserving levels, x and sigma on a flow, where alpha may be 0.
    """
    s, t = levels.ends()
    scale = levels.scaling()
    ratio = s.sigma / t.sigma
    from_x0 = s.alpha - t.alpha * ratio  # Euler's step, which is DDIM's
    # Averaging the slopes at both ends moves Euler's end by this much times the change of x0. From
    # pure noise the slope in x / alpha is infinite: that step stays Euler's.
    change = 0.5 * (t.sigma * scale[1:] ** 2 / (scale[:-1] * s.sigma) - scale[1:])
    change = torch.where(scale[:-1] > 0, change, 0.0)
    last = len(levels) - 1
    for i in range(len(levels)):
        x0 = denoise(x, levels[i])
        x = ratio[i] * x + from_x0[i] * x0
        if i < last:
            x = x + change[i] * (denoise(x, levels[i + 1]) - x0)
        yield x0 if i < last else x


def dpmpp_sde(
    denoise: Denoise, x: Tensor, levels: NoiseLevels, *, noise: Noise
) -> Iterator[Tensor]:
    """SDE-DPM-Solver++ with a midpoint: Lu et al. 2022 (arXiv:2211.01095), as k-diffusion has it.

    x (B, C, H, W) is N(0, I). k-diffusion's sample_dpmpp_sde, diffusers' DPMSolverSDEScheduler:
    each step goes to the level halfway in log(alpha / sigma), `levels.halfway`, estimates x0 there
    and takes the full step with that estimate, each time with noise; 2N - 1 calls where the last
    step ends on data, which takes one call, as does a step that begins where alpha is 0.

    The two noises of a step are increments of one Brownian motion in r = sigma / alpha, from r to
    r_half and from r to r', divided by their deviation. The second contains the first, so
    z = c z_half + sqrt(1 - c^2) z_rest, c^2 = (r - r_half) / (r - r') = 1 / (1 + exp(-h / 2)) with
    h the step in log(alpha / sigma): two independent normals give the exact law, without the
    Brownian tree that k-diffusion needs because it draws noise by r.
    """
    s, t = levels.ends()
    ratio = s.sigma / t.sigma
    shrink = t.alpha * ratio / s.alpha  # exp(-h)
    half = shrink.sqrt()
    c_squared = 1 / (1 + half)
    up = s.sigma * (1 - shrink**2).sqrt()
    last = len(levels) - 1
    for i in range(len(levels)):
        x0 = denoise(x, levels[i])
        x0_half = x0
        z = noise() if up[i] > 0 else None
        if z is not None and shrink[i] > 0:
            middle = levels.halfway(i)
            from_x = middle.sigma / t.sigma[i] * half[i]
            from_x0, std = middle.alpha * (1 - shrink[i]), middle.sigma * (1 - shrink[i]).sqrt()
            x0_half = denoise(from_x * x + from_x0 * x0 + std * z, middle)
            z = c_squared[i].sqrt() * z + (1 - c_squared[i]).sqrt() * noise()
        x = ratio[i] * shrink[i] * x + s.alpha[i] * (1 - shrink[i] ** 2) * x0_half
        if z is not None:
            x = x + up[i] * z
        yield x0 if i < last else x


def lcm(denoise: Denoise, x: Tensor, levels: NoiseLevels, *, noise: Noise) -> Iterator[Tensor]:
    """Multistep consistency sampling: LCM (Luo et al. 2023, arXiv:2310.04378).

    x (B, C, H, W) is N(0, I). For networks that were distilled to it: each step jumps to the data,
    f = c_skip x + c_out x0, and the next begins from f with fresh noise. c_skip and c_out (Song et
    al. 2023, arXiv:2303.01469, eq. 5) make f the identity at timestep 0; sigma_data = 0.5 and the
    timesteps' factor of 10 are LCM's.
    """
    scaled = 10 * levels.timestep.double().clamp(min=0)
    c_skip = 0.25 / (scaled**2 + 0.25)
    c_out = scaled / (scaled**2 + 0.25).sqrt()
    last = len(levels) - 1
    for i in range(last):
        x0 = c_skip[i] * x + c_out[i] * denoise(x, levels[i])
        yield x0
        x = levels.alpha[i + 1] * x0 + levels.sigma[i + 1] * noise()
    yield c_skip[last] * x + c_out[last] * denoise(x, levels[last])
