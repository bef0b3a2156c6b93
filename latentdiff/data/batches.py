"""The data order: the examples of a training step are a function of (seed, step), without state."""

import signal
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset


class SampleOrder:
    """`order(step)` gives the indices of a step's examples, which all come from one bucket.

    Any step can be computed without the steps before it. Each bucket shuffles its examples anew in
    each of its epochs, and its batches continue across the end of an epoch, so that every example
    comes up equally often and none is dropped. After e epochs a bucket of n examples has had
    floor(e n / batch_size) batches, so that over the epochs all examples come up equally often,
    even those of a bucket that is smaller than a batch. Each epoch shuffles the order in which the
    buckets take turns.
    """

    def __init__(self, buckets: np.ndarray, *, batch_size: int, seed: int) -> None:
        """Take the bucket index of each example, (N,). Raises ValueError when N is 0."""
        if len(buckets) == 0:
            raise ValueError("the data set is empty")
        _, labels, counts = np.unique(buckets, return_inverse=True, return_counts=True)
        by_bucket = np.argsort(labels, kind="stable").astype(np.int32)
        self.members = np.split(by_bucket, np.cumsum(counts)[:-1])
        self.counts = counts.astype(object)  # Python's integers, which never overflow
        self.batch_size, self.seed = batch_size, seed
        # A batch of a small bucket may span many of its epochs, a batch of a large bucket two.
        self._order = lru_cache(maxsize=2 * len(counts) + 2)(self._shuffled)
        self._labels = lru_cache(maxsize=2)(self._shuffled_labels)

    def __call__(self, step: int) -> list[int]:
        """Return the indices of the step's examples."""
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
        last = first + self.batch_size - 1
        epochs = [self._order(bucket, e) for e in range(first // count, last // count + 1)]
        start = first % count
        return np.concatenate(epochs)[start : start + self.batch_size].tolist()

    def _batches(self, epoch: int) -> list[int]:
        """Count the batches that each bucket has had before an epoch begins."""
        return [epoch * count // self.batch_size for count in self.counts]

    def _shuffled_labels(self, epoch: int) -> np.ndarray:
        """Return the bucket index of each batch of an epoch, shuffled."""
        pairs = zip(self._batches(epoch), self._batches(epoch + 1), strict=True)
        each = [after - before for before, after in pairs]
        labels = np.repeat(np.arange(len(each)), each)
        return np.random.default_rng([self.seed, epoch, len(each)]).permutation(labels)

    def _shuffled(self, bucket: int, epoch: int) -> np.ndarray:
        """Return a bucket's examples, shuffled for one of its own epochs."""
        key = [self.seed, epoch, bucket] if bucket else [self.seed, epoch]
        order = np.random.default_rng(key).permutation(len(self.members[bucket]))
        return self.members[bucket][order]


def check_batch(batch_size: int, num_samples: int) -> None:
    """Raise ValueError when there are fewer examples than one step of all processes takes."""
    if batch_size > num_samples:
        raise ValueError(
            f"batch_size={batch_size} must be at most {num_samples}, the number of examples in "
            "the data"
        )


def step_ids(
    start: int,
    *,
    num_samples: int,
    batch_size: int,
    seed: int,
    stop: int,
    rank: int = 0,
    world_size: int = 1,
    buckets: np.ndarray | None = None,
    variants: Callable[[int], Sequence[int]] | None = None,
) -> Iterator[list[Any]]:
    """Yield the indices of this process's rows of steps `start` … `stop - 1`.

    `buckets` (N,) holds the bucket index of each example, where their sizes differ.
    `variants(step)` gives the variant (crop and flip) of each example of a step; with it an index
    is a pair (example, variant).
    """
    if buckets is None:
        buckets = np.zeros(num_samples, dtype=np.int8)
    assert len(buckets) == num_samples
    order = SampleOrder(buckets, batch_size=batch_size, seed=seed)
    for step in range(start, stop):
        indices: list[Any] = order(step)
        if variants is not None:
            indices = list(zip(indices, variants(step), strict=True))
        yield local_rows(indices, rank, world_size)


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
    """Yield this process's rows of the batches of steps `start` … `stop - 1`.

    Worker processes prefetch them. `buckets` and `variants` are those of `step_ids`; with
    `variants` the data set is indexed by pairs (example, variant).
    """
    ids = partial(
        step_ids,
        start,
        num_samples=num_samples,
        batch_size=batch_size,
        seed=seed,
        stop=stop,
        rank=rank,
        world_size=world_size,
        buckets=buckets,
        variants=variants,
    )
    loader = DataLoader(
        dataset,
        batch_sampler=_Batches(ids),  # pyright: ignore[reportArgumentType] # any iterable will do
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=outlive_signals,
    )
    return iter(loader)


def local_rows(rows: Any, rank: int, world_size: int) -> Any:
    """Return one process's rows of a global batch, a sequence or a tensor with the batch first."""
    size = len(rows) // world_size
    return rows[rank * size : (rank + 1) * size]


def outlive_signals(worker: int) -> None:
    """Ignore the signals of a batch system, and Control-C, in a DataLoader worker.

    The system, or the terminal, sends them to all processes; the main process handles them, and
    needs its workers until it has stopped.
    """
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class _Batches:
    """Calls `ids` at each iteration, since a DataLoader may iterate its batch sampler again."""

    def __init__(self, ids: Callable[[], Iterator[list[Any]]]) -> None:
        self.ids = ids

    def __iter__(self) -> Iterator[list[Any]]:
        return self.ids()
