"""Views of an image: how it is scaled and cut to a size, in one or in several ways."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from latentdiff.data.buckets import Size

SMALLEST = 0.8  # of the largest cut's side, that of another cut: details stay as large as they were


@dataclass(frozen=True)
class Views:
    """Which views of an image there are: cuts, and perhaps their mirror images.

    View 0 is the largest cut, in the middle. The sides of others are 80 to 100 % of its sides, but
    not so little that a cut has fewer pixels than the view, and they lie anywhere in the image.
    Size and place are functions of the image's name and the view. An image with no more pixels
    than the view has the same cut each time. Raises ValueError for fewer than one crop.
    """

    crops: int = 1
    """Cuts of each image, of which each visit draws one."""
    flip: bool = False
    """Mirror images as well."""

    def __post_init__(self) -> None:
        if self.crops < 1:
            raise ValueError(f"crops={self.crops} must be at least 1")

    @property
    def count(self) -> int:
        """How many views there are, V."""
        return self.crops * (2 if self.flip else 1)

    def of(self, image: Image.Image, name: str, size: Size) -> Tensor:
        """An RGB image's views, (V, 3, H, W) uint8; mirror images follow all the others."""
        cuts = [cut(image, size)]
        for number in range(1, self.crops):
            side, *place = _uniform(f"{name}/{number}", 3)
            cuts.append(cut(image, size, share=SMALLEST + (1 - SMALLEST) * side, place=place))
        if self.flip:
            cuts += [ImageOps.mirror(image) for image in cuts]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in cuts]))
        return rearrange(pixels, "v h w c -> v c h w").contiguous()


def cut(
    image: Image.Image,
    size: Size,
    *,
    share: float = 1.0,
    place: tuple[float, float] | list[float] = (0.5, 0.5),
) -> Image.Image:
    """Cut a box of the shape of `size` out of an image, and scale it to that size.

    Its sides are `share` of those of the largest box, if it then has the pixels. `place` is where
    it lies from left to right and from top to bottom, each from 0 to 1.
    """
    scale = min(image.width / size[0], image.height / size[1])  # of theirs for one of ours
    scale = max(share * scale, min(scale, 1.0))
    width, height = size[0] * scale, size[1] * scale
    # Rounding may lead a hair out of the image, which Pillow refuses.
    left = max(0.0, (image.width - width) * place[0])
    top = max(0.0, (image.height - height) * place[1])
    box = (left, top, min(left + width, image.width), min(top + height, image.height))
    return image.resize(size, Image.Resampling.LANCZOS, box=box)


def _uniform(key: str, count: int) -> Iterator[float]:
    """Numbers in [0, 1), a function of the key."""
    digest = hashlib.sha256(key.encode()).digest()
    for at in range(0, 4 * count, 4):
        yield int.from_bytes(digest[at : at + 4], "little") / 2**32
