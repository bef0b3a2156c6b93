"""The diffusion process: the forward process, its posterior, the prediction types and the loss.

This module knows no network, guidance or sampler. Papers: DDPM (Ho et al. 2020, arXiv:2006.11239)
for the beta schedules, rectified flow (Liu et al. 2022, arXiv:2209.03003) for `flow`. Everywhere
x_t = alpha x0 + sigma eps with eps ~ N(0, I); t = 0 is data and t = T is (nearly) pure noise.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from latentdiff import gaussians, schedules
from latentdiff.formats import scheduler
from latentdiff.formats.header import short_repr
from latentdiff.gaussians import Level
from latentdiff.levels import (
    MOST_DISTILLED_STEPS,
    Grid,
    LevelSpacing,
    NoiseLevels,
    Spacing,
    noise_levels,
)
from latentdiff.schedules import BETA_RANGES, Schedule

Prediction = Literal["epsilon", "sample", "v_prediction", "score", "flow_prediction"]

# `Diffusion` warns of an alpha_bar_T above this. Stable Diffusion's schedule has 0.0047.
LARGEST_FINAL_ALPHA_BAR = 0.01
MOST_TIMESTEPS = 100_000  # a file with more is wrong, and its tables would fill all memory

_WORDS = {
    "schedule": get_args(Schedule),
    "prediction": get_args(Prediction),
    "timestep_spacing": get_args(Spacing),
}

Network = Callable[[Tensor, Tensor, Tensor], Tensor]  # x_t (B, C, H, W), timestep (B,), context


@dataclass(frozen=True)
class Diffusion:
    """A noise schedule and a prediction type: all that a trained denoiser depends on.

    t is the papers' time: 0, 1, …, T for the beta schedules, a real number in [0, T] for `flow`
    (sigma = t / T, alpha = 1 - t / T). `beta_start` and `beta_end` belong to `linear` (by default
    1e-4 … 0.02) and `scaled_linear` (0.00085 … 0.012). `timestep_spacing`, `steps_offset` and
    `set_alpha_to_one` choose the levels of a sampling run and mean what they mean in diffusers;
    the defaults start at t = T and end on data (Lin et al. 2023, arXiv:2305.08891).
    `rescale_betas_zero_snr` stretches a beta schedule to end in pure noise (Algorithm 1 there).
    With `learned_variance`, for beta schedules, the network has twice the output channels, and the
    second half is the variance of p(x_{t-1} | x_t) (Nichol & Dhariwal 2021, arXiv:2102.09672).
    With `distilled_steps` the network is a student of train/distill.py: its estimate of x0 is not
    the mean of all x0 that x_t may come from, but where a step of `samplers.ddim` must head for to
    end where its teacher does. It draws in that many steps, without guidance.
    Everything is computed in float64; results have the dtype and device of x.

    Raises ValueError for a value out of range, and for `epsilon` or `score` where alpha is 0 at
    t = T, as with `flow` and a rescaled schedule: neither says anything about x0 there. Warns if
    the end of the chain is not near N(0, I): if alpha_bar_T exceeds 0.01.
    """

    schedule: Schedule
    prediction: Prediction
    num_timesteps: int = 1000
    beta_start: float | None = None
    beta_end: float | None = None
    timestep_spacing: Spacing = "trailing"
    steps_offset: int = 1
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False
    learned_variance: bool = False
    distilled_steps: int | None = None

    def __post_init__(self) -> None:
        for field, words in _WORDS.items():
            if (value := getattr(self, field)) not in words:
                allowed = ", ".join(words)
                raise ValueError(f"{field}={short_repr(value)} must be one of {allowed}")
        if not 2 <= self.num_timesteps <= MOST_TIMESTEPS:
            raise ValueError(f"num_timesteps={self.num_timesteps} must be 2 to {MOST_TIMESTEPS}")
        if self.steps_offset < 0:
            raise ValueError(f"steps_offset={self.steps_offset} must not be negative")
        if self.distilled_steps is not None:
            most = min(MOST_DISTILLED_STEPS, self.num_timesteps)
            if not 1 <= self.distilled_steps <= most:
                raise ValueError(f"distilled_steps={self.distilled_steps} must be 1 to {most}")
            if self.learned_variance:
                raise ValueError("learned_variance=True is not for a student: distilled_steps")
        if self.schedule == "flow":
            if not self.set_alpha_to_one:
                raise ValueError("set_alpha_to_one=False is for beta schedules, not schedule=flow")
            for field in ("rescale_betas_zero_snr", "learned_variance"):
                if getattr(self, field):
                    raise ValueError(f"{field}=True is for beta schedules, not flow")
        if self.schedule in BETA_RANGES:
            start, end = BETA_RANGES[self.schedule]
            start = start if self.beta_start is None else self.beta_start
            end = end if self.beta_end is None else self.beta_end
            if not 0 < start <= end < 1:
                raise ValueError(f"beta_start={start}, beta_end={end} must be 0 < start <= end < 1")
            object.__setattr__(self, "beta_start", start)  # the dataclass is frozen
            object.__setattr__(self, "beta_end", end)
        elif self.beta_start is not None or self.beta_end is not None:
            raise ValueError(f"schedule={self.schedule} has no beta_start or beta_end")
        # Cached tensors made in inference mode could not be trained with later.
        with torch.inference_mode(False):
            final_alpha_bar = 0.0 if self.schedule == "flow" else float(self.alphas_cumprod[-1])
        if final_alpha_bar == 0 and self.prediction in ("epsilon", "score"):
            cause = f"schedule={self.schedule}"
            if self.rescale_betas_zero_snr:
                cause = "rescale_betas_zero_snr=True"
            raise ValueError(
                f"prediction={self.prediction} says nothing of x0 where alpha=0: for {cause} "
                "choose flow_prediction, v_prediction or sample"
            )
        if final_alpha_bar > LARGEST_FINAL_ALPHA_BAR:
            warnings.warn(
                "the end of the noise chain is not near N(0, I): alpha_bar_T = "
                f"{final_alpha_bar:.3g} > {LARGEST_FINAL_ALPHA_BAR}; "
                "raise num_timesteps or beta_end",
                stacklevel=3,
            )

    def student(self, steps: int) -> "Diffusion":
        """The process of a student of `steps` steps, which begin at pure noise and end on data,
        whatever levels this one draws on.

        Raises ValueError for a number out of range, and with a learned variance.
        """
        return replace(
            self, distilled_steps=steps, timestep_spacing="trailing", set_alpha_to_one=True
        )

    # Buffers of the beta schedules, (T,) float64, t = 1 first: index t - 1 belongs to t.

    @cached_property
    def betas(self) -> Tensor:
        """beta_t: the variance of the noise that step t adds; ValueError for `flow`."""
        n = self.num_timesteps
        if self.schedule == "cosine":
            betas = schedules.cosine_betas(n)
        elif self.beta_start is None or self.beta_end is None:
            raise ValueError("schedule=flow has no betas")
        elif self.schedule == "linear":
            betas = schedules.linear_betas(n, self.beta_start, self.beta_end)
        else:
            betas = schedules.scaled_linear_betas(n, self.beta_start, self.beta_end)
        return schedules.zero_snr(betas) if self.rescale_betas_zero_snr else betas

    @cached_property
    def alphas(self) -> Tensor:
        """alpha_t = 1 - beta_t (falls with t)."""
        return 1 - self.betas

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """alpha_bar_t = alpha_1 … alpha_t (falls with t)."""
        return self.alphas.cumprod(0)

    @property
    def sqrt_alphas_cumprod(self) -> Tensor:
        """sqrt(alpha_bar_t): the coefficient of x0 in x_t."""
        return self.alphas_cumprod.sqrt()

    @property
    def sqrt_one_minus_alphas_cumprod(self) -> Tensor:
        """sqrt(1 - alpha_bar_t): the coefficient of the noise in x_t."""
        return (1 - self.alphas_cumprod).sqrt()

    @property
    def sqrt_recip_alphas(self) -> Tensor:
        """1 / sqrt(alpha_t)."""
        return self.alphas.rsqrt()

    @property
    def posterior_sigmas(self) -> Tensor:
        """sqrt(beta_tilde_t), the posterior's standard deviation; 0 at t = 1. DDPM, eq. 7."""
        bars = torch.cat([self.betas.new_ones(1), self.alphas_cumprod])
        return (self.betas * (1 - bars[:-1]) / (1 - bars[1:])).sqrt()

    def timestep(self, t: Tensor) -> Tensor:
        """The network's timestep at time t: t - 1 for beta schedules, t itself for `flow`.

        Networks of the diffusers family count the beta schedules' timesteps from 0 to T - 1.
        """
        return t if self.schedule == "flow" else t - 1

    def alpha_sigma(self, t: Tensor) -> Level:
        """alpha and sigma of x_t = alpha x0 + sigma eps at time t, of t's shape, in float64."""
        if self.schedule == "flow":
            sigma = t.double() / self.num_timesteps
            return Level(1 - sigma, sigma)
        alpha_bar = _alpha_bars(self, t.device)[t.long()]
        return Level(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t in one step: a sample of q(x_t | x_0), DDPM eq. 4. t is (B,) or ()."""
        alpha, sigma = self.alpha_sigma(t)
        return _fit(alpha, x0) * x0 + _fit(sigma, x0) * eps

    def forward_step(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t from x = x_{t-1}: a sample of q(x_t | x_{t-1}), DDPM eq. 2. t >= 1 is (B,) or ()."""
        alpha, variance = gaussians.transition(self.alpha_sigma(t - 1), self.alpha_sigma(t))
        return _fit(alpha, x) * x + _fit(variance.sqrt(), x) * eps

    def posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (of x's shape) and variance (of t's shape, float64) of q(x_{t-1} | x_t, x_0).

        DDPM eq. 6 and 7. t >= 1 is (B,) or ().
        """
        levels = self.alpha_sigma(t - 1), self.alpha_sigma(t)
        a, b, variance = gaussians.posterior_coefficients(*levels)
        return _fit(a, x0) * x0 + _fit(b, x_t) * x_t, variance

    # What the network predicts. Salimans & Ho 2022 (arXiv:2202.00512) for v, Song et al. 2021
    # (arXiv:2011.13456) for the score.

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the network must output for x_t = alpha x0 + sigma eps. alpha, sigma: () or (B,)."""
        alpha, sigma = _fit(alpha, x0), _fit(sigma, x0)
        match self.prediction:
            case "epsilon":
                return eps
            case "sample":
                return x0
            case "v_prediction":
                return alpha * eps - sigma * x0
            case "flow_prediction":
                return eps - x0
            case "score":
                return -eps / sigma

    def to_x0(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The estimate of x0 that follows from a network's output: the inverse of `target`."""
        alpha, sigma = _fit(alpha, x_t), _fit(sigma, x_t)
        match self.prediction:
            case "epsilon":
                return (x_t - sigma * output) / alpha
            case "sample":
                return output
            case "v_prediction":
                return (alpha * x_t - sigma * output) / (alpha**2 + sigma**2)
            case "flow_prediction":
                return (x_t - sigma * output) / (alpha + sigma)
            case "score":
                return (x_t + sigma**2 * output) / alpha

    def loss(
        self, unet: Network, x0: Tensor, context: Tensor, *, noise: Tensor, t: Tensor
    ) -> Tensor:
        """The mean squared error of each image's prediction, (B,). DDPM, eq. 14.

        x0 and noise are (B, C, H, W), t is (B,), `context` is passed to the network. The score's
        error is weighted by sigma^2 (Song et al. 2021, section 3.3), without which the smallest
        noise levels, where the target is -eps / sigma, would dominate the loss.
        """
        return self.losses(unet, x0, context, noise=noise, t=t)[0]

    def losses(
        self, unet: Network, x0: Tensor, context: Tensor, *, noise: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """`loss`, (B,), and T times the variational bound's term at t, (B,), if v is learned.

        The term is in bits per dimension. Its mean over uniform t is the bound on -log p(x0) for
        real numbers, without the prior's term, which has no learned parameters. Its gradient
        reaches only the variance, since the estimate of x0 is detached (Nichol & Dhariwal 2021,
        section 3.1).
        """
        alpha, sigma = self.alpha_sigma(t)
        x_t = _fit(alpha, x0) * x0 + _fit(sigma, x0) * noise
        output, v = self.split_output(unet(x_t, self.timestep(t), context).to(x0.dtype))
        error = output - self.target(x0, noise, alpha, sigma)
        if self.prediction == "score":
            error = _fit(sigma, x0) * error
        loss = error.square().flatten(1).mean(1)
        if v is None:
            return loss, None
        estimate = self.to_x0(output.detach(), x_t, alpha, sigma)
        term = self._bound_term(x0, estimate, v, t).flatten(1).mean(1)
        return loss, self.num_timesteps / math.log(2) * term

    def split_output(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split a network's output into the prediction, (B, C, ...), and v of a learned variance.

        v interpolates between the small and the large variance: Nichol & Dhariwal 2021, eq. 15. The
        network predicts 2 v - 1, from -1 to 1 but not clipped. v is None if it is not learned.
        """
        if not self.learned_variance:
            return output, None
        output, scaled_v = output.chunk(2, dim=1)
        return output, (scaled_v + 1) / 2

    def _bound_term(self, x0: Tensor, estimate: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """The bound's term at t for each element, in nats: see `likelihood.bound_terms`."""
        level_s, level_t = self.alpha_sigma(t - 1), self.alpha_sigma(t)
        # beta_tilde_1 is 0, which has no logarithm: beta_tilde_2 replaces it, as in their code.
        t = t.clamp(min=2)
        small, _ = gaussians.reverse_variances(self.alpha_sigma(t - 1), self.alpha_sigma(t))
        _, large = gaussians.reverse_variances(level_s, level_t)
        from_x0, _, _ = gaussians.posterior_coefficients(level_s, level_t)
        small, large, from_x0 = (_fit(values, x0) for values in (small, large, from_x0))
        log_variance = gaussians.learned_log_variance(v, small, large)
        options = {"from_x0": from_x0, "log_small": small.log()}
        kl = gaussians.divergence(x0, estimate, log_variance, **options)
        log_p = gaussians.log_density(x0, estimate, log_variance, bins=None)
        return torch.where(_fit(level_s.sigma, x0) == 0, -log_p, kl)

    def levels(
        self, steps: int, *, grid: Grid = "ddim", spacing: LevelSpacing | None = None
    ) -> NoiseLevels:
        """The noise levels of a sampling run of `steps` steps, noisiest first.

        `grid` names the diffusers scheduler that has these timesteps, `spacing` how they are spaced
        (by default `timestep_spacing`): see `latentdiff.levels`. Raises ValueError for steps out of
        range, which is 1 … T for most grids, and for an unknown spacing.
        """
        with torch.device("cpu"):
            # On a flow sigma / alpha is infinite at T, which no run needs.
            t = torch.arange(1, self.num_timesteps + (self.schedule != "flow"))
            alpha, sigma = self.alpha_sigma(t)
            return noise_levels(
                sigma / alpha,
                steps,
                flow=self.schedule == "flow",
                num_timesteps=self.num_timesteps,
                grid=grid,
                spacing=spacing,
                default=self.timestep_spacing,
                offset=self.steps_offset,
                set_alpha_to_one=self.set_alpha_to_one,
                truncates=self.schedule == "cosine",
            )

    def to_scheduler_config(self) -> dict[str, Any]:
        """This diffusion as scheduler/scheduler_config.json: see `formats.scheduler`."""
        return scheduler.to_config(**asdict(self))

    @classmethod
    def from_scheduler_config(cls, config: dict[str, Any]) -> Self:
        """The diffusion of a diffusers scheduler; ValueError for a configuration not supported."""
        return cls(**scheduler.from_config(config))


def _fit(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient () or (B,) in the shape and dtype in which it multiplies x (B, ...)."""
    if coefficient.ndim == 0:
        return coefficient
    return coefficient.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


@lru_cache(maxsize=16)
def _alpha_bars(diffusion: Diffusion, device: torch.device) -> Tensor:
    """alpha_bar_0 … alpha_bar_T, (T + 1,), on the device; cached, as each step needs it."""
    bars = diffusion.alphas_cumprod
    return torch.cat([bars.new_ones(1), bars]).to(device)
