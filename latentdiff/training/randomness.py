"""Random numbers as functions of (seed, step, purpose): a resumed run needs no RNG state."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class MicroBatch:
    """Which of `count` equal slices of a global batch is worked on: number `index`.

    Every process works through its micro-batches one after the other, and those of process 0 come
    first: index = rank * gradient_accumulation_steps + number, and count is the product of
    processes and gradient_accumulation_steps.
    """

    index: int = 0
    count: int = 1

    def rows(self, batch: Any) -> Any:
        """The slice of a global batch: of a sequence or of a tensor's first axis."""
        size = len(batch) // self.count
        return batch[self.index * size : (self.index + 1) * size]


def micro_batches(batch: Any, count: int) -> list[Any]:
    """Slice one process's batch, a mapping of sequences and tensors, into `count` equal ones."""
    if count == 1:
        return [batch]
    slices = [MicroBatch(index, count) for index in range(count)]
    return [{name: one.rows(values) for name, values in batch.items()} for one in slices]


def generator(seed: int, step: int, purpose: str) -> torch.Generator:
    """A CPU generator for one purpose ("noise", "timestep", …) in one training step.

    Every process draws for the whole global batch and keeps its own rows, so that the numbers do
    not depend on how many processes there are.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def choose(options: Sequence[Sequence[T]], u: Sequence[float]) -> list[T]:
    """One of each row's options, by a number u of each that is uniform in [0, 1)."""
    return [row[int(x * len(row))] for row, x in zip(options, u, strict=True)]
