"""Reading drawings of shapes back into the words of their captions."""

import numpy as np
import pytest
from PIL import Image
from support.cases import mostly_exhaustive

from latentdiff.data.shapes import COLOURS, SHAPES, SIZES, Shape, draw_scene, shape_scene
from latentdiff.evaluation.scenes import count_shapes, read_scene


# At 32 pixels some two shapes are a pixel apart, and read as one.
@pytest.mark.parametrize(("side", "wrong"), mostly_exhaustive([(32, 2), (64, 0)]))
def test_a_scene_is_read_as_its_caption(side: int, wrong: int) -> None:
    scenes = [shape_scene(7, index, side) for index in range(150)]
    right = [read_scene(s.image, asked=s.caption).caption == s.caption for s in scenes]
    assert right.count(False) <= wrong


def test_every_shape_is_read_alone_at_any_place() -> None:
    draw = np.random.default_rng(0)
    for size in SIZES:
        for colour in COLOURS:
            for kind in SHAPES:
                shape = Shape(size, colour, kind, *(0.3 + 0.4 * draw.random(2)))
                (seen,) = read_scene(draw_scene([shape], 32)).shapes
                assert seen[:3] == shape[:3]
                assert seen.x == pytest.approx(shape.x, abs=0.01)
                assert seen.y == pytest.approx(shape.y, abs=0.01)


def test_some_noise_is_not_read_as_a_shape() -> None:
    scene = shape_scene(0, 3, 32)
    noise = np.random.default_rng(1).normal(0, 8, (32, 32, 3))
    pixels = np.clip(np.asarray(scene.image) + noise, 0, 255).astype(np.uint8)
    assert read_scene(Image.fromarray(pixels), asked=scene.caption).caption == scene.caption


def test_a_image_without_shapes_or_with_three_has_no_caption() -> None:
    assert read_scene(Image.new("RGB", (32, 32), "white")) == ([], None)
    places = [(0.2, 0.2), (0.5, 0.8), (0.8, 0.2)]
    three = [Shape("small", "red", "circle", x, y) for x, y in places]
    seen = read_scene(draw_scene(three, 64))
    assert [shape[:3] for shape in seen.shapes] == [("small", "red", "circle")] * 3
    assert seen.caption is None


def test_one_of_two_right_captions_is_the_one_asked_for() -> None:
    image = draw_scene(
        [Shape("", "red", "circle", 0.25, 0.5), Shape("", "blue", "star", 0.75, 0.5)], 32
    )
    for asked in ("a red circle left of a blue star", "a blue star right of a red circle"):
        assert read_scene(image, asked=asked).caption == asked
    assert read_scene(image, asked="a blue star left of a red circle").caption != asked


def test_shapes_that_are_there_are_counted_once_each() -> None:
    red = Shape("", "red", "circle", 0.25, 0.5)
    image = draw_scene([red, Shape("large", "blue", "star", 0.7, 0.5)], 64)
    assert count_shapes(image, "a large blue star above a red circle") == (2, 2)
    assert count_shapes(image, "a red circle left of a small red circle") == (2, 1)
    assert count_shapes(image, "an orange circle") == (1, 0)
    asked = "a small blue circle above a red star"
    assert count_shapes(image, asked) == (2, 0)
    assert count_shapes(image, asked, colours_alone=True) == (2, 2)
