"""Generates the shapes data set: scenes of one or two coloured shapes with exact captions."""

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import Image, ImageDraw
from tqdm import tqdm

from latentdiff.data.folder import (
    SPLITS,
    Example,
    Split,
    check_free,
    check_side,
    write_image_folder,
)

# English word: Chinese word, RGB.
COLOURS: dict[str, tuple[str, tuple[int, int, int]]] = {
    "red": ("红色", (220, 30, 30)),
    "orange": ("橙色", (250, 140, 0)),
    "yellow": ("黄色", (250, 215, 0)),
    "green": ("绿色", (20, 150, 50)),
    "blue": ("蓝色", (30, 80, 220)),
    "purple": ("紫色", (130, 40, 180)),
    "pink": ("粉色", (250, 130, 190)),
    "black": ("黑色", (20, 20, 20)),
}
SHAPES = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "star": "星形",
    "cross": "十字形",
}
# English word: Chinese word, half of the shape's extent as a fraction of the image's side. Most
# shapes are of middle size, which a caption leaves unsaid.
SIZES = {"small": ("小的", 0.10), "": ("", 0.15), "large": ("大的", 0.21)}
# English words: Chinese word, the axis (0 is x, 1 is y), whether the first shape comes first on it.
RELATIONS = {
    "left of": ("左边", 0, True),
    "right of": ("右边", 0, False),
    "above": ("上面", 1, True),
    "below": ("下面", 1, False),
}

# Scenes with one of these pairs form the split `test`: each colour and each shape occurs in
# `train`, but not these combinations.
HELD_OUT = frozenset(
    {("red", "triangle"), ("green", "star"), ("blue", "circle"), ("yellow", "square")}
)

_PAIRS = tuple((colour, kind) for colour in COLOURS for kind in SHAPES)
_MARGIN = 0.04  # between the shapes and the image's edge, and between two shapes
_SUPERSAMPLING = 4  # scenes are drawn this many times larger and averaged, for antialiasing

_T = TypeVar("_T")


class Shape(NamedTuple):
    """One shape of a scene: its words, and its centre (x, y) in units of the image's side."""

    size: str
    colour: str
    kind: str
    x: float
    y: float


class Scene(NamedTuple):
    """An image (RGB), its captions, and whether it belongs to `test` (see `HELD_OUT`)."""

    image: Image.Image
    caption: str
    caption_zh: str
    held_out: bool


def shape_scene(seed: int, index: int, size: int) -> Scene:
    """Return scene number `index` of `seed`, `size` x `size` pixels on white.

    The scene is a function of the arguments alone, on every machine and Python version. The
    caption is complete: "a large green triangle" is one shape, "a small red circle left of a blue
    square" two; a shape whose size is not named is of middle size. Left, right, above and below
    name the direction in which the two shapes are farther apart.
    """
    shapes, relation = _compose(seed, index)
    held_out = any((shape.colour, shape.kind) in HELD_OUT for shape in shapes)
    return Scene(
        draw_scene(shapes, size),
        scene_words(shapes, relation),
        _caption_zh(shapes, relation),
        held_out,
    )


def build_shapes(
    out: Path, *, count: int = 10_000, seed: int = 0, size: int = 64
) -> dict[str, int]:
    """Write scenes 0 to count - 1 of `seed` into the image folder `out`.

    `out` has `train/` and `test/` (scenes with a pair of `HELD_OUT`), each with PNGs of `size` x
    `size` pixels and `metadata.jsonl`, whose lines have `file_name`, `text` and `text_zh`. A
    split without any scene has no folder.

    Returns:
        For "train" and "test": how many scenes.

    Raises:
        ValueError: count < 1, a size not from 16 to 4,096, an `out` with something in it.
    """
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    check_side(size, least=16)  # smaller shapes cannot be told apart
    check_free(out)
    counts: Counter[str] = Counter(dict.fromkeys(SPLITS, 0))

    def examples() -> Iterator[Example]:
        for index in tqdm(range(count), desc="shapes", unit="image"):
            scene = shape_scene(seed, index, size)
            split: Split = "test" if scene.held_out else "train"
            counts[split] += 1
            captions = {"text": scene.caption, "text_zh": scene.caption_zh}
            yield Example(split, f"{index:08d}.png", scene.image, captions)

    write_image_folder(out, examples(), card=lambda: _card(counts, seed=seed, size=size))
    return dict(counts)


def _compose(seed: int, index: int) -> tuple[list[Shape], str]:
    rng = random.Random(f"{seed}/{index}")
    words = [(_pick(rng, ("small", "", "", "large")), *_pick(rng, _PAIRS)) for _ in range(2)]
    # Two of the same colour and kind would be "a red circle left of a red circle".
    if rng.random() < 0.5 or words[0][1:] == words[1][1:]:
        radius = SIZES[words[0][0]][1]
        return [Shape(*words[0], _place(rng, radius), _place(rng, radius))], ""
    relation = _pick(rng, tuple(RELATIONS))
    _, axis, in_order = RELATIONS[relation]
    first, second = words if in_order else reversed(words)
    first_radius, second_radius = SIZES[first[0]][1], SIZES[second[0]][1]
    # Along the axis: the free space is divided at random before, between and after the two.
    room = 1 - 3 * _MARGIN - 2 * (first_radius + second_radius)
    before, until = sorted((rng.random(), rng.random()))
    along = (
        _MARGIN + first_radius + before * room,
        2 * _MARGIN + 2 * first_radius + second_radius + until * room,
    )
    # Across it: at most half as far apart as along it, so that only one relation is true.
    reach = (along[1] - along[0]) / 2
    across = _place(rng, first_radius)
    low = max(_MARGIN + second_radius, across - reach)
    high = min(1 - _MARGIN - second_radius, across + reach)
    positions = [(along[0], across), (along[1], low + (high - low) * rng.random())]
    shapes = [
        Shape(*words, *(position if axis == 0 else position[::-1]))
        for words, position in zip((first, second), positions, strict=True)
    ]
    return (shapes if in_order else shapes[::-1]), relation


def _pick(rng: random.Random, options: Sequence[_T]) -> _T:
    # Python keeps random() the same over its versions, but not choice().
    return options[int(rng.random() * len(options))]


def _place(rng: random.Random, radius: float) -> float:
    return _MARGIN + radius + rng.random() * (1 - 2 * (_MARGIN + radius))


def draw_scene(shapes: Sequence[Shape], size: int) -> Image.Image:
    """Shapes on white, `size` x `size` pixels, antialiased; the last lies on top."""
    side = size * _SUPERSAMPLING
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    for shape in shapes:
        fill = COLOURS[shape.colour][1]
        radius = SIZES[shape.size][1]
        points = [
            ((shape.x + radius * x) * side, (shape.y + radius * y) * side)
            for x, y in _outline(shape.kind)
        ]
        draw.polygon(points, fill=fill)
    return image.reduce(_SUPERSAMPLING)


def _outline(kind: str) -> list[tuple[float, float]]:
    """Return the corners of a shape in [-1, 1] x [-1, 1], y pointing down."""
    match kind:
        case "circle":
            return [_on_circle(turn / 64) for turn in range(64)]
        case "square":
            return [(-1, -1), (1, -1), (1, 1), (-1, 1)]
        case "triangle":
            height = math.sqrt(3) / 2
            return [(0, -height), (1, height), (-1, height)]
        case "star":
            # The inner corners of a pentagram lie at this fraction of the outer radius.
            inner = (3 - math.sqrt(5)) / 2
            return [_on_circle(turn / 10, inner if turn % 2 else 1.0) for turn in range(10)]
        case _:
            assert kind == "cross"
            arm = 0.4
            corner = [(-arm, -1), (arm, -1), (arm, -arm)]
            quarters = []
            for _ in range(4):
                quarters += corner
                corner = [(-y, x) for x, y in corner]
            return quarters


def _on_circle(turns: float, radius: float = 1.0) -> tuple[float, float]:
    angle = 2 * math.pi * turns
    return radius * math.sin(angle), -radius * math.cos(angle)


def scene_words(shapes: Sequence[Shape], relation: str) -> str:
    """The English caption of a shape, or of two in a relation of `RELATIONS`."""
    phrases = []
    for shape in shapes:
        words = " ".join(word for word in (shape.size, shape.colour, shape.kind) if word)
        phrases.append(f"{'an' if words[0] in 'aeiou' else 'a'} {words}")
    return f" {relation} ".join(phrases)


def _caption_zh(shapes: Sequence[Shape], relation: str) -> str:
    phrases = [
        f"一个{SIZES[shape.size][0]}{COLOURS[shape.colour][0]}{SHAPES[shape.kind]}"
        for shape in shapes
    ]
    if len(phrases) == 1:
        return phrases[0]
    return f"{phrases[0]}在{phrases[1]}的{RELATIONS[relation][0]}"


def _card(counts: Counter[str], *, seed: int, size: int) -> str:
    held_out = ", ".join(f"{colour} {kind}" for colour, kind in sorted(HELD_OUT))
    return f"""---
license: cc0-1.0
task_categories: [text-to-image]
language: [en, zh]
---
# Shapes with captions

{counts.total()} generated scenes of {size} x {size} pixels with one or two coloured shapes on \
white, made by `latentdiff data shapes --count {counts.total()} --seed {seed} --size {size}`: \
each is a function of the seed and its number, which is its file name.

```python
datasets.load_dataset("imagefolder", data_dir="this folder")
```

Columns: `image`, `text` (English: "a small red circle left of a blue square"), `text_zh` \
(Chinese). A caption says all that is in the image; a shape without a word for its size is of \
middle size.

- Colours: {", ".join(COLOURS)}.
- Shapes: {", ".join(SHAPES)}.
- Relations: {", ".join(RELATIONS)}.

| split | scenes | |
|---|---:|---|
| train | {counts["train"]} | all scenes without a held-out combination |
| test | {counts["test"]} | scenes with at least one of: {held_out} |
"""
