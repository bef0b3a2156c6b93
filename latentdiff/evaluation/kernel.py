"""The kernel distance between two sets of vectors; KID, if they are image features.

Bińkowski et al. 2018, arXiv:1801.01401. N vectors of D features; computed in float64.
"""

import torch
from torch import Tensor

from latentdiff.evaluation.intervals import Interval, percentile_interval, resampling_weights

BLOCK = 2048  # rows of a kernel's matrix that are in memory at once


def kernel_distance(features_a: Tensor, features_b: Tensor) -> float:
    """KID: the unbiased squared maximum mean discrepancy of (N, D) and (M, D), N and M at least 2.

    The kernel is k(x, y) = (x·y / D + 1)³ (Bińkowski et al. 2018, section 4; the estimator is
    Gretton et al. 2012, eq. 3). Its mean is 0 where both sets are from one distribution, however
    small they are, so that values below 0 occur. Raises ValueError for a set of one.
    """
    return float(_weighted_distances(features_a, features_b, torch.ones(1, len(features_a)))[0])


def kernel_interval(features_a: Tensor, features_b: Tensor) -> Interval:
    """The 95 % interval of the distance when the images of `features_a` are drawn anew.

    By the bootstrap over (N, D); those of `features_b` stay as they are. Pairs of an image with
    itself are left out of a sample that has it twice, or the distance would be too large. Raises
    ValueError for a set of one.
    """
    weights = resampling_weights(len(features_a))
    return percentile_interval(_weighted_distances(features_a, features_b, weights))


def _weighted_distances(features_a: Tensor, features_b: Tensor, weights: Tensor) -> Tensor:
    """Distances (R,) of the sets in which the vectors of `a` are as often as `weights` (R, N) say.

    Raises ValueError for a set of one.
    """
    a, b = (x.detach().to("cpu", torch.float64) for x in (features_a, features_b))
    for one in (a, b):
        if len(one) < 2:
            raise ValueError(f"{len(one)} images have no kernel distance; at least 2 are needed")
    weights = weights.double()
    total, pairs = weights.sum(1), weights.sum(1).square() - weights.square().sum(1)
    own = (weights * _kernel_rows(a, a, weights)).sum(1) - weights.square() @ _diagonal(a)
    everyone = torch.ones(1, len(b), dtype=torch.float64)
    cross = weights @ _kernel_rows(a, b, everyone)[0] / (total * len(b))
    other = _kernel_rows(b, b, everyone).sum() - _diagonal(b).sum()
    return own / pairs + other / (len(b) * (len(b) - 1)) - 2 * cross


def _kernel_rows(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """For each vector of `a` the sum of k over the weighted vectors of `b`: (R, M) -> (R, N)."""
    blocks = ((rows @ b.T / a.shape[1] + 1) ** 3 for rows in a.split(BLOCK))
    return torch.cat([weights @ block.T for block in blocks], dim=1)


def _diagonal(x: Tensor) -> Tensor:
    """k(x, x) of each vector (N,), which the unbiased estimate leaves out."""
    return (x.square().sum(dim=1) / x.shape[1] + 1) ** 3
