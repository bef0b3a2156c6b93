"""A kernel's distance of two sets of vectors; of features of images, KID (Bińkowski et al. 2018).

arXiv:1801.01401. N vectors, D numbers each; all is computed in float64.
"""

import torch
from torch import Tensor

BLOCK = 2048  # rows of a kernel's matrix that are in memory at once


def kernel_distance(features_a: Tensor, features_b: Tensor) -> float:
    """KID: the unbiased squared maximum mean discrepancy of (N, D) and (M, D), N and M at least 2.

    Of the kernel k(x, y) = (x·y / D + 1)³ (Bińkowski et al. 2018, section 4; the estimator is
    Gretton et al. 2012, eq. 3). Its mean is 0 where both sets are of one distribution, however
    few there are, so that values below 0 occur. Raises ValueError for a set of one.
    """
    a, b = (x.detach().to("cpu", torch.float64) for x in (features_a, features_b))
    for one in (a, b):
        if len(one) < 2:
            raise ValueError(f"{len(one)} images have no kernel distance; at least 2 are needed")
    within = sum((_kernel_sum(x, x) - _own(x)) / (len(x) * (len(x) - 1)) for x in (a, b))
    return float(within - 2 * _kernel_sum(a, b) / (len(a) * len(b)))


def _kernel_sum(a: Tensor, b: Tensor) -> Tensor:
    """The sum () of k over all pairs."""
    blocks = ((part @ b.T / a.shape[1] + 1) ** 3 for part in a.split(BLOCK))
    return torch.stack([block.sum() for block in blocks]).sum()


def _own(x: Tensor) -> Tensor:
    """The sum () of k of each vector with itself, which the unbiased estimate leaves out."""
    return ((x.square().sum(dim=1) / x.shape[1] + 1) ** 3).sum()
