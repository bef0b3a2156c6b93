"""Intervals of 95 %: of a share that was counted, and of a figure by resampling."""

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

CONFIDENCE = 0.95
RESAMPLES = 500


class Interval(NamedTuple):
    """The two ends."""

    low: float
    high: float


def wilson_interval(count: int, total: int) -> Interval:
    """The interval of a share of which `count` of `total` independent draws were seen.

    It stays within [0, 1] and is right near its ends, where the normal one is empty (Wilson 1927,
    eq. 4). Without a draw it is all of [0, 1].
    """
    if total == 0:
        return Interval(0.0, 1.0)
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share, spread = count / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def resampling_weights(count: int, *, seed: int = 0) -> Tensor:
    """How often each of `count` items is in each bootstrap sample, (R, N) float64.

    Each of the R samples has N items, drawn with replacement (Efron 1979). The weights are a
    function of (count, seed).
    """
    drawn = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(RESAMPLES, count, dtype=torch.float64)
    return weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))


def percentile_interval(figures: Tensor) -> Interval:
    """The interval that holds the middle 95 % of a figure's bootstrap values (R,)."""
    tail = (1 - CONFIDENCE) / 2
    ends = torch.quantile(figures, torch.tensor([tail, 1 - tail], dtype=figures.dtype))
    return Interval(*ends.tolist())
