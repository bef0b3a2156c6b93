"""Does a model of the shapes draw what it is told? Draw captions and read the drawings back.

The captions are of scenes that no training saw: of combinations of colour and kind that it knows,
and of the four that it never saw together (`held out`). A drawing is right when its caption can be
read off it again (`evaluation.scenes`): sizes, colours, kinds and how they lie. `one` and `two` are
the shares of right drawings for captions of one shape and of two; `both`, for those of two, of
drawings of these two and no other, lie as they may. `colours` and `shapes` are the shares of the
shapes asked for of which there is one of the colour, or of size, colour and kind. `true images`
are the captions of those scenes through the VAE alone. Writes a Markdown row for each model to
standard output, and `grid.png` of its first drawings into OUT/name.

    python benchmarks/shapes_words.py runs/shapes/unet/model runs/shapes/dit/model --out runs/words
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from latentdiff import Pipeline
from latentdiff.data.shapes import Scene, shape_scene
from latentdiff.evaluation.scenes import count_shapes, read_scene
from latentdiff.images import font_for, from_pil, to_pil

SEED = 1
"""Of the scenes; trainings draw those of seed 0."""


class Judged(NamedTuple):
    """A drawing: how many shapes its caption asks for, and how many are there, or their colours."""

    asked: int
    shapes: int
    colours: int
    nothing_else: bool
    """Whether it has all of these shapes and no other."""
    right: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, default=4.0)
    asked = parser.parse_args()
    heads = ["colours", "shapes", "one", "both", "two"]
    heads += [f"held out: {heads[0]}", *heads[1:]]
    print(f"| model | {' | '.join(heads)} | true images | seconds each |")
    print(f"|---|{'---:|' * (len(heads) + 2)}")
    for model in asked.models:
        pipe = Pipeline.from_pretrained(model, device="cpu")
        cells, through = [], 0.0
        for held_out in (False, True):
            chosen = scenes(asked.count, pipe.vae.config.sample_size, held_out=held_out)
            start = time.perf_counter()
            drawn: list[Image.Image] = []
            for number, scene in enumerate(tqdm(chosen, desc=str(model), leave=False)):
                drawn += pipe(
                    scene.caption,
                    seed=number,
                    steps=asked.steps,
                    guidance_scale=asked.guidance_scale,
                    progress=False,
                ).images
            seconds = (time.perf_counter() - start) / len(drawn)
            judged = [
                judge(image, scene.caption) for image, scene in zip(drawn, chosen, strict=True)
            ]
            one, two = ([drawing for drawing in judged if drawing.asked == n] for n in (1, 2))
            asked_for = sum(drawing.asked for drawing in judged)
            cells += [
                f"{share:.0%}"
                for share in (
                    sum(drawing.colours for drawing in judged) / asked_for,
                    sum(drawing.shapes for drawing in judged) / asked_for,
                    sum(drawing.right for drawing in one) / max(len(one), 1),
                    sum(drawing.nothing_else for drawing in two) / max(len(two), 1),
                    sum(drawing.right for drawing in two) / max(len(two), 1),
                )
            ]
            if not held_out:
                through = decoded(pipe, chosen)
                folder = asked.out / model.parent.name
                folder.mkdir(parents=True, exist_ok=True)
                grid(drawn[:24], chosen[:24], [drawing.right for drawing in judged[:24]]).save(
                    folder / "grid.png"
                )
        row = [str(model), *cells, f"{through:.0%}", f"{seconds:.2f}"]
        print(f"| {' | '.join(row)} |", flush=True)


def scenes(count: int, side: int, *, held_out: bool) -> list[Scene]:
    """The first scenes of `SEED` with, or without, a combination that trainings never saw."""
    found: list[Scene] = []
    index = 0
    while len(found) < count:
        scene = shape_scene(SEED, index, side)
        index += 1
        if scene.held_out == held_out:
            found.append(scene)
    return found


def judge(image: Image.Image, caption: str) -> Judged:
    asked, shapes = count_shapes(image, caption)
    _, colours = count_shapes(image, caption, colours_alone=True)
    seen = read_scene(image, asked=caption)
    nothing_else = asked == shapes == len(seen.shapes)
    return Judged(asked, shapes, colours, nothing_else, right=seen.caption == caption)


@torch.no_grad()
def decoded(pipe: Pipeline, chosen: list[Scene]) -> float:
    """The share of the true images whose captions can be read after encoding and decoding."""
    right = 0
    for scene in chosen:
        image = from_pil(scene.image, scene.image.size)[None]
        drawing = to_pil(pipe.vae.decode(pipe.vae.encode(image).mean)[0].clamp(-1, 1))
        right += read_scene(drawing, asked=scene.caption).caption == scene.caption
    return right / len(chosen)


def grid(drawn: list[Image.Image], chosen: list[Scene], right: list[bool]) -> Image.Image:
    """Four cells a row, each a drawing and its caption; a red frame where it reads otherwise."""
    columns, side, gap, width = 4, 64, 8, 250
    height = side + 2 * gap
    sheet = Image.new("RGB", (columns * width, -(-len(drawn) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, scene, ok) in enumerate(zip(drawn, chosen, right, strict=True)):
        x, y = i % columns * width + gap, i // columns * height + gap
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (x, y))
        outline = "#c8c8c8" if ok else "red"
        draw.rectangle((x - 1, y - 1, x + side, y + side), outline=outline, width=1 if ok else 2)
        font = font_for(scene.caption, 12)
        if font is None:
            continue
        line, top = "", y
        for word in [*scene.caption.split(), None]:
            longer = line if word is None else f"{line} {word}".strip()
            if word is None or draw.textlength(longer, font) > width - side - 3 * gap:
                draw.text((x + side + gap, top), line, fill="black", font=font)
                top, longer = top + 15, word or ""
            line = longer
    return sheet


if __name__ == "__main__":
    main()
