"""Colours and edge orientations of an image on coarse grids: features that nothing was trained for.

The orientations are histograms of oriented gradients (Dalal & Triggs 2005) without their blocks:
the whole image is normalised at once. N images.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from latentdiff.data.crop_flip import crop_to
from latentdiff.images import from_pil

SIDE = 64  # pixels
COLOUR_CELLS = 16  # a side
EDGE_CELLS = 8  # a side
ORIENTATIONS = 8
WIDTH = 3 * COLOUR_CELLS**2 + ORIENTATIONS * EDGE_CELLS**2


def edge_features(images: Iterable[Image.Image]) -> Tensor:
    """Features (N, 1280) of RGB images of any size: mean colours of 16 x 16 cells, edges of 8 x 8.

    Both parts have length 1, so that they have equal weight in a product of two images.
    """
    squares = [from_pil(crop_to(image, (SIDE, SIDE)), (SIDE, SIDE)) for image in images]
    if not squares:
        return torch.empty(0, WIDTH)
    pixels = 1 - torch.stack(squares)  # how much ink: 0 is white
    colours = F.adaptive_avg_pool2d(pixels, COLOUR_CELLS)
    edges = F.adaptive_avg_pool2d(_orientations(pixels.mean(dim=1)), EDGE_CELLS)
    return torch.cat([F.normalize(part.flatten(1), dim=1) for part in (colours, edges)], dim=1)


def _orientations(grey: Tensor) -> Tensor:
    """Strength of the edges of each orientation at each pixel: (N, S, S) -> (N, O, S, S).

    An edge between two orientations counts for both, by its nearness to each.
    """
    padded = F.pad(grey[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    dx = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    dy = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    strength = torch.hypot(dx, dy)
    angle = torch.atan2(dy, dx) / math.pi * ORIENTATIONS  # of a line: the same after half a turn
    centres = torch.arange(ORIENTATIONS).view(-1, 1, 1)
    apart = (angle[:, None] - centres + ORIENTATIONS / 2) % ORIENTATIONS - ORIENTATIONS / 2
    return strength[:, None] * (1 - apart.abs()).clamp(min=0)
