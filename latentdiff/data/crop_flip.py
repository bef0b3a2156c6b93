"""CropFlip: how an image is scaled and cropped to a size, in one or in several variants."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from latentdiff.data.buckets import Size

SMALLEST = 0.8  # of the largest crop's side, for other crops: details stay about as large


@dataclass(frozen=True)
class CropFlip:
    """Which variants of an image there are: crops, and perhaps their mirror images.

    Variant 0 is the largest crop, in the middle. The sides of others are 80 to 100 % of its sides,
    but not so little that a crop has fewer pixels than the variant, and they lie anywhere in the
    image. Size and position are functions of the image's name and the variant. An image with no
    more pixels than the variant has the same crop each time. Raises ValueError for fewer than one
    crop.
    """

    crops: int = 1
    """Crops of each image, of which each visit draws one."""
    flip: bool = False
    """Mirror images as well."""

    def __post_init__(self) -> None:
        if self.crops < 1:
            raise ValueError(f"crops={self.crops} must be at least 1")

    @property
    def num_variants(self) -> int:
        """How many variants there are, V."""
        return self.crops * (2 if self.flip else 1)

    def variants(self, image: Image.Image, name: str, size: Size) -> Tensor:
        """An RGB image's variants, (V, 3, H, W) uint8; mirror images follow all the others."""
        crops = [crop_to(image, size)]
        for number in range(1, self.crops):
            u, *position = _uniform(f"{name}/{number}", 3)
            fraction = SMALLEST + (1 - SMALLEST) * u
            crops.append(crop_to(image, size, fraction=fraction, position=position))
        if self.flip:
            crops += [ImageOps.mirror(crop) for crop in crops]
        pixels = torch.from_numpy(np.stack([np.asarray(crop) for crop in crops]))
        return rearrange(pixels, "v h w c -> v c h w").contiguous()


def crop_to(
    image: Image.Image,
    size: Size,
    *,
    fraction: float = 1.0,
    position: Sequence[float] = (0.5, 0.5),
) -> Image.Image:
    """Crop a box of the shape of `size` out of an image, and scale it to that size.

    Its sides are `fraction` of those of the largest box, if it then has the pixels. `position` is
    where it lies from left to right and from top to bottom, each from 0 to 1.
    """
    scale = min(image.width / size[0], image.height / size[1])  # image pixels to one of `size`
    scale = max(fraction * scale, min(scale, 1.0))
    width, height = size[0] * scale, size[1] * scale
    # Rounding may lead a hair out of the image, which Pillow refuses.
    left = max(0.0, (image.width - width) * position[0])
    top = max(0.0, (image.height - height) * position[1])
    box = (left, top, min(left + width, image.width), min(top + height, image.height))
    return image.resize(size, Image.Resampling.LANCZOS, box=box)


def _uniform(key: str, count: int) -> Iterator[float]:
    """Numbers in [0, 1), a function of the key."""
    digest = hashlib.sha256(key.encode()).digest()
    for start in range(0, 4 * count, 4):
        yield int.from_bytes(digest[start : start + 4], "little") / 2**32
