"""Random masks: which part of an image an inpainting model has to paint while it is trained."""

import hashlib

import numpy as np
from PIL import Image, ImageDraw

from latentdiff.data.buckets import Size

WHOLE = 0.25
"""Share of the masks that cover everything, so that the model still draws from the prompt alone
(runwayml's inpainting model of SD 1.5 was trained with as many)."""
MAX_SHAPES = 4


def random_mask(key: str, size: Size) -> np.ndarray:
    """A mask of an image of `size` (width, height): (H, W) bool, true where it is to be painted.

    One to four rectangles and brush strokes, or everything. It is a function of `key` and the
    size, and at least one pixel is true.
    """
    digest = hashlib.sha256(f"mask/{key}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:16], "little"))
    width, height = size
    if rng.random() < WHOLE:
        return np.ones((height, width), dtype=bool)
    mask = Image.new("1", size)
    draw = ImageDraw.Draw(mask)
    for _ in range(rng.integers(1, MAX_SHAPES + 1)):
        if rng.random() < 0.5:
            _rectangle(draw, size, rng)
        else:
            _stroke(draw, size, rng)
    return np.asarray(mask)


def _rectangle(draw: ImageDraw.ImageDraw, size: Size, rng: np.random.Generator) -> None:
    """A rectangle whose sides are 20 to 70 % of the image's."""
    sides = [max(1, round(side * rng.uniform(0.2, 0.7))) for side in size]
    left, top = (
        int(rng.integers(0, side - own + 1)) for side, own in zip(size, sides, strict=True)
    )
    draw.rectangle((left, top, left + sides[0] - 1, top + sides[1] - 1), fill=1)


def _stroke(draw: ImageDraw.ImageDraw, size: Size, rng: np.random.Generator) -> None:
    """A line of two to six points with round joints, 5 to 20 % of the shorter side wide."""
    width = max(1, round(min(size) * rng.uniform(0.05, 0.2)))
    count = int(rng.integers(2, 7))
    x, y = (rng.uniform(0, side, count) for side in size)
    points = list(zip(x.astype(int).tolist(), y.astype(int).tolist(), strict=True))
    draw.line(points, fill=1, width=width, joint="curve")
    for a, b in points:
        draw.ellipse((a - width / 2, b - width / 2, a + width / 2, b + width / 2), fill=1)
