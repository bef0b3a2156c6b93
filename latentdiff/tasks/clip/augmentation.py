"""What is done to the images that a CLIP is trained on: crops, blur and noise, all at random.

Shapes: B images (B, C, H, W) in [-1, 1]; u are numbers that are uniform in [0, 1).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class AugmentationConfig:
    """How much images are changed before a CLIP sees them."""

    crop_scale: float = 0.8
    """Training sees random squares whose side is this fraction of the image's, or more."""
    blur: float = 0.0
    """And each blurred by up to so many pixels: a tower that is to judge an autoencoder's or a
    UNet's images must not live on their finest details."""
    noise: float = 0.0
    """And with Gaussian noise of up to this deviation; images are in [-1, 1]."""

    def __post_init__(self) -> None:
        for name in ("blur", "noise"):
            if not 0 <= getattr(self, name) <= 8:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to 8")


def augment(images: Tensor, config: AugmentationConfig, draw: Callable[..., Tensor]) -> Tensor:
    """Crop, blur and add noise to images. `draw(purpose, *shape)` gives u (B, *shape), and
    `draw(..., of=torch.randn)` N(0, I)."""
    images = crop(images, draw("crop", 3).to(images), scale=config.crop_scale)
    if config.blur > 0:
        images = blur(images, config.blur * draw("blur").to(images))
    if config.noise > 0:
        strength = config.noise * draw("noise strength", 1, 1, 1).to(images)
        images = images + strength * draw("noise", *images.shape[1:], of=torch.randn).to(images)
    return images


def crop(images: Tensor, u: Tensor, *, scale: float) -> Tensor:
    """Cut random squares and enlarge them to the image's size (open_clip trains on such).

    u (B, 3): the side, from `scale` to 1, and where the square lies in x and y.
    """
    side = scale + (1 - scale) * u[:, 0]
    shift = (2 * u[:, 1:] - 1) * (1 - side[:, None])  # keeps the square inside
    maps = torch.zeros(len(images), 2, 3, device=images.device)
    maps[:, 0, 0] = maps[:, 1, 1] = side
    maps[:, :, 2] = shift
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image (B, C, H, W) by a Gaussian of its own deviation, (B,) in pixels."""
    reach = max(1, math.ceil(3 * float(sigma.max())))
    offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    kernels = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]) ** 2)  # (B, K)
    kernels = kernels / kernels.sum(dim=1, keepdim=True)
    channels = images.shape[1]
    rows = F.pad(images, (reach, reach, reach, reach), mode="replicate")
    weights = kernels.repeat_interleave(channels, dim=0)  # one for each image and channel
    x = rearrange(rows, "b c h w -> 1 (b c) h w")
    x = F.conv2d(x, weights[:, None, None, :], groups=len(weights))
    x = F.conv2d(x, weights[:, None, :, None], groups=len(weights))
    return rearrange(x, "1 (b c) h w -> b c h w", c=channels)
