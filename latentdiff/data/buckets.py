"""Aspect-ratio buckets: the few sizes to which images of all aspect ratios are scaled and cropped.

All images of a batch have the same size, and square crops cut off heads and feet; NovelAI's
improvements on Stable Diffusion (2022) crop each image to a size near its own aspect ratio. Sizes
here are (width, height) in pixels.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

from latentdiff.data.decode import BadSample

Size = tuple[int, int]


@lru_cache
def bucket_sizes(image_size: int, step: int, max_aspect: float) -> tuple[Size, ...]:
    """Return the sizes of the buckets, from the tallest to the widest; `step` 0 gives the square.

    Sides are multiples of `step`, which must divide `image_size`. Areas are at most image_size²,
    and lengthening either side by one step would exceed that. The longer side is at most
    `max_aspect` times the shorter one.
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
    """Return the index of the bucket whose crop loses least of an image of this size.

    Of an image that is scaled to cover a bucket, the crop loses the fraction
    1 - exp(-|log aspect ratio - log aspect ratio of the bucket|). Between two buckets that lose the
    same, the one with more pixels is chosen.
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


def small_buckets(counts: Mapping[str, int], batch_size: int) -> str:
    """Say which sizes have fewer images than a batch, of how many each has; "" if none has.

    A batch of such a size has images more than once (see `SampleOrder`).
    """
    filled = {size: count for size, count in counts.items() if count > 0}
    small = {size: count for size, count in filled.items() if count < batch_size}
    if not small:
        return ""
    listed = ", ".join(f"{size} has {count}" for size, count in small.items())
    return (
        f"{len(small)} of {len(filled)} sizes have fewer images than batch_size={batch_size}, so "
        f"that each batch of theirs repeats images: {listed}; a smaller max_aspect or a larger "
        "bucket_step makes fewer sizes"
    )
