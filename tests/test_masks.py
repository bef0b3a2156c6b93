"""Random masks of inpainting: functions of their key, of every size, some of them whole."""

import numpy as np
import pytest

from latentdiff.data.masks import MAX_SHAPES, WHOLE, random_mask


@pytest.mark.parametrize("size", [(64, 64), (48, 96), (8, 8), (1, 5)])
def test_a_mask_is_a_function_of_its_key(size: tuple[int, int]) -> None:
    masks = [random_mask(f"image/{i}", size) for i in range(300)]
    again = [random_mask(f"image/{i}", size) for i in range(300)]
    assert all(np.array_equal(a, b) for a, b in zip(masks, again, strict=True))
    assert {mask.shape for mask in masks} == {(size[1], size[0])}
    assert all(mask.any() for mask in masks)
    assert len({mask.tobytes() for mask in masks}) > 1


def test_a_quarter_is_whole_and_the_rest_leaves_some_and_takes_some() -> None:
    areas = np.array([random_mask(str(i), (64, 64)).mean() for i in range(2000)])
    whole = (areas == 1).mean()
    assert whole == pytest.approx(WHOLE, abs=0.03)
    rest = areas[areas < 1]
    assert 0.2 < rest.mean() < 0.5
    assert np.quantile(rest, 0.05) > 0.02
    assert MAX_SHAPES == 4
