"""Data whose every noisy density is known: a mixture of Gaussians, and its exact denoiser."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentdiff.levels import NoiseLevel


@dataclass(frozen=True)
class Mixture:
    """Numbers x0, (B, 1), of p = sum of weights[k] N(means[k], stds[k]^2)."""

    weights: Sequence[float]
    means: Sequence[float]
    stds: Sequence[float]

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws, (n, 1) float64."""
        weights = torch.tensor(self.weights, dtype=torch.float64)
        which = torch.multinomial(weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, generator=generator, dtype=torch.float64)
        return (torch.tensor(self.means)[which] + torch.tensor(self.stds)[which] * noise)[:, None]

    def denoise(self, x: Tensor, level: NoiseLevel) -> Tensor:
        """E[x0 | x_t]: what a perfect network knows. A `latentdiff.levels.Denoise`."""
        _, alpha, sigma = level
        mean, std = x.new_tensor(self.means), x.new_tensor(self.stds)
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        of_each = mean + gain * (x - alpha * mean)  # (B, K): E[x0 | x_t, component]
        return (self._parts(x, alpha, sigma).softmax(-1) * of_each).sum(-1, keepdim=True)

    def log_density(
        self, x: Tensor, alpha: float | Tensor = 1.0, sigma: float | Tensor = 0.0
    ) -> Tensor:
        """log p(x_t) at x (B, 1), by default that of the data, (B,)."""
        return self._parts(x, alpha, sigma).logsumexp(-1)

    def _parts(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
        """Logarithms of the weighted densities of the components at x_t, (B, K)."""
        mean, std = alpha * x.new_tensor(self.means), x.new_tensor(self.stds)
        variance = alpha**2 * std**2 + sigma**2
        log_density = -0.5 * ((x - mean) ** 2 / variance + variance.log() + math.log(2 * math.pi))
        return x.new_tensor(self.weights).log() + log_density
