"""Crops and flips of an image: where they lie, and that names alone decide it."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from latentdiff.data.crop_flip import CropFlip, crop_to

SIZES = st.tuples(st.integers(1, 60), st.integers(1, 60))


def coordinates(width: int, height: int) -> Image.Image:
    """Red says how far to the right a pixel is, green how far down, both from 0 to 255."""
    across, down = np.linspace(0, 255, width), np.linspace(0, 255, height)
    pixels = np.zeros((height, width, 3))
    pixels[..., 0], pixels[..., 1] = across, down[:, None]
    return Image.fromarray(pixels.round().astype(np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


@settings(deadline=None)
@given(SIZES, SIZES, st.integers(0, 1000))
def test_the_largest_crop_in_the_middle_is_pillows(
    size: tuple[int, int], wanted: tuple[int, int], seed: int
) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    expected = ImageOps.fit(image, wanted, Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(pixels(crop_to(image, wanted)), pixels(expected))


@settings(deadline=None)
@given(SIZES, SIZES, st.floats(0.1, 1), st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_every_crop_has_the_size_asked_for(
    size: tuple[int, int], wanted: tuple[int, int], fraction: float, position: tuple[float, float]
) -> None:
    assert (
        crop_to(Image.new("RGB", size), wanted, fraction=fraction, position=position).size == wanted
    )


def test_crops_lie_at_their_positions() -> None:
    wide = coordinates(256, 64)
    left, right = (crop_to(wide, (64, 64), position=(x, 0.5)) for x in (0.0, 1.0))
    np.testing.assert_array_equal(pixels(left), pixels(wide)[:, :64])
    np.testing.assert_array_equal(pixels(right), pixels(wide)[:, -64:])
    corner = crop_to(coordinates(128, 128), (64, 64), fraction=0.5, position=(1.0, 0.0))
    np.testing.assert_array_equal(pixels(corner), pixels(coordinates(128, 128))[:64, 64:])


def test_a_crop_is_not_enlarged_for_variety() -> None:
    """An image with no more pixels than asked for would otherwise be blurred."""
    small = coordinates(40, 64)
    whole = crop_to(small, (40, 40), fraction=0.5, position=(0.5, 1.0))
    np.testing.assert_array_equal(pixels(whole), pixels(small)[24:])


def variants(
    crops: int, flip: bool, name: str = "a", size: Sequence[int] = (90, 60)
) -> torch.Tensor:
    return CropFlip(crops, flip).views(coordinates(*size), name, (40, 32))


def test_variant_0_is_the_middle_and_the_second_half_are_mirror_images() -> None:
    drawn = variants(3, True)
    assert drawn.shape == (6, 3, 32, 40)
    assert drawn.dtype == torch.uint8
    middle = torch.from_numpy(pixels(crop_to(coordinates(90, 60), (40, 32))).copy())
    assert torch.equal(drawn[0], middle.permute(2, 0, 1))
    assert torch.equal(drawn[3:], drawn[:3].flip(-1))


def test_more_variants_leave_the_others_as_they_are() -> None:
    for count in (1, 2, 4):
        assert torch.equal(variants(count, False), variants(5, False)[:count])


def test_crops_are_functions_of_name_and_variant() -> None:
    assert torch.equal(variants(4, True), variants(4, True))
    both = torch.cat([variants(4, False, "a"), variants(4, False, "b")[1:]])
    assert len({variant.numpy().tobytes() for variant in both}) == 7


def test_crops_reach_every_side_and_show_at_least_four_fifths() -> None:
    drawn = torch.stack([variants(2, False, str(i), (64, 64))[1] for i in range(100)]).float()
    red, green = drawn[:, 0].mean(1), drawn[:, 1].mean(2)  # (100, 40), (100, 32)
    for values, full in ((red, 1.0), (green, 0.8)):  # the crop is wider than the image
        shown = (values[:, -1] - values[:, 0]) / 255
        assert shown.min() > 0.78 * full
        assert shown.max() > 0.96 * full
        assert values[:, 0].min() < 8
        assert values[:, -1].max() > 247


def test_no_crop_is_refused() -> None:
    with pytest.raises(ValueError, match="crops=0 must be at least 1"):
        CropFlip(crops=0)
