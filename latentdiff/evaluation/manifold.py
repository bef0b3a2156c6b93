"""Improved precision and recall: which of two sets of vectors lie where the other set is.

Kynkäänniemi et al. 2019, arXiv:1904.06991. N and M vectors of D features; computed in float64.
"""

import torch
from torch import Tensor

NEIGHBOURS = 3  # k of section 3: "we use k = 3 as a robust choice"
BLOCK = 1024  # rows of a matrix of distances that are in memory at once
ROUNDING = 1e-10  # of the squared lengths, by which a distance that is 0 may be above it


def covered(vectors: Tensor, centres: Tensor) -> Tensor:
    """Whether each vector (M, D) lies in the manifold of `centres` (N, D): (M,) bool.

    That is the union of balls around the centres, each as large as the distance of its centre from
    the k-th nearest other one (Kynkäänniemi et al. 2019, eqs. 1 and 2). Precision is the share of
    drawn images in the manifold of true ones, recall that of true ones in the drawn ones'. Raises
    ValueError for no more than k centres.
    """
    if len(centres) <= NEIGHBOURS:
        raise ValueError(
            f"{len(centres)} images have no {NEIGHBOURS} neighbours each; at least "
            f"{NEIGHBOURS + 1} are needed for recall"
        )
    vectors, centres = (x.detach().to("cpu", torch.float64) for x in (vectors, centres))
    radii = torch.cat(
        [
            _squared(rows, centres).kthvalue(NEIGHBOURS + 1, dim=1).values  # itself is the first
            for rows in centres.split(BLOCK)
        ]
    )
    radii = radii + ROUNDING * centres.square().sum(1).max()
    return torch.cat(
        [(_squared(rows, centres) <= radii).any(dim=1) for rows in vectors.split(BLOCK)]
    )


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances (M, N) of (M, D) and (N, D)."""
    return a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T
