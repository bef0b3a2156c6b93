"""The two kinds of data set, which training and caching need not tell apart."""

from collections.abc import Iterator
from typing import Any

from latentdiff.data.config import DataConfig
from latentdiff.data.dataset import CaptionedImages
from latentdiff.data.stream import StreamedImages

ImageDataset = CaptionedImages | StreamedImages


def open_images(config: DataConfig) -> ImageDataset:
    """Open the data of a configuration, by random access or in order. Raises ValueError."""
    return StreamedImages(config) if config.stream else CaptionedImages(config)


def image_batches(dataset: ImageDataset, start: int, **options: Any) -> Iterator[dict[str, Any]]:
    """See ImageDataset.batches."""
    return dataset.batches(start, **options)


def some_examples(dataset: ImageDataset, count: int) -> Iterator[dict[str, Any]]:
    """See ImageDataset.some_examples."""
    return dataset.some_examples(count)


def some_captions(dataset: ImageDataset, count: int) -> Iterator[str]:
    """See ImageDataset.some_captions."""
    return dataset.some_captions(count)
