"""Guidance: how far, where and in which direction a sample is led towards its prompt.

At each step the network is asked twice, with the prompt and without it (with the negative prompt);
classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) goes on from the one estimate
through the other. The rest of this file mends what a large scale spoils.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Guidance:
    """How one sample is guided; the defaults beyond `scale` are plain classifier-free guidance.

    Raises ValueError, naming the field, for a value out of range.
    """

    scale: float = 7.5
    """How far from the negative prompt, >= 0; 1 is off, and the network is asked only once."""
    rescale: float = 0.0
    """0 … 1: how much of the contrast that guidance adds is taken back (Lin et al. 2023,
    arXiv:2305.08891, section 3.4; 0.7 there)."""
    interval: Sequence[float] | None = None
    """Noise levels sigma / alpha, lowest and highest, between which to guide at all; outside the
    network is asked only once (Kynkäänniemi et al. 2024, arXiv:2404.07724). None is everywhere."""
    eta: float = 1.0
    """Adaptive projected guidance (Sadat et al. 2024, arXiv:2410.02416): how much of the part of
    the guidance that is parallel to the estimate is kept; 0 avoids saturated colours, 1 is off."""
    norm_threshold: float | None = None
    """The longest guidance a step may have, a Euclidean norm over an image's latents (theirs)."""
    momentum: float = 0.0
    """How much of the earlier steps' guidance is added, above -1 and below 1; theirs is negative,
    -0.5: it follows what is new in a step."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(f"guidance_scale={self.scale} must be a finite number >= 0")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance_rescale={self.rescale} must be from 0 to 1")
        interval = (0.0, 1.0) if self.interval is None else tuple(self.interval)
        if len(interval) != 2 or not 0 <= interval[0] <= interval[1] < math.inf:
            raise ValueError(
                f"guidance_interval={interval} must be two finite numbers, 0 <= low <= high, "
                "of sigma / alpha"
            )
        if not 0 <= self.eta <= 1:
            raise ValueError(f"guidance_eta={self.eta} must be from 0 to 1")
        if self.norm_threshold is not None and not 0 < self.norm_threshold < math.inf:
            raise ValueError(
                f"guidance_norm_threshold={self.norm_threshold} must be a positive number"
            )
        if not -1 < self.momentum < 1:
            raise ValueError(f"guidance_momentum={self.momentum} must be between -1 and 1")
        if self.projected and self.rescale:
            raise ValueError(
                f"guidance_rescale={self.rescale} does not go with guidance_eta, "
                "guidance_norm_threshold or guidance_momentum, which mend the same fault"
            )

    @property
    def projected(self) -> bool:
        """Whether it is adaptive projected guidance."""
        return self.eta != 1 or self.momentum != 0 or self.norm_threshold is not None

    def guides(self, alpha: Tensor, sigma: Tensor) -> bool:
        """Whether this noise level is guided; alpha and sigma are (), on the CPU."""
        if self.scale == 1 or self.interval is None:
            return self.scale != 1
        low, high = self.interval
        return bool(low * alpha <= sigma) and bool(sigma <= high * alpha)

    def combine(self, null: Tensor, conditional: Tensor) -> Tensor:
        """The guided output of the network from its two outputs, each (B, ...)."""
        guided = null + self.scale * (conditional - null)
        if not self.rescale:
            return guided
        rest = tuple(range(1, guided.ndim))
        contrast = conditional.std(rest, keepdim=True) / guided.std(rest, keepdim=True)
        return guided * (self.rescale * contrast + (1 - self.rescale))  # eq. 15 and 16

    def project(self, update: Tensor, x0: Tensor) -> Tensor:
        """The guided estimate of x0 by adaptive projected guidance, (B, ...): Algorithm 1.

        x0 is the estimate with the prompt, `update` what to add to it for a scale of 2, momentum
        included. The norms are of whole images.
        """
        rest = tuple(range(1, x0.ndim))
        if self.norm_threshold is not None:
            norm = torch.linalg.vector_norm(update, dim=rest, keepdim=True)
            update = update * (self.norm_threshold / norm).clamp(max=1)
        square = x0.square().sum(rest, keepdim=True)
        parallel = (update * x0).sum(rest, keepdim=True) / square * x0
        return x0 + (self.scale - 1) * (update - (1 - self.eta) * parallel)
