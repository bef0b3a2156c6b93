"""Images and latents that stay in the memory of the device that trains on them.

A step's batch is gathered there by index: nothing is read, decoded or copied, and there are no
worker processes. The batches have the bits of `CaptionedImages.batches` and of a `LatentCache`'s.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentdiff.data.batches import step_ids
from latentdiff.data.cache import LatentCache
from latentdiff.data.caption_table import CaptionTable
from latentdiff.data.dataset import CaptionedImages
from latentdiff.data.joined import JoinedLatents
from latentdiff.data.prefetch import prefetch


class ResidentImages:
    """All images of a data set, (N, 3, S, S) uint8 on the device, and the table of its captions.

    A bad image is replaced by the next good one, as in the data set itself.
    """

    def __init__(self, dataset: CaptionedImages, device: torch.device) -> None:
        """Decode everything, in `num_workers` threads.

        Raises ValueError when there are too many bad samples.
        """
        side, threads = dataset.config.image_size, dataset.config.num_workers
        images = torch.empty(len(dataset), 3, side, side, dtype=torch.uint8)

        def captions() -> Iterator[list[str]]:
            examples = prefetch(dataset.__getitem__, range(len(dataset)), threads=threads)
            for image, example in zip(images, examples, strict=True):
                image.copy_(example["image"])
                yield example["captions"]

        self.captions = CaptionTable(captions())
        self.images = images.to(device)

    def summary(self) -> str:
        """Say how much there is, and the memory that it takes."""
        return _summary("images", len(self.images), [self.images])

    def batches(
        self, start: int, *, examples: np.ndarray | None = None, **options: Any
    ) -> Iterator[dict[str, Any]]:
        """Yield `{"images": (b, 3, S, S) uint8, "rows": (b,)}` of each step from `start` on.

        `examples` (n,) are the indices that are drawn from, by default all. `options` are those
        of `step_ids`. `rows` are the examples' indices, by which their captions are found.
        """
        chosen = np.arange(len(self.images)) if examples is None else examples
        for ids in step_ids(start, num_samples=len(chosen), **options):
            rows = chosen[ids]
            yield {"images": gather(self.images, rows), "rows": rows}


class ResidentLatents:
    """All moments of a latent cache on the device, in float16 as they are on disk."""

    def __init__(self, cache: LatentCache | JoinedLatents, device: torch.device) -> None:
        """Read every file. Raises ValueError for one that is missing or damaged."""
        self.buckets = np.array(cache.buckets)
        self.place = np.empty(len(cache), dtype=np.int64)  # of an example in its bucket
        self.moments: dict[int, Tensor] = {}
        for bucket in np.unique(self.buckets).tolist():
            members = np.flatnonzero(self.buckets == bucket)
            self.place[members] = np.arange(len(members))
            moments = torch.from_numpy(cache.bucket_moments(bucket))  # (n, V, …, h, w)
            self.moments[bucket] = moments.flatten(0, 1).to(device)
        self.num_variants = cache.crop_flip.num_variants

    def summary(self) -> str:
        """Say how much there is, and the memory that it takes."""
        count = len(self.place) * self.num_variants
        return _summary("latents", count, list(self.moments.values()))

    def batches(
        self,
        start: int,
        *,
        examples: np.ndarray,
        variants: Callable[[int], Sequence[int]],
        **options: Any,
    ) -> Iterator[dict[str, Any]]:
        """Yield `{"moments": (b, 2C, h, w) float32, "rows": (b,)}` of each step from `start` on.

        With masks the moments have 4C + 1 channels, as in the cache. `examples` (n,) are the
        indices that are drawn from; `variants` and `options` are those of
        `step_ids`.
        """
        buckets = self.buckets[examples]
        every = step_ids(
            start, num_samples=len(examples), buckets=buckets, variants=variants, **options
        )
        for pairs in every:
            ids, chosen = np.array(pairs).T
            rows = examples[ids]
            index = self.place[rows] * self.num_variants + chosen
            moments = gather(self.moments[int(self.buckets[rows[0]])], index)
            yield {"moments": moments.float(), "rows": rows}


def _summary(what: str, count: int, tensors: Sequence[Tensor]) -> str:
    size = sum(tensor.nbytes for tensor in tensors) / 2**20
    return f"{count} {what}, {size:.1f} MiB of {tensors[0].device}"


def gather(source: Tensor, index: np.ndarray) -> Tensor:
    """Return the rows of a tensor by their indices (b,), without waiting for its device."""
    return source.index_select(0, to_device(torch.from_numpy(index), source.device))


def pinned(value: Any, device: torch.device) -> Any:
    """Return a tensor of the host in memory that a CUDA device copies from by itself.

    What is no tensor, or on the device already, is returned as it is, and so is all for a CPU.
    """
    if device.type == "cuda" and isinstance(value, Tensor) and not value.is_cuda:
        with torch.cuda.device(device):  # every thread has a current device of its own
            return value.pin_memory()
    return value


def to_device(value: Any, device: torch.device) -> Any:
    """Move a tensor to the device, for which the host does not wait; other values stay."""
    if not isinstance(value, Tensor):
        return value
    return pinned(value, device).to(device, non_blocking=True)
