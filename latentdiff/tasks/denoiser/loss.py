"""LossConfig: at which timesteps and on what noise a denoiser is trained, and how errors weigh."""

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
    """Weighting of the loss, distribution of the timesteps, and the noise of training."""

    weighting: Weighting = "none"
    """none: the plain error of what is predicted. min_snr: that of x0 by min(SNR, snr_gamma) (Hang
    et al. 2023). p2: that of the noise by 1 / (1 + SNR)^p2_gamma (Choi et al. 2022). uncertainty:
    each noise level by its own error, which is learned (Karras et al. 2024, EDM2)."""
    snr_gamma: float = 5.0
    p2_gamma: float = 1.0
    timestep_distribution: TimestepDistribution = option("uniform", former_name="density")
    """Of the timesteps; logit_normal has most in the middle (Esser et al. 2024, eq. 19)."""
    logit_mean: float = 0.0
    """Above 0, the middle of logit_normal lies at higher noise."""
    logit_std: float = 1.0
    stratified: bool = False
    """One timestep from each of batch_size quantiles of the distribution: less noise in the
    gradient (Kingma et al. 2021, appendix I.1)."""
    timestep_shift: float = 1.0
    """Above 1 a flow is trained more at high noise: u to s u / (1 + (s - 1) u) (Esser et al. 2024,
    eq. 23)."""
    offset_noise: float = 0.0
    """Deviation of noise that a whole channel shares, so that brightness is learned (Guttenberg
    2023); 0.1 is usual."""
    vlb_weight: float = 1e-3
    """lambda of L_simple + lambda L_vlb where `diffusion.learned_variance`: how much the bound, in
    bits a dimension, counts, whose gradient reaches the variance alone (Nichol & Dhariwal 2021)."""

    def __post_init__(self) -> None:
        for name, words in {
            "weighting": Weighting,
            "timestep_distribution": TimestepDistribution,
        }.items():
            if getattr(self, name) not in get_args(words):
                allowed = ", ".join(get_args(words))
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {allowed}")
        for name in ("snr_gamma", "logit_std", "timestep_shift", "vlb_weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ("p2_gamma", "offset_noise"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")

    def check(self, diffusion: Diffusion) -> None:
        """Raise ValueError for what does not go with the diffusion."""
        if self.timestep_shift != 1 and diffusion.schedule != "flow":
            raise ValueError(f"timestep_shift={self.timestep_shift} must be 1 unless schedule=flow")

    def sample_t(self, diffusion: Diffusion, n: int, *, generator: torch.Generator) -> Tensor:
        """n timesteps to train at, (n,): integers 1 to T, or for `flow` real numbers in (0, T]."""
        u = torch.rand(n, generator=generator, dtype=torch.float64)
        if self.stratified:
            # In no order: the rows of a batch, and so the processes, all see all of them.
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
        """Noise to train on, of shape (B, C, H, W)."""
        noise = torch.randn(shape, generator=generator)
        if self.offset_noise == 0:
            return noise
        return noise + self.offset_noise * torch.randn(*shape[:2], 1, 1, generator=generator)

    def weight(self, diffusion: Diffusion, t: Tensor) -> Tensor:
        """What the loss of each example, `diffusion.loss`, is multiplied by, (B,) float64.

        The same for every prediction type: an error of the output is an error of x0, and the
        papers' weights are put on that.
        """
        alpha, sigma = diffusion.alpha_sigma(t)
        if self.weighting in ("none", "uncertainty"):
            return torch.ones_like(alpha)
        snr = (alpha / sigma).square()
        if self.weighting == "min_snr":
            of_x0 = snr.clamp(max=self.snr_gamma)
        else:
            of_x0 = snr / (1 + snr) ** self.p2_gamma  # the noise's error is SNR times x0's
        # x0 follows from the output by a straight line: its slope is that of their errors.
        x0_error = diffusion.to_x0(torch.ones_like(alpha), torch.zeros_like(alpha), alpha, sigma)
        if diffusion.prediction == "score":  # whose loss has a factor sigma already
            x0_error = x0_error / sigma
        return of_x0 * x0_error.square()


class Uncertainty(nn.Module):
    """u of noise levels alpha, sigma, each (B,) -> (B,): exp(-u) loss + u is least at u = log loss.

    EDM2 (Karras et al. 2024, arXiv:2312.02696), eq. 21: a linear layer over random waves of the
    logarithm of sigma / alpha. It begins at 0, where exp(-u) changes nothing.
    """

    WAVES = 64
    frequencies: Tensor
    phases: Tensor

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.register_buffer("frequencies", torch.randn(self.WAVES, generator=draw))
        self.register_buffer("phases", torch.rand(self.WAVES, generator=draw))
        self.out = nn.Linear(self.WAVES, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """(B,), (B,) -> (B,)."""
        ratio = (sigma / alpha.clamp(min=1e-4)).log().float() / 4  # within about [-2.5, 2.5]
        waves = torch.cos(2 * math.pi * (ratio[:, None] * self.frequencies + self.phases))
        return self.out(math.sqrt(2) * waves)[:, 0]
