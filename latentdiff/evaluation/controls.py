"""Controls: drawings that nobody would recognise, of which a judge should call few right."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from latentdiff.evaluation.references import References, as_image

BLOT = 0.125  # deviation of the blur, as a fraction of the image's side
CELLS = 8  # a side, of the mosaic and of the shuffled pieces
BATCH_SIZE = 64  # images that are made, or added up, at once


def controls(references: References, wanted: Sequence[int]) -> dict[str, list[Image.Image]]:
    """Images that have something of each wanted reference, but not what it shows.

    "blot": blurred by an eighth of its side, its colours in their places. "mosaic": the mean colour
    of each of 8 x 8 cells. "shuffled": the same cells in another order. "mean": the mean of all
    images of its concept's group, or of all where there is no column `group`. "noise": uniform.
    """
    side = references.pixels.shape[-1]
    generator = torch.Generator().manual_seed(0)
    means = _group_means(references, {_group(references, i) for i in wanted})

    def pixels(rows: Sequence[int]) -> Tensor:
        return references.pixels[list(rows)].float()  # (B, 3, S, S)

    changes: dict[str, Callable[[Sequence[int]], Tensor]] = {
        "blot": lambda rows: blurred(pixels(rows), BLOT * side),
        "mosaic": lambda rows: F.interpolate(
            F.adaptive_avg_pool2d(pixels(rows), CELLS), size=(side, side)
        ),
        "shuffled": lambda rows: torch.stack(
            [_shuffled(image, side // CELLS, generator) for image in pixels(rows)]
        ),
        "mean": lambda rows: torch.stack([means[_group(references, i)] for i in rows]),
        "noise": lambda rows: 255 * torch.rand(len(rows), 3, side, side, generator=generator),
    }
    return {
        name: [
            as_image(image.round().clamp(0, 255).to(torch.uint8))
            for rows in _parts(wanted)
            for image in change(rows)
        ]
        for name, change in changes.items()
    }


def blurred(pixels: Tensor, deviation: float) -> Tensor:
    """Gaussian blur of (B, 3, S, S) by so many pixels; beyond the edges is what is at the edges."""
    reach = min(math.ceil(3 * deviation), pixels.shape[-1] - 1)
    kernel = torch.exp(-torch.arange(-reach, reach + 1).float().square() / (2 * deviation**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    for turned in (kernel, kernel.mT):
        height, width = turned.shape[-2] // 2, turned.shape[-1] // 2
        padded = F.pad(pixels, (width, width, height, height), mode="replicate")
        pixels = F.conv2d(padded, turned, groups=3)
    return pixels


def _shuffled(image: Tensor, cell: int, generator: torch.Generator) -> Tensor:
    """An image (3, S, S), cut into square pieces that are laid out in another order."""
    pieces = F.unfold(image[None], cell, stride=cell)  # (1, 3 · cell², pieces)
    order = torch.randperm(pieces.shape[-1], generator=generator)
    side = cell * int(pieces.shape[-1] ** 0.5)
    return F.interpolate(
        F.fold(pieces[..., order], side, cell, stride=cell), size=image.shape[-2:]
    )[0]


def _parts(rows: Sequence[int]) -> list[Sequence[int]]:
    return [rows[i : i + BATCH_SIZE] for i in range(0, len(rows), BATCH_SIZE)]


def _group(references: References, i: int) -> str:
    return str(references.rows[i].get("group"))


def _group_means(references: References, groups: set[str]) -> dict[str, Tensor]:
    """The mean (3, S, S) of all images of each group."""
    rows: dict[str, list[int]] = {group: [] for group in groups}
    for i in range(len(references)):
        if (group := _group(references, i)) in groups:
            rows[group].append(i)
    sums = {
        group: torch.stack([references.pixels[list(p)].sum(dim=0) for p in _parts(of_group)]).sum(0)
        for group, of_group in rows.items()
    }
    return {group: (total / len(rows[group])).float() for group, total in sums.items()}
