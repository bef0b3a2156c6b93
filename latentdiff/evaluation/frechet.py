"""The Fréchet distance between two Gaussians; FID, if they are fitted to image features.

Heusel et al. 2017, arXiv:1706.08500. N vectors of D features; all is computed in float64.
"""

import torch
from torch import Tensor


class Moments:
    """Mean (D,) and covariance (D, D), accumulated batch by batch."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)  # sum of (x - mean)(x - mean)^T

    def add(self, features: Tensor) -> None:
        """Add a batch (B, D) of any float type; an empty one changes nothing."""
        if len(features) == 0:
            return
        batch = features.detach().to("cpu", torch.float64)
        mean = batch.mean(dim=0)
        centred = batch - mean
        scatter = centred.T @ centred
        if self.count == 0:
            self.count, self.mean, self._scatter = len(batch), mean, scatter
            return
        # Chan, Golub & LeVeque 1979, eq. 2.1: sums of squares would cancel where the mean is large.
        total = self.count + len(batch)
        delta = mean - self.mean
        scatter += torch.outer(delta, delta) * (self.count * len(batch) / total)
        self._scatter = self._scatter + scatter
        self.mean = self.mean + delta * (len(batch) / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """(D, D), unbiased: over N - 1. Raises ValueError for fewer than two vectors."""
        if self.count < 2:
            raise ValueError(f"{self.count} images have no covariance; at least 2 are needed")
        return self._scatter / (self.count - 1)


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """The squared Fréchet distance between N(mean_a, cov_a) and N(mean_b, cov_b); (D,) and (D, D).

    |m_a - m_b|² + Tr(C_a + C_b - 2 (C_a C_b)^½) (Dowson & Landau 1982; Heusel et al. 2017, eq. 6).
    """
    mean_a, cov_a, mean_b, cov_b = (
        x.detach().to("cpu", torch.float64) for x in (mean_a, cov_a, mean_b, cov_b)
    )
    # C_a C_b is not symmetric, but has the eigenvalues of C_a^½ C_b C_a^½, which is. Their roots
    # are the singular values of C_a^½ C_b^½, by which none is the root of a rounding error.
    roots = torch.linalg.svdvals(_root(cov_a) @ _root(cov_b))
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * roots.sum()
    return max(0.0, float(distance))  # rounding may give less


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a positive semidefinite matrix (D, D)."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
