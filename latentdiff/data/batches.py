"""Which examples make up which training step: a function of (seed, step), without state."""

import signal
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset


def sample_ids(step: int, *, num_samples: int, batch_size: int, seed: int) -> list[int]:
    """The examples of one step: a walk through one shuffled epoch after the other.

    Batches run on across the end of an epoch, so every example comes up equally often and none is
    dropped. Raises ValueError when the set is empty.
    """
    if num_samples < 1:
        raise ValueError("the data set is empty")
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [
        int(_order(seed, position // num_samples, num_samples)[position % num_samples])
        for position in positions
    ]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


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
) -> Iterator[Any]:
    """This process's part of the batches of steps `start` … `stop - 1`, read ahead by workers."""

    def ids() -> Iterator[list[int]]:
        for step in range(start, stop):
            whole = sample_ids(step, num_samples=num_samples, batch_size=batch_size, seed=seed)
            yield shard(whole, rank, world_size)

    loader = DataLoader(
        dataset,
        batch_sampler=_Batches(ids),  # pyright: ignore[reportArgumentType] # any iterable will do
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=_outlive_signals,
    )
    return iter(loader)


def shard(rows: Any, rank: int, world_size: int) -> Any:
    """The rows of a global batch, a sequence or a tensor's first axis, that are one process's."""
    size = len(rows) // world_size
    return rows[rank * size : (rank + 1) * size]


def _outlive_signals(worker: int) -> None:
    """A batch system sends its signals to workers too, which the main process needs to the end."""
    for name in ("SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class _Batches:
    """An iterable over freshly made id lists; DataLoader asks for something it can iterate anew."""

    def __init__(self, ids: Callable[[], Iterator[list[int]]]) -> None:
        self.ids = ids

    def __iter__(self) -> Iterator[list[int]]:
        return self.ids()
