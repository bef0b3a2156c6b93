"""Shapes: captions say exactly what the pixels show, and scenes depend on (seed, index) alone."""

from pathlib import Path

import datasets
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from latentdiff.data.shapes import COLOURS, HELD_OUT, SHAPES, SIZES, build_shapes, shape_scene

# The share of its bounding box that a shape fills, from its geometry.
FILL = {
    "circle": np.pi / 4,
    "square": 1.0,
    "triangle": 0.5,
    # Ten triangles with sides 1 and (3 - sqrt 5) / 2 and 36 degrees between them.
    "star": 5
    * (3 - 5**0.5)
    / 2
    * np.sin(np.pi / 5)
    / (2 * np.cos(np.pi / 10) * (1 + np.cos(np.pi / 5))),
    "cross": 1 - 4 * 0.3**2,
}


def _runs(line: NDArray[np.bool_]) -> list[slice]:
    edges = np.flatnonzero(np.diff(np.concatenate(([False], line, [False])).astype(int)))
    return [slice(*edge) for edge in edges.reshape(-1, 2)]


def _nearest(value: float, options: dict[str, float]) -> str:
    return min(options, key=lambda name: abs(options[name] - value))


def _phrase(pixels: NDArray[np.float64], side: int) -> str:
    """Say what a part of an image with one shape on white shows."""
    drawn = (pixels < 255).any(-1)
    middle = np.median(pixels[drawn], axis=0)
    colour = next(name for name, (_, rgb) in COLOURS.items() if tuple(middle) == rgb)
    inside = np.abs(pixels - middle).sum(-1) < np.abs(pixels - 255).sum(-1)
    (rows,), (columns,) = _runs(inside.any(1)), _runs(inside.any(0))
    extent = max(rows.stop - rows.start, columns.stop - columns.start) / side
    size = _nearest(extent / 2, {name: radius for name, (_, radius) in SIZES.items()})
    kind = _nearest(float(inside[rows, columns].mean()), FILL)
    words = " ".join(word for word in (size, colour, kind) if word)
    return f"{'an' if words.startswith('orange') else 'a'} {words}"


def _descriptions(image: Image.Image) -> set[str]:
    """Say what an image of one or two shapes shows, in every caption that is true."""
    pixels = np.asarray(image).astype(float)
    drawn = (pixels < 255).any(-1)
    x_runs, y_runs = _runs(drawn.any(0)), _runs(drawn.any(1))
    if len(x_runs) == len(y_runs) == 1:
        return {_phrase(pixels, image.width)}

    def gap(runs: list[slice]) -> float:
        centres = [(run.start + run.stop) / 2 for run in runs]
        return centres[1] - centres[0] if len(runs) == 2 else 0.0

    if gap(x_runs) > gap(y_runs):
        first, second = (_phrase(pixels[:, run], image.width) for run in x_runs)
        return {f"{first} left of {second}", f"{second} right of {first}"}
    first, second = (_phrase(pixels[run], image.width) for run in y_runs)
    return {f"{first} above {second}", f"{second} below {first}"}


@pytest.mark.exhaustive
def test_captions_are_what_the_pixels_show() -> None:
    for index in range(300):
        scene = shape_scene(1, index, 160)
        assert scene.caption in _descriptions(scene.image), index


def test_chinese_captions_say_the_same() -> None:
    pairs = {shape_scene(0, index, 16)[1:3] for index in range(3000)}
    assert len({english for english, _ in pairs}) == len({zh for _, zh in pairs}) == len(pairs)
    for english, chinese in pairs:
        words = english.split()
        assert all((name in words) == (zh in chinese) for name, (zh, _) in COLOURS.items())
        assert all((name in words) == (zh in chinese) for name, zh in SHAPES.items())


def test_a_scene_is_the_same_for_ever() -> None:
    """The captions of two scenes, as first drawn: an equal seed is a promise across versions."""
    scene = shape_scene(0, 38921, 64)
    assert scene.caption == "a small red circle left of a blue square"
    assert scene.caption_zh == "一个小的红色圆形在一个蓝色正方形的左边"
    scene = shape_scene(0, 1, 64)
    assert scene.caption == "a large green triangle below a green circle"
    assert scene.caption_zh == "一个大的绿色三角形在一个绿色圆形的下面"


def test_a_scene_is_a_function_of_seed_and_index() -> None:
    forwards = [shape_scene(3, index, 32) for index in range(20)]
    backwards = [shape_scene(3, index, 32) for index in reversed(range(20))]
    assert forwards == backwards[::-1]
    assert [scene.caption for scene in forwards] == [
        shape_scene(3, index, 64).caption for index in range(20)
    ]
    assert forwards != [shape_scene(4, index, 32) for index in range(20)]


def test_scenes_with_a_held_out_combination_are_test_and_no_others() -> None:
    scenes = [shape_scene(0, index, 16) for index in range(3000)]
    for scene in scenes:
        pairs = any(f"{colour} {kind}" in scene.caption for colour, kind in HELD_OUT)
        assert scene.held_out == pairs
    train = " ".join(scene.caption for scene in scenes if not scene.held_out).split()
    # Each word of a held-out combination is learnt in other company.
    assert {word for pair in HELD_OUT for word in pair} <= set(train)
    assert {*COLOURS, *SHAPES, "small", "large", "left", "right", "above", "below"} <= set(train)


def test_built_folder_is_reproducible_and_loads_through_datasets(tmp_path: Path) -> None:
    for name in ("one", "two"):
        counts = build_shapes(tmp_path / name, count=24, seed=5, size=16)
    assert counts["train"] + counts["test"] == 24
    one, two = (
        {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two
    loaded = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "one"), cache_dir=str(tmp_path / "cache")
    )
    assert {split: len(rows) for split, rows in loaded.items()} == counts
    found = {
        (row["text"], row["text_zh"], row["image"].tobytes())
        for rows in loaded.values()
        for row in rows
    }
    scenes = [shape_scene(5, index, 16) for index in range(24)]
    assert found == {(scene.caption, scene.caption_zh, scene.image.tobytes()) for scene in scenes}
    card = (tmp_path / "one" / "README.md").read_text(encoding="utf-8")
    assert all(f"{colour} {kind}" in card for colour, kind in HELD_OUT)


@pytest.mark.exhaustive
def test_default_values_hold_out_between_a_tenth_and_a_fifth(tmp_path: Path) -> None:
    counts = build_shapes(tmp_path / "shapes")
    assert counts["train"] + counts["test"] == 10_000
    assert 1_000 < counts["test"] < 2_000
    lines = (tmp_path / "shapes/test/metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == counts["test"]


@pytest.mark.parametrize(
    ("options", "message"), [({"count": 0}, "count=0 must"), ({"size": 8}, "size=8 must")]
)
def test_wrong_input_is_named(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_shapes(tmp_path / "shapes", **options)
    assert not (tmp_path / "shapes").exists()
