"""A contact sheet for a judge: each drawing beside the true image, its prompt under both."""

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw

from latentdiff.images import font_for

COLUMNS, SIDE, GAP, LABEL, FONT_SIZE = 8, 64, 6, 18, 11  # cells a row; the rest in pixels


class Cell(NamedTuple):
    """A drawing, the true image, the prompt, and what the judge said."""

    drawing: Image.Image
    true: Image.Image
    prompt: str
    right: bool


def contact_sheet(cells: Sequence[Cell]) -> Image.Image:
    """Lay the cells out, eight a row; a drawing that is wrong has a red frame.

    Of a prompt the first line is shown, and none for which no font of this machine has the
    characters.
    """
    width, height = 2 * SIDE + 3 * GAP, SIDE + LABEL + 2 * GAP
    sheet = Image.new("RGB", (COLUMNS * width, -(-len(cells) // COLUMNS) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, cell in enumerate(cells):
        x, y = i % COLUMNS * width + GAP, i // COLUMNS * height + GAP
        for image, left in ((cell.drawing, x), (cell.true, x + SIDE + GAP)):
            sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, y))
        if not cell.right:
            draw.rectangle((x - 2, y - 2, x + SIDE + 1, y + SIDE + 1), outline="red", width=2)
        label = cell.prompt.partition("\n")[0]
        font = font_for(label, FONT_SIZE)
        if font is not None:
            while draw.textlength(label, font) > width - GAP:
                label = label[:-2] + "…"
            draw.text((x, y + SIDE + 3), label, fill="black", font=font)
    return sheet
