"""LossConfig: the timesteps, the noise and the loss weights that a denoiser is trained with."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from latentdiff.diffusion import Diffusion
from latentdiff.options import option

Weighting = Literal["none", "min_snr", "p2", "uncertainty"]
TimestepDistribution = Literal["uniform", "logit_normal"]


@dataclass(frozen=True)
class LossConfig:
    """Loss weighting, distribution of the timesteps, and noise."""

    weighting: Weighting = "none"
    """none: the squared error of the prediction. min_snr: that of x0 by min(SNR, snr_gamma) (Hang
    et al. 2023). p2: that of the noise by 1 / (1 + SNR)^p2_gamma (Choi et al. 2022). uncertainty:
    that of the prediction over its mean at the noise level, which is learned (Karras et al. 2024,
    EDM2)."""
    snr_gamma: float = option(5.0, needs="weighting=min_snr")
    p2_gamma: float = option(1.0, needs="weighting=p2")
    timestep_distribution: TimestepDistribution = option("uniform", former_name="density")
    """logit_normal favours the middle of the timesteps (Esser et al. 2024, eq. 19)."""
    logit_mean: float = option(0.0, needs="timestep_distribution=logit_normal")
    """Mean of logit_normal; above 0 it favours higher noise."""
    logit_std: float = option(1.0, needs="timestep_distribution=logit_normal")
    """Standard deviation of logit_normal before the sigmoid."""
    stratified: bool = False
    """One timestep from each of batch_size quantiles of the distribution: less noise in the
    gradient (Kingma et al. 2021, appendix I.1)."""
    timestep_shift: float = 1.0
    """Above 1 a flow is trained more at high noise: u becomes s u / (1 + (s - 1) u) (Esser et al.
    2024, eq. 23)."""
    offset_noise: float = 0.0
    """Standard deviation of added noise that is constant over each channel, so that mean brightness
    is learned (Guttenberg 2023); 0.1 is usual."""
    vlb_weight: float = option(1e-3, needs="diffusion.learned_variance or init")
    """lambda in L_simple + lambda L_vlb with `diffusion.learned_variance`; L_vlb is in bits per
    dimension, and its gradient reaches the variance alone (Nichol & Dhariwal 2021)."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("weighting", get_args(Weighting)),
            ("timestep_distribution", get_args(TimestepDistribution)),
        ):
            if getattr(self, name) not in choices:
                allowed = ", ".join(choices)
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {allowed}")
        for name in ("snr_gamma", "logit_std", "timestep_shift", "vlb_weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ("p2_gamma", "offset_noise"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")

    def check(self, diffusion: Diffusion) -> None:
        """Raise ValueError for an option that does not apply to the diffusion."""
        if self.timestep_shift != 1 and diffusion.schedule != "flow":
            raise ValueError(f"timestep_shift={self.timestep_shift} must be 1 unless schedule=flow")
        if self.vlb_weight != LossConfig.vlb_weight and not diffusion.learned_variance:
            raise ValueError(
                f"vlb_weight={self.vlb_weight} has no effect: the variance is not learned"
            )

    def sample_t(self, diffusion: Diffusion, n: int, *, generator: torch.Generator) -> Tensor:
        """n timesteps to train at, (n,): integers 1 to T, or for `flow` real numbers in (0, T]."""
        u = torch.rand(n, generator=generator, dtype=torch.float64)
        if self.stratified:
            # Shuffled, so that the rows of every process are spread over all strata.
            u = (torch.randperm(n, generator=generator) + u) / n
        u = 1 - u  # in (0, 1]
        if self.timestep_distribution == "logit_normal":
            u = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(u))
        u = self.timestep_shift * u / (1 + (self.timestep_shift - 1) * u)
        T = diffusion.num_timesteps
        if diffusion.schedule == "flow":
            return (T * u).float().clamp(min=torch.finfo(torch.float32).tiny)
        return (T * u).ceil().long().clamp(1, T)

    def noise(self, shape: tuple[int, ...], *, generator: torch.Generator) -> Tensor:
        """Noise of the given shape, (B, C, H, W)."""
        noise = torch.randn(shape, generator=generator)
        if self.offset_noise == 0:
            return noise
        return noise + self.offset_noise * torch.randn(*shape[:2], 1, 1, generator=generator)

    def weight(self, diffusion: Diffusion, t: Tensor) -> Tensor:
        """The weight of each example's `diffusion.loss`, (B,) float64.

        All prediction types are trained on the same weighted error of x0, which is the papers':
        the weight of the output's error follows from it.
        """
        alpha, sigma = diffusion.alpha_sigma(t)
        if self.weighting in ("none", "uncertainty"):
            return torch.ones_like(alpha)
        snr = (alpha / sigma).square()
        if self.weighting == "min_snr":
            x0_weight = snr.clamp(max=self.snr_gamma)
        else:
            # The squared error of the noise is SNR times that of x0.
            x0_weight = snr / (1 + snr) ** self.p2_gamma
        # x0 is linear in the output, so that its error is the output's times the slope.
        x0_slope = diffusion.to_x0(torch.ones_like(alpha), torch.zeros_like(alpha), alpha, sigma)
        if diffusion.prediction == "score":  # whose loss has a factor sigma already
            x0_slope = x0_slope / sigma
        return x0_weight * x0_slope.square()


class Uncertainty(nn.Module):
    """The log-variance u of the loss at noise levels alpha, sigma, each (B,) -> (B,).

    EDM2 (Karras et al. 2024, arXiv:2312.02696), eq. 21: exp(-u) loss + u is least at u = log loss.
    u is a linear layer over random Fourier features of log(sigma / alpha), initially 0.
    """

    NUM_FEATURES = 64
    frequencies: Tensor
    phases: Tensor

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.register_buffer("frequencies", torch.randn(self.NUM_FEATURES, generator=rng))
        self.register_buffer("phases", torch.rand(self.NUM_FEATURES, generator=rng))
        self.out = nn.Linear(self.NUM_FEATURES, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(B,), (B,) -> (B,)."""
        log_ratio = (sigma / alpha.clamp(min=1e-4)).log().float() / 4  # within about [-2.5, 2.5]
        features = torch.cos(2 * math.pi * (log_ratio[:, None] * self.frequencies + self.phases))
        return self.out(math.sqrt(2) * features)[:, 0]
