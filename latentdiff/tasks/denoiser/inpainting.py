"""Inpainting in training: what the network reads beside x_t, and previews of what it paints.

Shapes: B images, C latent channels, H/W latent size.
"""

from collections.abc import Sequence

import torch
from PIL import Image, ImageOps
from torch import Tensor

from latentdiff.data.cache import LatentCache, split_masked
from latentdiff.diffusion import Network
from latentdiff.models.inpainting import mask_channels
from latentdiff.models.vae import Posterior
from latentdiff.pipeline import Pipeline

GREY = (128, 128, 128)


def sampled_channels(masks: Tensor, moments: Tensor, noise: Tensor) -> Tensor:
    """The channels that follow x_t, (B, 1 + C, H, W), of masks (B, 1, H, W) and the moments of the
    masked images, (B, 2C, H, W).

    Their latents are sampled with `noise` (B, C, H, W), as they are where the network draws.
    """
    return mask_channels(masks, Posterior.from_moments(moments).sample(noise))


def with_channels(network: Network, channels: Tensor) -> Network:
    """A network that reads `channels` (B, …, H, W) after those of x_t."""

    def read(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return network(torch.cat([x, channels], dim=1), timestep, context)

    return read


def painted(
    pipeline: Pipeline,
    cache: LatentCache,
    examples: Sequence[int],
    prompts: Sequence[str],
    seed: int,
) -> list[Image.Image]:
    """What the network has before it and what it paints, side by side, of each example.

    The image is the VAE's decoding of the cached latents, and the mask that of variant 0.
    """
    pairs = list[Image.Image]()
    for number, (index, prompt) in enumerate(zip(examples, prompts, strict=True)):
        mean = split_masked(cache[index]["moments"])[0].chunk(2)[0]
        [image] = pipeline.decode(mean[None].to(pipeline.device))
        mask = Image.fromarray(cache.mask(index)[0].bool().numpy())
        output = pipeline(
            prompt,
            image=image,
            mask_image=mask,
            seed=seed + number,
            steps=20,
            guidance_scale=4.0,
            progress=False,
        )
        pair = Image.new("RGB", (2 * image.width, image.height))
        pair.paste(Image.composite(Image.new("RGB", image.size, GREY), image, mask))
        pair.paste(output.images[0], (image.width, 0))
        pairs.append(pair)
    size = max(pair.width for pair in pairs), max(pair.height for pair in pairs)
    return [ImageOps.pad(pair, size, color="white") for pair in pairs]
