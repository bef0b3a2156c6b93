"""The validation split, and the EMA network's loss on it by bins of t.

The bins are of equal width. They are logged apart because their mean hides much: it falls even if
a network only improves at high noise, where that is easy. Examples, noise and t are the same each
time, so that two values differ by the weights alone. Of few examples each has several noises and
times; whether the loss rises again is said in `by_heart.py`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from latentdiff.diffusion import Diffusion
from latentdiff.training.logging.meter import Metrics
from latentdiff.training.processes import Processes
from latentdiff.training.randomness import generator

BINS = 8
"""Bins of t, from low noise to high."""
MAX_EXAMPLES = 256
"""Examples in a validation split at most: each takes BINS forward passes. Fewer are drawn several
times, until there are as many passes."""
VAL_ERRORS = "val_errors"
"""What a task returns beside its scalar metrics: the loss of each held-out example, (n, draws)."""


def val_indices(num_samples: int, fraction: float, *, seed: int) -> np.ndarray:
    """(n,) indices of the validation split, ascending; n = 0 if the fraction is below one example.

    They are a function of the number of examples and the seed.
    """
    count = min(int(fraction * num_samples), MAX_EXAMPLES)
    if count == 0:
        return np.empty(0, dtype=np.int64)
    draws = torch.rand(num_samples, generator=generator(seed, 0, "held out"), dtype=torch.float64)
    return draws.topk(count, largest=False).indices.sort().values.numpy()


def num_draws(num_val: int, *, validate_every: int, batch_size: int) -> int:
    """How many noises, and times in each bin, each of `num_val` held-out examples gets.

    As many as give MAX_EXAMPLES pairs of an example and a noise, but no more forward passes than
    examples are trained on from one validation to the next: a validation takes a third of the time
    of those steps at most, of whose three passes two are backward, if it takes more than one draw.
    """
    if num_val == 0:
        return 1
    affordable = validate_every * batch_size // (num_val * BINS)
    return max(1, min(math.ceil(MAX_EXAMPLES / num_val), affordable))


class Subset(Dataset[Any]):
    """A data set without the examples `left_out`, in its order; an index may be (index, …)."""

    def __init__(self, dataset: Any, left_out: np.ndarray) -> None:
        self.dataset = dataset
        # Their number before an index follows by bisection, without a table as long as the data.
        self._before = left_out - np.arange(len(left_out))
        self._length = len(dataset) - len(left_out)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int | tuple[int, Any]) -> Any:
        if isinstance(index, tuple):
            return self.dataset[self.full_index(index[0]), *index[1:]]
        return self.dataset[self.full_index(index)]

    def full_index(self, index: int) -> int:
        """The index that an example has in the full data set."""
        return int(index + np.searchsorted(self._before, index, side="right"))


def stratified_t(diffusion: Diffusion, count: int, *, seed: int) -> Tensor:
    """(count, BINS): a timestep in each bin for each example, stratified over the bin.

    As `LossConfig.sample_t` gives them: real numbers for `flow`, else integers.
    """
    draw = generator(seed, 0, "held out t")
    order = torch.stack([torch.randperm(count, generator=draw) for _ in range(BINS)], dim=1)
    t = (torch.arange(BINS) + (order + 0.5) / count) / BINS * diffusion.num_timesteps
    return t if diffusion.schedule == "flow" else t.ceil().long()


def validation_loss(
    errors: Callable[[Sequence[int]], Tensor],
    buckets: Sequence[int],
    *,
    batch_size: int,
    processes: Processes,
    draws: int = 1,
) -> Metrics:
    """The mean `val_loss` and each bin's `val_loss_0` … over the rows of all processes, VAL_ERRORS.

    Row r is draw r % draws of example r // draws of the split, and `buckets` has its bucket.
    `errors(rows)` returns the losses, (len(rows), BINS), of up to `batch_size` of them, all of one
    bucket. Every process must call it.
    """
    order = sorted(range(len(buckets)), key=lambda row: buckets[row])
    local = order[processes.rank :: processes.count]

    def local_errors() -> dict[int, list[float]]:
        of_row: dict[int, list[float]] = {}
        for rows in _batches(local, buckets, batch_size):
            of_row |= zip(rows, errors(rows).double().tolist(), strict=True)
        return of_row

    of_row = {}
    for of_process in processes.gather(processes.on_all(local_errors)):
        of_row |= of_process
    # In the order of examples, so that the sum does not depend on the number of processes.
    losses = torch.tensor([of_row[row] for row in sorted(of_row)], dtype=torch.float64)
    means = losses.mean(dim=0)
    names = {f"val_loss_{number}": mean for number, mean in enumerate(means)}
    of_example = losses.mean(dim=1).unflatten(0, (-1, draws))
    return {"val_loss": means.mean(), **names, VAL_ERRORS: of_example}


def _batches(
    rows: Sequence[int], buckets: Sequence[int], batch_size: int
) -> Iterator[Sequence[int]]:
    for _, group in groupby(rows, key=lambda row: buckets[row]):
        same = list(group)
        for start in range(0, len(same), batch_size):
            yield same[start : start + batch_size]
