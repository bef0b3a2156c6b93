"""Random numbers as functions of (seed, step, purpose): a resumed run needs no RNG state."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class MicroBatch:
    """Slice number `index` of the `count` equal slices of a global batch.

    Each process runs its micro-batches one after the other, and those of rank 0 come first:
    index = rank * gradient_accumulation_steps + number within the process, and
    count = processes * gradient_accumulation_steps.
    """

    index: int = 0
    count: int = 1

    def rows(self, batch: Any) -> Any:
        """The micro-batch's rows of a global batch, a sequence or a tensor."""
        size = len(batch) // self.count
        return batch[self.index * size : (self.index + 1) * size]


def micro_batches(batch: Any, count: int) -> list[Any]:
    """Split one process's batch, a mapping of sequences and tensors, into `count` micro-batches."""
    if count == 1:
        return [batch]
    slices = [MicroBatch(index, count) for index in range(count)]
    return [{name: one.rows(values) for name, values in batch.items()} for one in slices]


def generator(seed: int, step: int, purpose: str) -> torch.Generator:
    """A CPU generator for one purpose ("noise", "timestep", …) in one training step.

    Every process draws for the full global batch and uses its local rows, so that the numbers do
    not depend on how many processes there are.
    """
    return torch.Generator().manual_seed(seed_of(seed, step, purpose))


def seed_of(seed: int, step: int, purpose: str) -> int:
    """The seed of `generator`, for what draws from torch's own generator, such as dropout."""
    digest = hashlib.sha256(f"{seed}/{step}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def choose(options: Sequence[Sequence[T]], u: Sequence[float]) -> list[T]:
    """One option of each row, chosen by the row's number u, which is uniform in [0, 1)."""
    return [row[int(x * len(row))] for row, x in zip(options, u, strict=True)]
