"""Consistency distillation: the noise levels that a student is compared at, and its loss.

Consistency Models (Song et al. 2023, arXiv:2303.01469), algorithm 2, on the schedule of Consistency
Models Made Easy (ECT: Geng et al. 2024, arXiv:2406.14548). A consistency function gives the same x0
everywhere on a trajectory of the teacher's probability-flow ODE: f(x_t, t) = f(x_r, r), and at
t = 0 it is x itself. Everything is said of estimates of x0, so that it holds for every prediction
type and schedule. "Noise" is EDM's level (Karras et al. 2022, arXiv:2206.00364), sigma / alpha for
data of deviation SIGMA_DATA, the unit that ECT's constants are in.
Shapes: B images, C latent channels, H/W latent size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from latentdiff.diffusion import Diffusion, Network
from latentdiff.levels import LARGEST_RATIO, Denoise, NoiseLevel

SIGMA_DATA = 0.5
"""EDM's deviation of the data; our latents have 1."""
CLOSER = 8.0
"""k in ECT's n(t) = 1 + k sigmoid(-b t), with b = 1: at low noise t and r lie further apart."""
HUBER = 0.00054
"""c / sqrt(d) of the pseudo-Huber distance (Song & Dhariwal 2023, arXiv:2310.14189, eq. 8)."""
LEAST_TIME = 1e-3
"""Of a flow; 0 is data."""
MOST_APART = 4096
"""The last distance of two times, as a fraction of the first, that float32 tells apart."""


@dataclass(frozen=True)
class ConsistencyConfig:
    """Which two levels of a trajectory a student is compared at."""

    noise_mean: float = -1.1
    """Mean of the logarithm of the noise that a student is trained at, in EDM's unit: half of
    sigma / alpha. ECT's P_mean."""
    noise_std: float = 2.0
    """Its standard deviation, ECT's P_std."""
    stage_every: int = 500
    """Steps of a stage. In the first the second level is half the first one's noise away, or at the
    data; in each stage the distance is divided by `stage_factor`."""
    num_stages: int = 5
    """The last stage goes on until the end of the run. ECT's long runs have 8; in a short one late
    stages are noise."""
    stage_factor: float = 2.0
    """q in ECT."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.noise_mean):
            raise ValueError(f"noise_mean={self.noise_mean} must be a number")
        if not 0 < self.noise_std < math.inf:
            raise ValueError(f"noise_std={self.noise_std} must be positive")
        for name in ("stage_every", "num_stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.stage_factor > 1:
            raise ValueError(f"stage_factor={self.stage_factor} must be above 1")
        if self.num_stages * math.log(self.stage_factor) > math.log(MOST_APART):
            raise ValueError(
                f"stage_factor={self.stage_factor} to the power of num_stages={self.num_stages} "
                f"must be {MOST_APART} at most: two levels are not told apart at less distance"
            )

    def stage(self, step: int) -> int:
        """The stage of training step `step`, from 0."""
        return min(step // self.stage_every, self.num_stages - 1)

    def sample_t(self, diffusion: Diffusion, n: int, *, generator: torch.Generator) -> Tensor:
        """n times to train at, (n,): integers 1 … T, or for `flow` real numbers to T - 1, where
        drawing begins."""
        z = torch.randn(n, generator=generator, dtype=torch.float64)
        t = time_of(diffusion, (self.noise_mean + self.noise_std * z).exp())
        if diffusion.schedule == "flow":
            return t.clamp(LEAST_TIME, diffusion.num_timesteps - 1)
        return t.clamp(min=1)

    def second(self, diffusion: Diffusion, t: Tensor, stage: int) -> Tensor:
        """The other time r < t (B,), of t (B,), in that stage, (B,); 0 is data. ECT, section 3."""
        noise = noise_of(diffusion, t)
        apart = self.stage_factor ** -(stage + 1) * (1 + CLOSER * torch.sigmoid(-noise))
        r = time_of(diffusion, noise * (1 - apart).clamp(min=0))
        # Neighbouring timesteps of a beta schedule are the nearest that there are.
        return r if diffusion.schedule == "flow" else torch.minimum(r, t - 1)


def noise_of(diffusion: Diffusion, t: Tensor) -> Tensor:
    """EDM's noise level at times t, of t's shape, float64, rising in t and finite."""
    alpha, sigma = diffusion.alpha_sigma(t)
    return SIGMA_DATA * (sigma / alpha).clamp(max=LARGEST_RATIO)


def time_of(diffusion: Diffusion, noise: Tensor) -> Tensor:
    """The time, of the shape of `noise`, at which a `Diffusion` has EDM's noise level.

    Real numbers of float32 for `flow`; for a beta schedule the nearest timestep, in the logarithm.
    """
    if diffusion.schedule == "flow":
        ratio = noise / SIGMA_DATA
        return (diffusion.num_timesteps * ratio / (1 + ratio)).float()
    table = noise_of(diffusion, torch.arange(diffusion.num_timesteps + 1, device=noise.device))
    middles = (table[1:] * table[:-1]).sqrt()
    middles[0] = table[1] / 2  # data has no logarithm
    return torch.bucketize(noise, middles)


def level_of(diffusion: Diffusion, t: Tensor) -> NoiseLevel:
    """The noise level at times t (B,), of the network's timestep, alpha and sigma, each (B,)."""
    return NoiseLevel(diffusion.timestep(t), *diffusion.alpha_sigma(t))


def along(x_t: Tensor, x0: Tensor, t: NoiseLevel, r: NoiseLevel) -> Tensor:
    """x_r (B, C, H, W) after one step of the ODE from x_t, along the estimate x0.

    DDIM (Song et al. 2021, arXiv:2010.02502), eq. 12 without noise: Euler's step in sigma / alpha.
    """
    keep = _fit(r.sigma / t.sigma, x_t)
    return _fit(r.alpha, x_t) * x0 + keep * (x_t - _fit(t.alpha, x_t) * x0)


def consistency_distance(
    diffusion: Diffusion,
    student: Network,
    teacher: Denoise,
    x0: Tensor,
    context: Tensor,
    *,
    noise: Tensor,
    t: Tensor,
    r: Tensor,
) -> Tensor:
    """The pseudo-Huber distance of the student's x0 at t from that at r, (B,), 0 if they are equal.

    x0 and noise are (B, C, H, W), t and r < t are (B,); `teacher` gives its guided estimate of x0.
    The gradient reaches the student at t alone. Where r is 0 the student's x0 is x_r itself, by
    which the function is fixed at the data. Both evaluations of the student must draw the same
    random numbers, or the difference of two dropout masks is learned: see `same_draws`.
    """
    level_t, level_r = level_of(diffusion, t), level_of(diffusion, r)
    x_t = diffusion.add_noise(x0, noise, t)
    with torch.no_grad():
        x_r = along(x_t, teacher(x_t, level_t), level_t, level_r)
        # A time that the network knows, where there is none: its output is not used there.
        known = torch.where(r > 0, r, t)
        at_r = student_x0(diffusion, student, x_r, context, level_of(diffusion, known))
        at_r = torch.where(_fit(r, x_r) > 0, at_r, x_r)
    at_t = student_x0(diffusion, student, x_t, context, level_t)
    square = (SIGMA_DATA * (at_t - at_r)).square().flatten(1).sum(1)
    c = HUBER * math.sqrt(x0[0].numel())
    return (square + c**2).sqrt() - c


def consistency_weight(diffusion: Diffusion, t: Tensor, r: Tensor) -> Tensor:
    """1 / (t - r) in EDM's noise, (B,) float64: ECT, section 4; the Huber distance adapts the rest.

    The distance shrinks with t - r, so that without it a late stage would learn nothing.
    """
    return 1 / (noise_of(diffusion, t) - noise_of(diffusion, r))


def student_x0(
    diffusion: Diffusion, network: Network, x: Tensor, context: Tensor, level: NoiseLevel
) -> Tensor:
    """The network's estimate of x0 at levels of (B,), in x's dtype."""
    output = network(x, level.timestep, context).to(x.dtype)
    return diffusion.to_x0(output, x, level.alpha, level.sigma)


def same_draws(network: Network, seed: int) -> Network:
    """A network that draws the same random numbers, such as dropout masks, in every call."""

    def reseeded(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        torch.manual_seed(seed)
        return network(x, timestep, context)

    return reseeded


def _fit(coefficient: Tensor, x: Tensor) -> Tensor:
    """(B,) in the shape and dtype in which it multiplies x (B, ...)."""
    return coefficient.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
