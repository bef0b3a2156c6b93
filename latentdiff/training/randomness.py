"""Random numbers as functions of (seed, step, purpose): a resumed run needs no RNG state."""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


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
