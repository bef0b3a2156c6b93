"""Exponential and power-function averages of the weights, tracked while a network is trained.

The power-function averages are those of Karras et al. 2024, "Analyzing and Improving the Training
Dynamics of Diffusion Models" (EDM2), section 3 and appendix C. With exponent gamma after t updates:

    (gamma + 1) / t^(gamma + 1) · integral from 0 to t of tau^gamma · weights(tau) d tau.

The profile tau^gamma stretches with t: its standard deviation is always the same fraction of t,
the `length` of the average. `ema_synthesis.py` makes averages of other lengths of their snapshots.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentdiff.options import option

LONGEST = 12**-0.5
"""Length of the plain mean of all weights, which no average here reaches."""


@dataclass(frozen=True)
class EMAConfig:
    """Which averages of the weights are tracked."""

    ema_decay: float = 0.999
    """Half-life of about 0.69 / (1 - ema_decay) steps; less at the start of a run."""
    ema_lengths: Sequence[float] = ()
    """Power-function averages that are tracked as well, by their relative standard deviation, such
    as 0.05 and 0.1: from their snapshots `latentdiff ema` makes the average of any length."""
    snapshot_every: int = option(500, may_change=True, needs="ema_lengths")
    """Steps between two snapshots of the averages of `ema_lengths`."""

    def __post_init__(self) -> None:
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must be in [0, 1)")
        for length in self.ema_lengths:
            power_exponent(length)
        if len(set(self.ema_lengths)) < len(self.ema_lengths):
            raise ValueError(f"ema_lengths={list(self.ema_lengths)} must differ from each other")
        if self.snapshot_every < 1:
            raise ValueError(f"snapshot_every={self.snapshot_every} must be at least 1")


class WeightAverages:
    """The averages of one network's weights; of a sharded network, this process's rows of them."""

    def __init__(self, config: EMAConfig, ema: Sequence[Tensor]) -> None:
        """`ema`: the weights, in the order of the parameters; they become the plain average."""
        self.decay = config.ema_decay
        self.gammas = {str(float(length)): power_exponent(length) for length in config.ema_lengths}
        self.tensors = {"ema": list(ema)}
        """The averages by name: "ema", and "ema-0.05" of length 0.05."""
        for length in self.gammas:
            self.tensors[f"ema-{length}"] = [average.clone() for average in ema]

    def update(self, weights: Sequence[Tensor], *, num_updates: int, finite: Tensor) -> None:
        """Take in the weights after update `num_updates`, which changed them where `finite` ()."""
        for name, average in self.tensors.items():
            step: Any = 1.0 - self._decay_at(num_updates, name)
            if name == "ema":  # the others' closed form counts every update
                step = [step * finite.to(average[0])] * len(average)
            torch._foreach_lerp_(average, list(weights), step)  # pyright: ignore[reportPrivateImportUsage]

    def _decay_at(self, update: int, name: str) -> float:
        """The fraction of an average that an update keeps."""
        if name == "ema":
            # The early average forgets its random start; 10 as in the common TensorFlow recipe.
            return min(self.decay, (1 + update) / (10 + update))
        return power_decay(update, self.gammas[name.removeprefix("ema-")])


def power_exponent(length: float) -> float:
    """Gamma of the profile whose standard deviation is `length`, a fraction of the training time.

    0.05 gives 16.97, 0.1 gives 6.94. EDM2, equation 126: the largest root of a cubic, here in
    closed form. Raises ValueError unless 0 < length < 12^-1/2.
    """
    if not 0 < length < LONGEST:
        raise ValueError(f"length={length} of an average must be above 0 and below {LONGEST:.4f}")
    # With a = gamma + 1 the profile is Beta(a, 1), whose variance a / ((a + 1)² (a + 2)) must be
    # length²: a³ + 4a² + (5 - r)a + 2 = 0. With a = root - 4/3, root³ - p root + q = 0 (Viète).
    r = length**-2
    p, q = r + 1 / 3, 4 * r / 3 + 2 / 27
    root = 2 * math.sqrt(p / 3) * math.cos(math.acos(-1.5 * q / p * math.sqrt(3 / p)) / 3)
    return root - 7 / 3


def power_decay(update: int, gamma: float) -> float:
    """What stays of the average at update number `update`, counted from 1; EDM2, equation 127.

    `average = lerp(average, weights, 1 - power_decay(update, gamma))` after each update: the first
    copies the weights. Then the weights of update i have in the average of update t just the weight
    (i^(gamma + 1) - (i - 1)^(gamma + 1)) / t^(gamma + 1): the integral above without an error of
    discretisation, since weights stay as they are between updates.

    An update that was skipped, since its gradient was not finite, is counted too, and the average
    takes in the weights, which have stayed as they were. If the average were left alone, its old
    value would get the weight (gamma + 1) / t, and a synthesis would not know.
    """
    assert update >= 1
    return (1 - 1 / update) ** (gamma + 1)
