"""The kernel distance between two sets of vectors; KID, if they are image features.

Bińkowski et al. 2018, arXiv:1801.01401. N vectors of D features; computed in float64.
"""

import torch
from torch import Tensor

BLOCK = 2048  # rows of a kernel's matrix that are in memory at once


def kernel_distance(features_a: Tensor, features_b: Tensor) -> float:
    """KID: the unbiased squared maximum mean discrepancy of (N, D) and (M, D), N and M at least 2.

    The kernel is k(x, y) = (x·y / D + 1)³ (Bińkowski et al. 2018, section 4; the estimator is
    Gretton et al. 2012, eq. 3). Its mean is 0 where both sets are from one distribution, however
    small they are, so that values below 0 occur. Raises ValueError for a set of one.
    """
    a, b = (x.detach().to("cpu", torch.float64) for x in (features_a, features_b))
    for one in (a, b):
        if len(one) < 2:
            raise ValueError(f"{len(one)} images have no kernel distance; at least 2 are needed")
    within = sum((_kernel_sum(x, x) - _diagonal_sum(x)) / (len(x) * (len(x) - 1)) for x in (a, b))
    return float(within - 2 * _kernel_sum(a, b) / (len(a) * len(b)))


def _kernel_sum(a: Tensor, b: Tensor) -> Tensor:
    """The sum () of k over all pairs."""
    blocks = ((rows @ b.T / a.shape[1] + 1) ** 3 for rows in a.split(BLOCK))
    return torch.stack([block.sum() for block in blocks]).sum()


def _diagonal_sum(x: Tensor) -> Tensor:
    """The sum () of k(x, x) over all vectors, which the unbiased estimate leaves out."""
    return ((x.square().sum(dim=1) / x.shape[1] + 1) ** 3).sum()
