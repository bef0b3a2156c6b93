"""What an inpainting network reads beside the noisy latents, and how a network comes to read it.

As in runwayml's inpainting model of SD 1.5 and in diffusers: the mask, then the latents of the
image with grey in the mask's place.
Shapes: B images, C latent channels, H/W latent size, h/w image size. Masks are 1 where to draw and
0 where to keep the image.
"""

from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.models.dit import DiT
from latentdiff.models.unet import UNet

N = TypeVar("N", bound=UNet | DiT)


def masked_images(images: Tensor, masks: Tensor) -> Tensor:
    """Images (B, 3, h, w) in [-1, 1] with grey, 0, where masks (B, 1, h, w) are 1."""
    return images * (1 - masks)


def latent_masks(masks: Tensor, latents: Tensor) -> Tensor:
    """The masks at the size of the latents, (B, 1, H, W): the nearest pixel, as in diffusers."""
    return F.interpolate(masks, size=latents.shape[-2:])


def mask_channels(masks: Tensor, masked_latents: Tensor) -> Tensor:
    """(B, 1, H, W), (B, C, H, W) -> the channels that follow those of x, (B, 1 + C, H, W)."""
    return torch.cat([masks, masked_latents], dim=1)


@torch.no_grad()
def with_mask_channels(network: N, latent_channels: int) -> N:
    """The network with 2C + 1 input channels; one that has them is returned as it is.

    One with C is changed in place: the weights of its new channels are 0, so that it computes what
    it did, whatever it reads there. Raises ValueError for any other number.
    """
    channels = 2 * latent_channels + 1
    if network.config.in_channels == channels:
        return network
    if network.config.in_channels != latent_channels:
        raise ValueError(
            f"in_channels={network.config.in_channels} of the network must be {latent_channels}, "
            f"the VAE's latent_channels, or {channels}, with mask and masked image"
        )
    if isinstance(network, UNet):
        network.config = replace(network.config, in_channels=channels)
        network.conv_in = _widened(network.conv_in, channels)
    else:
        network.config = replace(network.config, in_channels=channels)
        network.patch_embed = _widened(network.patch_embed, channels)
    return network


def _widened(conv: nn.Conv2d, channels: int) -> nn.Conv2d:
    """The convolution with more input channels, the new ones last and with weights of 0."""
    new = channels - conv.in_channels
    zeros = conv.weight.new_zeros(conv.out_channels, new, *conv.kernel_size)
    conv.weight = nn.Parameter(torch.cat([conv.weight, zeros], dim=1))
    conv.in_channels = channels
    return conv
