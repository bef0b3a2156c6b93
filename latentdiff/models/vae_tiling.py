"""Latents decoded in overlapping tiles: a large image in the memory of a small one.

Each tile is decoded by itself, so that its norms and its attention see no more than the tile: the
image is close to the one that is decoded whole, not the same. What overlaps is blended linearly.
Shapes: B batch, C latent channels, H/W latent size, f the VAE's factor.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

SMALLEST = 8
"""Latents on the side of a tile, at least: of smaller ones most is near a border."""
OVERLAP = 4
"""A tile shares this part of its side, a quarter, with the next, as in diffusers."""


def check_tile(pixels: object, factor: int) -> None:
    """Raise ValueError for what is no side of a tile, in pixels, of a VAE with this factor."""
    least = SMALLEST * factor
    if type(pixels) is not int or pixels < least:
        raise ValueError(
            f"vae_tiling={pixels!r} must be the side of a tile in pixels, a whole number of at "
            f"least {least} for this VAE, such as {8 * least}"
        )


def decode_in_tiles(
    decode: Callable[[Tensor], Tensor], latents: Tensor, *, tile: int, factor: int
) -> Tensor:
    """Latents (B, C, H, W) -> images (B, 3, fH, fW), by tiles of at most `tile` latents a side.

    `decode` is for one tile, whose bits latents have that one tile holds.
    """
    rows, columns = (windows(size, tile, factor) for size in latents.shape[-2:])
    if len(rows) == len(columns) == 1:
        return decode(latents)
    image, dtype = None, latents.dtype
    for top, down in rows:
        for left, across in columns:
            y, x = (slice(at, at + len(w) // factor) for at, w in ((top, down), (left, across)))
            part = decode(latents[..., y, x])
            if image is None:  # in float32, as sums of bfloat16 would show
                size = [factor * side for side in latents.shape[-2:]]
                image = torch.zeros(*part.shape[:2], *size, device=part.device)
            blend = (down[:, None] * across).to(part.device)
            at = (slice(factor * s.start, factor * s.stop) for s in (y, x))
            image[(..., *at)] += part * blend
    assert image is not None
    return image.to(dtype)


def windows(size: int, tile: int, factor: int) -> list[tuple[int, Tensor]]:
    """Tiles of one axis, as few and small as do: where they begin, and their pixels' weights.

    size, tile: in latents. The weights rise and fall linearly where tiles overlap, and sum to 1 at
    each pixel.
    """
    if size <= tile:
        return [(0, torch.ones(size * factor))]
    overlap = tile // OVERLAP
    count = math.ceil((size - overlap) / (tile - overlap))
    length = math.ceil((size + (count - 1) * overlap) / count)
    starts = [round(i * (size - length) / (count - 1)) for i in range(count)]
    ends = [start + length for start in starts]
    pixels = torch.arange(size * factor) + 0.5
    weights = torch.zeros(count, size * factor)
    for i, start in enumerate(starts):
        rise = torch.ones_like(pixels)
        if i > 0:
            rise = (pixels - start * factor) / ((ends[i - 1] - start) * factor)
        fall = torch.ones_like(pixels)
        if i + 1 < count:
            fall = (ends[i] * factor - pixels) / ((ends[i] - starts[i + 1]) * factor)
        weights[i] = torch.minimum(rise, fall).clamp(0, 1)
    weights /= weights.sum(0)
    return [
        (start, weights[i, start * factor : end * factor])
        for i, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]
