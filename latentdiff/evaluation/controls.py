"""Controls: drawings that nobody would recognise, of which a judge should call few right."""

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from latentdiff.evaluation.references import References, as_image

BLOT = 0.125  # deviation of the blur, as a fraction of the image's side
CELLS = 8  # a side, of the mosaic and of the shuffled pieces


def controls(references: References, wanted: list[int]) -> dict[str, list[Image.Image]]:
    """Images that have something of each wanted reference, but not what it shows.

    "blot": blurred by an eighth of its side, its colours in their places. "mosaic": the mean colour
    of each of 8 x 8 cells. "shuffled": the same cells in another order. "mean": the mean of all
    images of its concept's group, or of all where there is no column `group`. "noise": uniform.
    """
    pixels = references.pixels[wanted].float()  # (B, 3, S, S)
    generator = torch.Generator().manual_seed(0)
    cell = pixels.shape[-1] // CELLS
    made = {
        "blot": _blurred(pixels, BLOT * pixels.shape[-1]),
        "mosaic": F.interpolate(F.adaptive_avg_pool2d(pixels, CELLS), size=pixels.shape[-2:]),
        "shuffled": torch.stack([_shuffled(image, cell, generator) for image in pixels]),
        "mean": _group_means(references)[wanted],
        "noise": 255 * torch.rand(pixels.shape, generator=generator),
    }
    return {
        name: [as_image(image.round().clamp(0, 255).to(torch.uint8)) for image in images]
        for name, images in made.items()
    }


def _blurred(pixels: Tensor, deviation: float) -> Tensor:
    """Gaussian blur of (B, 3, S, S); beyond the edges is what is at the edges."""
    reach = min(int(3 * deviation), pixels.shape[-1] - 1)
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


def _group_means(references: References) -> Tensor:
    """The mean of each image's group (N, 3, S, S)."""
    groups = [str(row.get("group")) for row in references.rows]
    means = {}
    for group in set(groups):
        rows = [i for i, name in enumerate(groups) if name == group]
        means[group] = references.pixels[rows].float().mean(dim=0)
    return torch.stack([means[group] for group in groups])
