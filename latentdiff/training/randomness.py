"""Random numbers as functions of (seed, step, purpose): a resumed run needs no RNG state."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """Which of `count` equal parts of a global batch is worked on: number `index`.

    Every process works through its parts one after the other, and the parts of process 0 come
    first: index = rank * accumulation + part and count = processes * accumulation.
    """

    index: int = 0
    count: int = 1

    def rows(self, whole: Any) -> Any:
        """The part's rows of a sequence or of a tensor's first axis, of the global batch."""
        size = len(whole) // self.count
        return whole[self.index * size : (self.index + 1) * size]


def parts(batches: Iterator[Mapping[str, Any]], count: int) -> Iterator[dict[str, Any]]:
    """Cut each batch of sequences and tensors, by name, into `count` parts, one after the other."""
    for batch in batches:
        for index in range(count):
            share = Share(index, count)
            yield {name: share.rows(value) for name, value in batch.items()}


def generator(seed: int, step: int, purpose: str) -> torch.Generator:
    """A CPU generator for one purpose ("noise", "timestep", …) in one training step.

    Every process draws for the whole global batch and keeps its own rows, so that the numbers do
    not depend on how many processes there are.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def choose(options: Sequence[Sequence[T]], places: Sequence[float]) -> list[T]:
    """One of each row's options: the one at its place, which is uniform in [0, 1)."""
    return [row[int(place * len(row))] for row, place in zip(options, places, strict=True)]
