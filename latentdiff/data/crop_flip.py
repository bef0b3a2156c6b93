"""CropFlip: how an image is scaled and cropped to a size, in one or in several variants.

For inpainting each of them is masked as well.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from latentdiff.data.buckets import Size
from latentdiff.data.masks import random_mask

MIN_CROP = 0.8  # side of the smallest random crop, relative to the largest crop's


@dataclass(frozen=True)
class CropFlip:
    """The variants of each image: crops and, with `flip`, their mirror images; masks of each.

    Variant 0 is the largest crop, at the centre of the image. The sides of the other crops are 80
    to 100 % of its sides, but not so small that the crop would be enlarged, and their position is
    uniform over the image. Their size and position are functions of the image's name and the
    variant's number. All crops of an image that has no more pixels than the target size have the
    largest size. With `masks` each crop and mirror image is as many variants, one after the other,
    each with a mask of its own: see `random_mask`. Raises ValueError for fewer than one crop.
    """

    crops: int = 1
    """Number of crops of each image; each training step draws one."""
    flip: bool = False
    """Whether each crop has a mirror image."""
    masks: int = 0
    """For inpainting: number of random masks of each crop and of each mirror image; each training
    step draws one. 0 is none."""

    def __post_init__(self) -> None:
        if self.crops < 1:
            raise ValueError(f"crops={self.crops} must be at least 1")
        if self.masks < 0:
            raise ValueError(f"masks={self.masks} must be at least 0")

    @property
    def num_variants(self) -> int:
        """V, the number of variants of each image."""
        return self.crops * (2 if self.flip else 1) * max(1, self.masks)

    def to_dict(self) -> dict[str, Any]:
        """The options as a cache notes them: one without masks as those that knew of none."""
        noted = asdict(self)
        return noted if self.masks else {name: noted[name] for name in ("crops", "flip")}

    def random_masks(self, name: str, size: Size) -> Tensor:
        """Return the masks of an image's variants, (V, 1, H, W) float32, 1 where to paint."""
        masks = [random_mask(f"{name}/{variant}", size) for variant in range(self.num_variants)]
        return torch.from_numpy(np.stack(masks)).float()[:, None]

    def views(self, image: Image.Image, name: str, size: Size) -> Tensor:
        """Return an RGB image's crops and then their mirror images, (…, 3, H, W) uint8."""
        crops = [crop_to(image, size)]
        for number in range(1, self.crops):
            u, *position = _uniform(f"{name}/{number}", 3)
            fraction = MIN_CROP + (1 - MIN_CROP) * u
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
    """Crop a box with the aspect ratio of `size` (width, height), and scale it to that size.

    The box's sides are `fraction` of the largest box's, or more where the box would otherwise have
    to be enlarged. `position` is the box's place from left to right and from top to bottom, each
    from 0 to 1.
    """
    scale = min(image.width / size[0], image.height / size[1])  # image pixels to one of `size`
    scale = max(fraction * scale, min(scale, 1.0))
    width, height = size[0] * scale, size[1] * scale
    # Rounding may put the box's edge slightly outside the image, which Pillow refuses.
    left = max(0.0, (image.width - width) * position[0])
    top = max(0.0, (image.height - height) * position[1])
    box = (left, top, min(left + width, image.width), min(top + height, image.height))
    return image.resize(size, Image.Resampling.LANCZOS, box=box)


def _uniform(key: str, count: int) -> Iterator[float]:
    """Yield `count` numbers in [0, 1), which are a function of the key."""
    digest = hashlib.sha256(key.encode()).digest()
    for start in range(0, 4 * count, 4):
        yield int.from_bytes(digest[start : start + 4], "little") / 2**32
