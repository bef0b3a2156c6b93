"""Random augmentation of the images that a CLIP is trained on: crops, blur and noise.

Images are (B, C, H, W) in [-1, 1]; u are random numbers, uniform in [0, 1).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class AugmentationConfig:
    """How strong the augmentation is."""

    crop_scale: float = 0.8
    """The side of the random square crops is at least this fraction of the image's."""
    blur: float = 0.0
    """Deviation in pixels, at most, of a Gaussian blur: a tower that is to judge generated images
    must not rely on their finest details."""
    noise: float = 0.0
    """Deviation, at most, of Gaussian noise; images are in [-1, 1]."""

    def __post_init__(self) -> None:
        for name in ("blur", "noise"):
            if not 0 <= getattr(self, name) <= 8:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to 8")


def draws(
    config: AugmentationConfig, shape: Sequence[int], draw: Callable[..., Tensor]
) -> dict[str, Tensor]:
    """The random numbers by which images of `shape`, (C, H, W), are augmented, by purpose.

    `draw(purpose, *shape)` returns u (B, *shape), and `draw(..., of=torch.randn)` N(0, I).
    """
    drawn = {"crop": draw("crop", 3)}
    if config.blur > 0:
        drawn["blur"] = draw("blur")
    if config.noise > 0:
        drawn["noise strength"] = draw("noise strength", 1, 1, 1)
        drawn["noise"] = draw("noise", *shape, of=torch.randn)
    return drawn


def augment(images: Tensor, config: AugmentationConfig, drawn: Mapping[str, Tensor]) -> Tensor:
    """Crop, blur and add noise to images, by the numbers of `draws`."""
    images = crop(images, drawn["crop"].to(images), scale=config.crop_scale)
    if config.blur > 0:
        sigma = config.blur * drawn["blur"].to(images)
        images = blur(images, sigma, longest=config.blur)
    if config.noise > 0:
        strength = config.noise * drawn["noise strength"].to(images)
        images = images + strength * drawn["noise"].to(images)
    return images


def crop(images: Tensor, u: Tensor, *, scale: float) -> Tensor:
    """Crop random squares and resize them to the image's size, as open_clip does.

    u (B, 3): the side, from `scale` to 1, and the position of the square in x and y.
    """
    side = scale + (1 - scale) * u[:, 0]
    shift = (2 * u[:, 1:] - 1) * (1 - side[:, None])  # keeps the square inside
    maps = torch.zeros(len(images), 2, 3, device=images.device)
    maps[:, 0, 0] = maps[:, 1, 1] = side
    maps[:, :, 2] = shift
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def blur(images: Tensor, sigma: Tensor, *, longest: float) -> Tensor:
    """Blur each image (B, C, H, W) by a Gaussian of its own sigma, (B,) in pixels.

    All are cut at three deviations of the `longest` that there may be, which is no sigma's of the
    batch: it would differ between processes, and the host would wait for it.
    """
    radius = max(1, math.ceil(3 * longest))
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernels = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]) ** 2)  # (B, K)
    kernels = kernels / kernels.sum(dim=1, keepdim=True)
    channels = images.shape[1]
    padded = F.pad(images, (radius, radius, radius, radius), mode="replicate")
    weights = kernels.repeat_interleave(channels, dim=0)  # one for each image and channel
    x = rearrange(padded, "b c h w -> 1 (b c) h w")
    x = F.conv2d(x, weights[:, None, None, :], groups=len(weights))
    x = F.conv2d(x, weights[:, None, :, None], groups=len(weights))
    return rearrange(x, "1 (b c) h w -> b c h w", c=channels)
