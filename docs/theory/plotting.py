"""How all figures of these pages look, and how they are written: small, and the same each time."""

import io
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

IMAGES = Path(__file__).parent / "images"
# Okabe & Ito's colours, which everybody can tell apart.
BLUE, ORANGE, GREEN, RED = "#0072b2", "#e69f00", "#009e73", "#d55e00"
PURPLE, SKY, GREY = "#cc79a7", "#56b4e9", "0.45"
COLOURS = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY)


def panels(
    rows: int, columns: int, size: tuple[float, float], **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of `size` inches and its panels, row by row."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for panel in axes.flat:
        panel.grid(True, color="0.93", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=9)
        panel.title.set_fontsize(10)
    return figure, list(axes.flat)


def label(panel: Axes, title: str, x: str, y: str) -> None:
    """Title and axes of a panel."""
    panel.set_title(title, fontsize=10)
    panel.set_xlabel(x, fontsize=9)
    panel.set_ylabel(y, fontsize=9)


def image_panel(panel: Axes) -> None:
    """Make a panel one that shows an image: no ticks, no frame."""
    panel.grid(False)
    panel.set_xticks([])
    panel.set_yticks([])
    panel.spines[:].set_visible(False)


def save(figure: Figure, out: Path, name: str, *, colours: int = 128) -> None:
    """Write `name`.png with so many colours: a third of the size, and nothing to be seen of it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120)
    image = Image.open(buffer).convert("RGB").quantize(colours, dither=Image.Dither.NONE)
    image.save(out / f"{name}.png", optimize=True)
