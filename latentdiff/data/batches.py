"""Which examples make up which training step: a function of (seed, step), without state."""

import signal
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset


class SampleOrder:
    """`order(step)` is the examples of a step, all of one bucket; any step is as quick as the next.

    A bucket goes through one shuffled epoch of its examples after the other, and batches run on
    across the end of an epoch, so every example of it comes up equally often and none is dropped.
    After e epochs a bucket of n examples has had floor(e n / batch_size) batches: over the epochs
    the examples of all buckets come up equally often, also those of a bucket that is smaller than
    a batch. In what order an epoch's batches are of which bucket is drawn anew for each.
    """

    def __init__(self, buckets: np.ndarray, *, batch_size: int, seed: int) -> None:
        """`buckets` (N,): the number of each example's bucket. Raises ValueError without any."""
        if len(buckets) == 0:
            raise ValueError("the data set is empty")
        _, labels, counts = np.unique(buckets, return_inverse=True, return_counts=True)
        by_bucket = np.argsort(labels, kind="stable").astype(np.int32)
        self.members = np.split(by_bucket, np.cumsum(counts)[:-1])
        self.counts = counts.astype(object)  # Python's integers, which never overflow
        self.batch_size, self.seed = batch_size, seed
        # Of a small bucket one batch may span many epochs, of a large one two.
        self._order = lru_cache(maxsize=2 * len(counts) + 2)(self._shuffled)
        self._labels = lru_cache(maxsize=2)(self._shuffled_labels)

    def __call__(self, step: int) -> list[int]:
        """The indices of a step's examples."""
        # The epoch is the first whose end is after the step.
        low = step * self.batch_size // sum(self.counts)
        high = low + len(self.counts) * self.batch_size // sum(self.counts) + 2
        epoch = bisect_right(range(high), step, lo=low, key=lambda e: sum(self._batches(e + 1)))
        labels = self._labels(epoch)
        batch = step - sum(self._batches(epoch))  # of the epoch
        bucket = int(labels[batch])
        number = self._batches(epoch)[bucket] + np.count_nonzero(labels[:batch] == bucket)
        count = len(self.members[bucket])
        first = int(number) * self.batch_size
        return [
            int(self._order(bucket, position // count)[position % count])
            for position in range(first, first + self.batch_size)
        ]

    def _batches(self, epoch: int) -> list[int]:
        """How many batches each bucket has had when an epoch begins."""
        return [epoch * count // self.batch_size for count in self.counts]

    def _shuffled_labels(self, epoch: int) -> np.ndarray:
        """The bucket of each batch of an epoch."""
        pairs = zip(self._batches(epoch), self._batches(epoch + 1), strict=True)
        each = [after - before for before, after in pairs]
        labels = np.repeat(np.arange(len(each)), each)
        return np.random.default_rng([self.seed, epoch, len(each)]).permutation(labels)

    def _shuffled(self, bucket: int, epoch: int) -> np.ndarray:
        """A bucket's examples in the order of one of its own epochs."""
        key = [self.seed, epoch, bucket] if bucket else [self.seed, epoch]
        order = np.random.default_rng(key).permutation(len(self.members[bucket]))
        return self.members[bucket][order]


def check_batch(batch_size: int, num_samples: int) -> None:
    """Raise ValueError when there are fewer examples than one step takes, of all processes."""
    if batch_size > num_samples:
        raise ValueError(
            f"batch_size={batch_size} must be at most {num_samples}, the number of examples in "
            "the data"
        )


def batches(
    dataset: Dataset[Any],
    start: int,
    *,
    num_samples: int,
    batch_size: int,
    seed: int,
    stop: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    collate: Callable[[Sequence[Any]], Any] | None = None,
    buckets: np.ndarray | None = None,
    variants: Callable[[int], Sequence[int]] | None = None,
) -> Iterator[Any]:
    """This process's rows of the batches of steps `start` … `stop - 1`, prefetched by workers.

    `buckets` (N,) are the examples' if they are not all of one size. With `variants`, which
    gives the variant of each example of a step, the data set is asked for pairs
    (example, variant).
    """
    if buckets is None:
        buckets = np.zeros(num_samples, dtype=np.int8)
    assert len(buckets) == num_samples
    order = SampleOrder(buckets, batch_size=batch_size, seed=seed)

    def ids() -> Iterator[list[Any]]:
        for step in range(start, stop):
            indices: list[Any] = order(step)
            if variants is not None:
                indices = list(zip(indices, variants(step), strict=True))
            yield local_rows(indices, rank, world_size)

    loader = DataLoader(
        dataset,
        batch_sampler=_Batches(ids),  # pyright: ignore[reportArgumentType] # any iterable will do
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=outlive_signals,
    )
    return iter(loader)


def local_rows(rows: Any, rank: int, world_size: int) -> Any:
    """The rows of a global batch (a sequence, or a tensor's first axis) that are one process's."""
    size = len(rows) // world_size
    return rows[rank * size : (rank + 1) * size]


def outlive_signals(worker: int) -> None:
    """A batch system sends its signals to workers too, which the main process needs to the end."""
    for name in ("SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class _Batches:
    """An iterable over freshly made id lists; DataLoader asks for something it can iterate anew."""

    def __init__(self, ids: Callable[[], Iterator[list[Any]]]) -> None:
        self.ids = ids

    def __iter__(self) -> Iterator[list[Any]]:
        return self.ids()
