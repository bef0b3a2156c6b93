"""Aspect-ratio buckets: the few sizes that images of all shapes are brought to.

One batch holds images of one size, and square crops of them all lose heads and feet; NovelAI's
improvements on Stable Diffusion (2022) gave images a size near their own shape. Sizes here are
(width, height) in pixels.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

from latentdiff.data.decode import BadSample

Size = tuple[int, int]


@lru_cache
def bucket_sizes(image_size: int, step: int, max_aspect: float) -> tuple[Size, ...]:
    """The sizes, from the tallest to the widest; `step` 0 gives the square alone.

    Sides are multiples of `step`, areas at most image_size², and no side could be longer by a step:
    an area lacks less than the shorter side times a step. The longer side is at most `max_aspect`
    times the shorter one. `step` must divide `image_size`.
    """
    if step == 0:
        return ((image_size, image_size),)
    assert image_size % step == 0
    area = image_size**2
    sides = range(step, area // step + 1, step)
    sizes = [(width, area // width // step * step) for width in sides]
    return tuple(
        (width, height)
        for width, height in sizes
        if (width + step) * height > area and max(width, height) <= max_aspect * min(width, height)
    )


def nearest(size: Size, buckets: Sequence[Size]) -> int:
    """The bucket to which an image loses least; between two, the one with more pixels.

    Scaled to cover a bucket, it loses the fraction 1 - exp(-|log ratio - log ratio of the bucket|).
    """
    ratio = math.log(size[0] / size[1])

    def order(number: int) -> tuple[float, int]:
        width, height = buckets[number]
        return abs(math.log(width / height) - ratio), -width * height

    return min(range(len(buckets)), key=order)


def check_scale(size: Size, bucket: Size, upscale_limit: float) -> None:
    """Raise BadSample when an image must be enlarged by more than the limit to cover a bucket."""
    if any(side * upscale_limit < wanted for side, wanted in zip(size, bucket, strict=True)):
        raise BadSample(
            "too small",
            f"{size[0]} x {size[1]} for {bucket[0]} x {bucket[1]} and "
            f"upscale_limit={upscale_limit}",
        )
