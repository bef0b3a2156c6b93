"""Latents that are scaled and turned as images are: the regulariser of EQ-VAE.

Kouzelis et al. 2025 (arXiv:2502.09509): in some of the steps the decoder gets transformed latents,
and its target is the image, transformed in the same way. Encoder and decoder then share latents
that keep the layout of the image at every scale, which the paper's denoisers learn faster.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.training.randomness import generator


@dataclass(frozen=True)
class Transformation:
    """Scales (B, C, H, W) to `height` and `width` of latents, then turns it left."""

    height: int
    width: int
    quarter_turns: int

    def __call__(self, x: Tensor, *, factor: int = 1) -> Tensor:
        """Of latents with a factor of 1, of images with that of the VAE."""
        size = (factor * self.height, factor * self.width)
        # Without antialiasing, as in the authors' code, which trained the paper's networks.
        scaled = F.interpolate(x, size, mode="bilinear", align_corners=False)
        return torch.rot90(scaled, self.quarter_turns, dims=(-2, -1))


def draw_transformation(
    height: int, width: int, *, probability: float, seed: int, step: int
) -> Transformation | None:
    """The step's transformation of latents (B, C, height, width), with a probability, or None.

    The shorter side becomes a whole number from `smallest_side` up to one less than it was, each as
    likely, and one, two or three quarter turns follow. All examples of a step have the same one,
    since they must have one size.
    """
    draw = generator(seed, step, "equivariance")
    if float(torch.rand((), generator=draw)) >= probability:
        return None
    short = min(height, width)
    side = int(torch.randint(smallest_side(short), short, (), generator=draw))
    turns = int(torch.randint(1, 4, (), generator=draw))
    return Transformation(round(height * side / short), round(width * side / short), turns)


def smallest_side(side: int) -> int:
    """A quarter of the side of the latents, rounded up: the least that they are scaled to."""
    return -(-side // 4)


def check_equivariance(image_size: int, factor: int, *, needed: int) -> None:
    """Raise ValueError where scaled images would have a side of less than `needed` pixels.

    `factor` is that of the VAE.
    """
    # factor · smallest_side(image_size / factor) >= needed, and a side of latents that can shrink.
    least = factor * max(2, 4 * -(-needed // factor) - 3)
    if image_size < least:
        raise ValueError(
            f"image_size={image_size} must be at least {least} with equivariance_probability, or "
            "that 0: latents are scaled down to a quarter, and the loss needs images of "
            f"{needed} pixels"
        )
