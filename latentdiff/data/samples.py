"""One sample on its way: from the bytes of its file to an image, a square of pixels and a batch."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentdiff.data.buckets import Size, check_scale, nearest
from latentdiff.data.config import DataConfig
from latentdiff.data.crop_flip import crop_to
from latentdiff.data.decode import decode
from latentdiff.images import to_rgb


class Sample(NamedTuple):
    """One image as it is in the data, RGB and upright, at its full size."""

    name: str
    """What it is called in messages, such as the file's name."""
    image: Image.Image
    captions: list[str]


def square_pixels(data: bytes, config: DataConfig) -> Tensor:
    """A file's image as a square, (3, S, S) uint8. Raises BadSample."""
    image = decode(data, config.decoding()).image
    side = config.image_size
    check_scale(image.size, (side, side), config.upscale_limit)
    pixels = torch.from_numpy(np.array(square(image, side)))
    return pixels.permute(2, 0, 1).contiguous()


def square(image: Image.Image, size: int) -> Image.Image:
    """Upright, on white where transparent, shorter side scaled to `size`, the middle cropped."""
    return crop_to(to_rgb(image), (size, size))


def check_size(size: Size, config: DataConfig) -> None:
    """Raise BadSample when an image (width, height) is too small for the configuration."""
    check_scale(size, config.buckets()[nearest(size, config.buckets())], config.upscale_limit)


def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Examples -> `{"images": (B, 3, S, S) uint8, "captions": [[str, …], …]}`."""
    return {
        "images": torch.stack([example["image"] for example in examples]),
        "captions": [example["captions"] for example in examples],
    }
