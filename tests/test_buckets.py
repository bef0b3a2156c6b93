"""The sizes that images are brought to: what they are, which is taken, and what is cut off."""

import math
from contextlib import nullcontext

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentdiff.data.buckets import bucket_sizes, check_scale, nearest
from latentdiff.data.config import DataConfig
from latentdiff.data.decode import BadSample
from latentdiff.data.samples import check_size

STEPS = st.integers(1, 64)
GRIDS = st.tuples(STEPS, st.integers(1, 16), st.floats(1.0, 16.0))  # step, steps a side, max_aspect
SIZES = st.tuples(st.integers(1, 5000), st.integers(1, 5000))


@settings(deadline=None)
@given(GRIDS)
def test_every_bucket_keeps_the_pixels_the_step_and_the_aspect(
    grid: tuple[int, int, float],
) -> None:
    step, count, max_aspect = grid
    side = step * count
    buckets = bucket_sizes(side, step, max_aspect)
    assert (side, side) in buckets
    for width, height in buckets:
        assert width % step == height % step == 0
        assert side**2 - step * min(width, height) < width * height <= side**2
        assert max(width, height) <= max_aspect * min(width, height)


@settings(deadline=None)
@given(GRIDS)
def test_buckets_are_the_same_lying_and_standing(grid: tuple[int, int, float]) -> None:
    step, count, max_aspect = grid
    buckets = bucket_sizes(step * count, step, max_aspect)
    assert sorted((height, width) for width, height in buckets) == sorted(buckets)
    ratios = [width / height for width, height in buckets]
    assert ratios == sorted(set(ratios))


@settings(deadline=None)
@given(GRIDS, SIZES)
def test_the_bucket_taken_is_the_nearest_and_cuts_off_least(
    grid: tuple[int, int, float], size: tuple[int, int]
) -> None:
    step, count, max_aspect = grid
    buckets = bucket_sizes(step * count, step, max_aspect)
    taken = buckets[nearest(size, buckets)]

    def distance(bucket: tuple[int, int]) -> float:
        return abs(math.log(bucket[0] / bucket[1]) - math.log(size[0] / size[1]))

    def removed(bucket: tuple[int, int]) -> float:
        """The share of the image's area that the largest cut of the bucket's shape leaves out."""
        scale = min(size[0] / bucket[0], size[1] / bucket[1])
        return 1 - bucket[0] * bucket[1] * scale**2 / (size[0] * size[1])

    assert distance(taken) == min(map(distance, buckets))
    assert removed(taken) <= min(map(removed, buckets)) + 1e-9
    assert removed(taken) == pytest.approx(1 - math.exp(-distance(taken)), abs=1e-9)


@settings(deadline=None)
@given(GRIDS, SIZES)
def test_a_turned_image_has_the_turned_bucket(
    grid: tuple[int, int, float], size: tuple[int, int]
) -> None:
    step, count, max_aspect = grid
    buckets = bucket_sizes(step * count, step, max_aspect)
    width, height = buckets[nearest(size, buckets)]
    turned = buckets[nearest((size[1], size[0]), buckets)]
    # Between two that are equally near rounding decides.
    assert turned == (height, width) or turned[0] * turned[1] == width * height


@settings(deadline=None, max_examples=200)
@given(SIZES, SIZES, st.floats(1.0, 4.0))
def test_the_limit_of_enlargement_is_the_buckets(
    size: tuple[int, int], bucket: tuple[int, int], limit: float
) -> None:
    enlarged = max(bucket[0] / size[0], bucket[1] / size[1])
    if abs(enlarged - limit) < 1e-9:
        return
    with pytest.raises(BadSample) if enlarged > limit else nullcontext() as caught:
        check_scale(size, bucket, limit)
    assert caught is None or caught.value.reason == "too small"


def test_a_strip_may_be_large_enough_for_its_bucket_and_not_for_the_square() -> None:
    strip = (128, 40)
    check_size(strip, DataConfig(image_size=64, bucket_step=16, max_aspect=4.0))
    for config in (
        DataConfig(image_size=64),
        DataConfig(image_size=64, bucket_step=16),
        DataConfig(image_size=80, bucket_step=16, max_aspect=4.0),
    ):
        with pytest.raises(BadSample, match="too small: 128 x 40 for"):
            check_size(strip, config)
    check_size(strip, DataConfig(image_size=64, upscale_limit=1.6))


def test_step_0_is_the_square_alone() -> None:
    assert bucket_sizes(60, 0, 2.0) == ((60, 60),)


def test_the_sizes_of_stable_diffusion() -> None:
    assert bucket_sizes(512, 64, 2.0) == (
        (384, 640),
        (448, 576),
        (512, 512),
        (576, 448),
        (640, 384),
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bucket_step": -8}, "bucket_step=-8 must be 0 or divide image_size=64"),
        ({"bucket_step": 24}, "bucket_step=24 must be 0 or divide image_size=64"),
        ({"max_aspect": 0.5}, r"max_aspect=0.5 must be in \[1, 16"),
    ],
)
def test_impossible_buckets_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)  # pyright: ignore[reportArgumentType]
