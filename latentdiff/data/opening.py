"""The two kinds of data set, which training and caching need not tell apart."""

from latentdiff.data.config import DataConfig
from latentdiff.data.dataset import CaptionedImages
from latentdiff.data.stream import StreamedImages

ImageDataset = CaptionedImages | StreamedImages


def open_images(config: DataConfig) -> ImageDataset:
    """Open the data of a configuration, by random access or in order. Raises ValueError."""
    return StreamedImages(config) if config.stream else CaptionedImages(config)
