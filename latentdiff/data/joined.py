"""JoinedLatents: two latent caches as one, for prior preservation: own images and class images."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, from_numpy
from torch.utils.data import Dataset

from latentdiff.data.cache import LatentCache, collate_moments
from latentdiff.data.crop_flip import CropFlip

MAX_EXAMPLES = 100_000
"""Indices of a kind up to which each of its images comes exactly as often as the others."""


class JoinedLatents(Dataset[dict[str, Any]]):
    """The examples of `own` and then those of `classes`, each with its `row`.

    Both caches are of one VAE, one set of sizes and as many variants.
    """

    def __init__(
        self, own: LatentCache, classes: LatentCache, *, val: np.ndarray, class_weight: float
    ) -> None:
        """`val` (n,): the own examples that are not trained on."""
        self.own, self.classes = own, classes
        self.buckets = np.concatenate([own.buckets, classes.buckets])
        self.examples = as_often(
            np.delete(np.arange(len(own)), val), len(own) + np.arange(len(classes))
        )
        """Rows to train on, with repetitions: both kinds are as frequent."""
        weights = np.repeat([1.0, class_weight], [len(own), len(classes)])
        self.loss_weights: Tensor = from_numpy(weights.astype(np.float32))
        """(N,): the loss weight of each row."""

    @property
    def captions(self) -> Sequence[list[str]]:
        """The captions of each row."""
        return [*self.own.captions, *self.classes.captions]

    def summary(self) -> dict[str, Any]:
        """What data.json and the report say of the class images."""
        return {
            "caption": self.classes.captions[0][0],
            "images": len(self.classes),
            "folder": self.classes.data,
            "loss_weight": float(self.loss_weights[-1]),
        }

    @property
    def crop_flip(self) -> CropFlip:
        """The variants of each image."""
        return self.own.crop_flip

    @property
    def fingerprint(self) -> str:
        """SHA-256 of both caches."""
        both = self.own.fingerprint + self.classes.fingerprint
        return hashlib.sha256(both.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.buckets)

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:
        """Variant v of row i, by (i, v)."""
        row, variant = index
        of_class = row - len(self.own)
        example = self.own[row, variant] if of_class < 0 else self.classes[of_class, variant]
        return example | {"row": row}

    def bucket_moments(self, bucket: int) -> np.ndarray:
        """Read the moments of all examples of a bucket, see `LatentCache.bucket_moments`."""
        caches = [cache for cache in (self.own, self.classes) if (cache.buckets == bucket).any()]
        return np.concatenate([cache.bucket_moments(bucket) for cache in caches])


class Chosen(Dataset[dict[str, Any]]):
    """The examples of a data set by a list of indices, which may repeat; an index is (i, v)."""

    def __init__(self, dataset: JoinedLatents, indices: np.ndarray) -> None:
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:
        return self.dataset[int(self.indices[index[0]]), index[1]]


def collate_joined(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """As `collate_moments`, and `rows` (B,)."""
    return collate_moments(examples) | {"rows": np.array([example["row"] for example in examples])}


def as_often(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Indices of both kinds, repeated until each kind has as many, and each index of a kind too.

    Where that would be more than MAX_EXAMPLES of a kind, an index may come once less than another.
    """
    n, m = len(first), len(second)
    count = max(n, m, min(math.lcm(n, m), MAX_EXAMPLES))
    return np.concatenate([np.resize(first, count), np.resize(second, count)])
