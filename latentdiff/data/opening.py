"""What training asks of its images, whether they have random access or come as a stream."""

from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from typing import Any

from torch.utils.data import Dataset

from latentdiff.data.batches import batches
from latentdiff.data.config import DataConfig
from latentdiff.data.images import CaptionedImages, collate
from latentdiff.data.stream import StreamedImages


def open_images(config: DataConfig) -> CaptionedImages | StreamedImages:
    """The data of a configuration, by random access or in order. Raises ValueError."""
    return StreamedImages(config) if config.stream else CaptionedImages(config)


def image_batches(
    dataset: CaptionedImages | StreamedImages,
    start: int,
    *,
    batch_size: int,
    seed: int,
    stop: int,
    rank: int = 0,
    world_size: int = 1,
    examples: Dataset[Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """This process's part of the batches of steps `start` … `stop - 1`, see `collate`.

    examples: of a data set with random access, those that batches are made of, if not all.
    """
    if isinstance(dataset, StreamedImages):
        make = dataset.batches
    else:
        chosen: Any = dataset if examples is None else examples
        make = partial(batches, chosen, num_samples=len(chosen), collate=collate)
    return make(
        start,
        batch_size=batch_size,
        seed=seed,
        stop=stop,
        rank=rank,
        world_size=world_size,
        num_workers=dataset.config.num_workers,
    )


def some_examples(
    dataset: CaptionedImages | StreamedImages, count: int
) -> Iterator[dict[str, Any]]:
    """Up to `count` examples, the same each time: all over a set, or a stream's first."""
    if isinstance(dataset, StreamedImages):
        return islice(dataset.examples(), count)
    count = min(count, len(dataset))
    return (dataset[i * len(dataset) // count] for i in range(count))


def some_captions(dataset: CaptionedImages | StreamedImages, count: int) -> Iterator[str]:
    """The captions of all samples, or of a stream's first `count`; none is in memory."""
    if isinstance(dataset, StreamedImages):
        return chain.from_iterable(islice(dataset.captions(), count))
    return chain.from_iterable(dataset.captions)
