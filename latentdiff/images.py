"""Images: tensors in [-1, 1] to PIL and back, and grids of them with labels."""

import math
import textwrap
from collections.abc import Collection, Sequence

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

# The fonts of labels, in order: None is Pillow's default with Latin letters; the others have more.
SYSTEM_FONTS = (
    None,
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "PingFang.ttc",  # macOS
    "Arial Unicode.ttf",  # macOS
    "msyh.ttc",  # Windows
)
MASK_WITH_TRANSPARENCY = (
    "a mask with transparent pixels does not say what becomes of them; make them white, to be "
    "drawn, or black, to be kept"
)
LARGE_GUIDANCE = 100.0  # far beyond use
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def to_floats(pixels: Tensor) -> Tensor:
    """Pixels, uint8 0 … 255 of any shape, as float32 -1 … 1."""
    return pixels.float() / 127.5 - 1.0


def to_pixels(images: Tensor) -> Tensor:
    """Floats -1 … 1 as uint8; rounded, since truncation darkens by half a level, and clipped."""
    return ((images.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """An image (3, H, W) in [-1, 1] as RGB. Raises ValueError if it is not finite."""
    if not image.isfinite().all():
        raise ValueError("the image has values that are not finite")
    return Image.fromarray(rearrange(to_pixels(image.detach()), "c h w -> h w c").cpu().numpy())


def why_not_finite(latents: Tensor, scale: float, *, dtypes: Collection[torch.dtype]) -> str:
    """The sentence for latents (B, C, H, W) of which no finite image was made.

    scale is that of guidance; `dtypes` are those of the networks, one of which may have overflowed.
    """
    if scale > LARGE_GUIDANCE:
        why = f"guidance_scale={scale:g} leads too far; it is rarely above 20"
    elif torch.float16 in dtypes:
        why = "float16 overflows in some networks; load with dtype=torch.float32 or bfloat16"
    else:
        why = "a smaller guidance_scale may help, unless the weights are damaged"
    return (
        "the image has values that are not finite (its latents reach "
        f"{latents.abs().max():.3g}, those of an image about 5): {why}"
    )


def from_pil(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """An image as (3, H, W) in [-1, 1], resized to `size` = (H, W); transparent becomes white."""
    image = _resized(to_rgb(image), size)
    return to_floats(rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w"))


def to_rgb(image: Image.Image, *, background: str = "white") -> Image.Image:
    """An RGB image as a viewer shows it: upright, in 8 bits, on `background` if transparent.

    Raises ValueError for 32-bit integers, and for floats that are not all from 0 to 1: which value
    is white is unknown, and Pillow's own conversion clips at 255.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def to_mask(image: Image.Image) -> Image.Image:
    """A mask as a viewer shows it, in grey. Raises ValueError as `to_rgb`, and for transparency.

    A transparent pixel would be drawn for one program, which erases what it wants drawn, and kept
    for another, which paints it in white.
    """
    on_white, on_black = (to_rgb(image, background=colour) for colour in ("white", "black"))
    if on_white != on_black:
        raise ValueError(MASK_WITH_TRANSPARENCY)
    return on_white.convert("L")


def mask_from_pil(mask: Image.Image, size: tuple[int, int]) -> Tensor:
    """A mask in grey as (1, H, W), 1 where it is nearer to white than to black and 0 elsewhere."""
    grey = torch.from_numpy(np.array(_resized(mask, size)))
    return (grey.float() / 255 >= 0.5).float()[None]


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more bits in 8: 16-bit integers, and floats from 0 to 1."""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray((values / 257).round().astype(np.uint8))
    low, high = float(values.min()), float(values.max())
    if image.mode == "I" or not (low >= 0 and high <= 1):  # nor is NaN
        raise ValueError(
            f"mode {image.mode} with values from {low:g} to {high:g}; white is known of 8 and 16 "
            "bits, and of floats from 0 to 1"
        )
    return Image.fromarray((values * 255).round().astype(np.uint8))


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image at `size` = (H, W), by Lanczos."""
    width_height = (size[1], size[0])
    if image.size == width_height:
        return image
    return image.resize(width_height, Image.Resampling.LANCZOS)


def image_grid(
    images: Sequence[Image.Image],
    labels: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    plain: Sequence[str] | None = None,
) -> Image.Image:
    """Lay images out row by row, about as many columns as rows, with a label under each.

    `plain` has an ASCII label for each image, which is drawn if no font of this machine has all the
    characters of its label; without `plain` such a label is omitted.
    """
    gap, lines, font_size = 8 if labels else 4, 2, 14
    columns = columns if columns is not None else math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = max(i.width for i in images), max(i.height for i in images)
    if labels and width < 128:  # a label needs room
        width, height = 128, round(height * 128 / width)
    text_height = lines * (font_size + 4) if labels else 0
    cell = (width + gap, height + gap + text_height)
    grid = Image.new("RGB", (columns * cell[0] + gap, rows * cell[1] + gap), "white")
    draw = ImageDraw.Draw(grid)
    for i, image in enumerate(images):
        x, y = gap + i % columns * cell[0], gap + i // columns * cell[1]
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        grid.paste(image, (x, y))
        label, font = drawable([labels[i] if labels else "", plain[i] if plain else ""], font_size)
        if label := " ".join(label.split()):
            per_line = max(1, int(len(label) * width / max(1.0, draw.textlength(label, font))))
            text = textwrap.wrap(label, per_line, max_lines=lines, placeholder="…")
            draw.multiline_text((x, y + height + 2), "\n".join(text), fill="black", font=font)
    return grid


def drawable(labels: Sequence[str], size: int) -> tuple[str, Font | None]:
    """The first label whose characters some font of this machine has, with that font, or ""."""
    for label in labels:
        font = font_for(label, size)
        if font is not None:
            return label, font
    return "", None


def font_for(text: str, size: int) -> Font | None:
    """The first of `SYSTEM_FONTS` that is installed and has all the characters, or None."""

    def rendered(character: str, font: Font) -> bytes:
        image = Image.new("L", (2 * size, 2 * size))
        ImageDraw.Draw(image).text((0, 0), character, fill=255, font=font)
        return image.tobytes()

    for name in SYSTEM_FONTS:
        try:
            font = ImageFont.load_default(size) if name is None else ImageFont.truetype(name, size)
        except OSError:
            continue  # not on this machine
        no_glyph = rendered("\U0010ffff", font)  # the box drawn for a character without a glyph
        if all(c.isspace() or rendered(c, font) != no_glyph for c in set(text)):
            return font
    return None
