"""Opens the data set of a configuration: CaptionedImages or, with `stream`, StreamedImages."""

from latentdiff.data.config import DataConfig
from latentdiff.data.dataset import CaptionedImages
from latentdiff.data.stream import StreamedImages

ImageDataset = CaptionedImages | StreamedImages


def open_images(config: DataConfig) -> ImageDataset:
    """Open a data set with random access or as a stream. Raises ValueError as their classes do."""
    return StreamedImages(config) if config.stream else CaptionedImages(config)
