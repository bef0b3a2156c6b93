"""A tiny set of captioned drawings: some concepts, each in some styles, as an image folder."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from latentdiff.data.folder import Example, write_image_folder

SIDE = 16
STYLES = {"red": "tomato", "blue": "navy", "outline": None}


def drawing(concept: int, style: str, side: int = SIDE) -> Image.Image:
    """A random polygon of its own for each concept, filled or outlined."""
    image = Image.new("RGB", (4 * side, 4 * side), "white")
    points = np.random.default_rng(concept).uniform(0.05, 0.95, (4, 2)) * 4 * side
    corners = [tuple(point) for point in points]
    outline = "black" if STYLES[style] is None else STYLES[style]
    ImageDraw.Draw(image).polygon(corners, fill=STYLES[style], outline=outline, width=side // 4)
    return image.resize((side, side), Image.Resampling.BOX)


def write_drawings(out: Path, concepts: int = 8) -> Path:
    """Write every concept in every style; the outline of each fourth concept is in `test`."""
    write_image_folder(
        out,
        (
            Example(
                "test" if style == "outline" and i % 4 == 0 else "train",
                f"{i}-{style}.png",
                drawing(i, style),
                {"text": f"shape {i}", "text_zh": f"形{i}", "concept": f"c{i}", "style": style},
            )
            for i in range(concepts)
            for style in STYLES
        ),
        card=lambda: "",
    )
    return out
