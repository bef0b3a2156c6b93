"""The reconstruction check: whether a VAE gives images back as they are, in sharpness and colour.

It encodes and decodes some of the denoiser's training images. docs/vae.md has the reason for each
limit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.images import to_floats, to_pixels
from latentdiff.models.vae import VAE
from latentdiff.options import option

SQUARE = 8
"""Pixels of a side over which colours are averaged, so that blur is no error of colour."""
COLOURED = 4.0
"""Levels of chroma that images have on average at least, so that their colours are judged."""
NUM_DECODED = 64  # images that are measured


@dataclass(frozen=True)
class ReconstructionLimits:
    """What a VAE is refused for, before images are encoded."""

    min_psnr: float = option(20.0, needs="check_latents")
    """Least mean PSNR, in dB, of images that the VAE has encoded and decoded; 0 allows any."""
    max_colour_error: float = option(0.35, needs="check_latents")
    """Largest error of their colours, as a fraction of how far these are from grey; 1 is that of
    grey images, 10 allows any."""

    def __post_init__(self) -> None:
        for name in ("min_psnr", "max_colour_error"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")


@dataclass(frozen=True)
class Reconstruction:
    """How a VAE gives images back."""

    num_images: int
    psnr: float
    """In dB, the mean over images of 10 log10(255² / mean squared error)."""
    levels: float
    """Mean absolute error of the colours of squares of 8 x 8 pixels, of 0 … 255."""
    colour_error: float
    """Error of the squares' chroma, their colours less their greys, by the chroma; 0 for images
    that are grey but for less than COLOURED levels."""

    def __str__(self) -> str:
        return (
            f"the VAE gives {self.num_images} images back with {self.psnr:.1f} dB PSNR; their "
            f"colours are off by {self.levels:.1f} of 255 levels, "
            f"{self.colour_error:.0%} of their distance from grey"
        )


@torch.no_grad()
def reconstruction(vae: VAE, images: Sequence[Tensor], *, batch_size: int) -> Reconstruction:
    """Measure what a VAE makes of square images (3, S, S) uint8 by the mean of its latents."""
    device = next(vae.parameters()).device
    psnrs, levels = list[Tensor](), list[Tensor]()
    error = chroma = torch.zeros((), dtype=torch.float64)
    count = 0
    for start in range(0, len(images), batch_size):
        pixels = torch.stack(tuple(images[start : start + batch_size]))
        decoded = vae.decode(vae.encode(to_floats(pixels.to(device))).mean)
        shown = to_pixels(decoded).cpu().double()
        mse = (shown - pixels).square().mean(dim=(1, 2, 3)).clamp(min=1e-3)
        psnrs.append(10 * torch.log10(255**2 / mse))
        before, after = (_squares(one) for one in (pixels.double(), shown))
        levels.append((after - before).abs().mean(dim=(1, 2, 3)))
        error = error + _chroma(after - before).sum()
        chroma = chroma + _chroma(before).sum()
        count += _chroma(before).numel()
    coloured = float(chroma) >= COLOURED * count
    return Reconstruction(
        num_images=len(images),
        psnr=float(torch.cat(psnrs).mean()),
        levels=float(torch.cat(levels).mean()),
        colour_error=float(error / chroma) if coloured else 0.0,
    )


def reconstruction_faults(found: Reconstruction, limits: ReconstructionLimits) -> list[str]:
    """List what is wrong with a reconstruction, one sentence each, with the option that allows it;
    the list is empty for a good one."""
    faults = list[str]()
    if not found.psnr >= limits.min_psnr:  # also true of NaN
        faults.append(
            f"blurred: the images come back with {found.psnr:.1f} dB PSNR, where "
            f"{limits.min_psnr:g} is the least, and nothing that is drawn can be "
            "sharper (--min_psnr 0 goes on)"
        )
    if not found.colour_error <= limits.max_colour_error:
        faults.append(
            f"discoloured: the colours come back wrong by {found.colour_error:.0%} of their "
            f"distance from grey ({found.levels:.1f} of 255 levels), where "
            f"{limits.max_colour_error:.0%} is allowed, and what is drawn has such colours "
            "(--max_colour_error 10 goes on)"
        )
    if faults:
        faults[-1] += "; train the VAE for more steps, with more latent_channels or less kl_weight"
    return faults


def _squares(pixels: Tensor) -> Tensor:
    """Mean colours (B, 3, s, s) of the squares of images (B, 3, S, S)."""
    return F.avg_pool2d(pixels, min(SQUARE, pixels.shape[-1]))


def _chroma(colours: Tensor) -> Tensor:
    """Euclidean length of the colours (B, 3, s, s) less their grey, (B, s, s)."""
    return (colours - colours.mean(dim=1, keepdim=True)).norm(dim=1)
