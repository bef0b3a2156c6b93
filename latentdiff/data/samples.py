"""Converts samples: a file's bytes to an image or a square tensor, and examples to a batch."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentdiff.data.buckets import Size, check_scale, nearest
from latentdiff.data.config import DataConfig
from latentdiff.data.crop_flip import crop_to
from latentdiff.data.decode import BadSample, decode
from latentdiff.data.forms.form import FileRange
from latentdiff.images import to_rgb

DIGEST = 16  # bytes


class EncodedSample(NamedTuple):
    """A sample whose image is not decoded yet, and may still turn out to be bad."""

    name: str
    """The sample's name in messages, such as its file name."""
    file: bytes | FileRange | None
    captions: list[str]

    def read(self) -> bytes:
        """Return the bytes of the image file. Raises BadSample when it cannot be read."""
        assert self.file is not None
        return self.file.read() if isinstance(self.file, FileRange) else self.file


class Sample(NamedTuple):
    """An image of the data set, decoded to upright RGB at its full size, with its captions."""

    name: str
    image: Image.Image
    captions: list[str]
    digest: bytes
    """`digest` of the image file."""


def digest(data: bytes) -> bytes:
    """BLAKE2 of an image file, by which it is known again."""
    return hashlib.blake2b(data, digest_size=DIGEST).digest()


def decoded(sample: EncodedSample, config: DataConfig) -> Sample | BadSample:
    """Decode a sample's image, or tell what is wrong with it."""
    try:
        data = sample.read()
        image = decode(data, config.decoding()).image
    except BadSample as error:
        return BadSample(error.reason, f"{sample.name!r} {error.detail}".strip())
    return Sample(sample.name, image, sample.captions, digest(data))


def square_pixels(data: bytes, config: DataConfig) -> Tensor:
    """Decode a file and crop its image to a square, (3, S, S) uint8.

    Raises BadSample when the file cannot be decoded, or its image is too small.
    """
    image = decode(data, config.decoding()).image
    side = config.image_size
    check_scale(image.size, (side, side), config.upscale_limit)
    pixels = torch.from_numpy(np.array(square(image, side)))
    return pixels.permute(2, 0, 1).contiguous()


def square(image: Image.Image, size: int) -> Image.Image:
    """Convert an image to RGB on white, scale its shorter side to `size` and crop the centre."""
    return crop_to(to_rgb(image), (size, size))


def check_size(size: Size, config: DataConfig) -> None:
    """Raise BadSample when an image (width, height) is too small for the configuration."""
    check_scale(size, config.buckets()[nearest(size, config.buckets())], config.upscale_limit)


def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Collate examples to `{"images": (B, 3, S, S) uint8, "captions": [[str, …], …]}`."""
    return {
        "images": torch.stack([example["image"] for example in examples]),
        "captions": [example["captions"] for example in examples],
    }
