"""Image-to-image and inpainting: the first latents and the denoiser of a request with images.

Text-to-image starts from noise and uses nothing here. Noise is drawn in the order of diffusers, so
that a seed gives the image that it gives there.
Shapes: B images, C latent channels, H/W latent size, h/w image size. Masks are 1 where to draw and
0 where to keep the init image.
"""

import torch
from torch import Tensor

from latentdiff.images import from_pil, mask_from_pil
from latentdiff.levels import Denoise, NoiseLevel
from latentdiff.models.inpainting import latent_masks, mask_channels, masked_images
from latentdiff.models.vae import VAE
from latentdiff.noise import ImageNoise
from latentdiff.request import Request


def edit(
    request: Request,
    denoise: Denoise,
    level: NoiseLevel,
    noise: ImageNoise,
    *,
    vae: VAE,
    inpainting_unet: bool,
) -> tuple[Tensor, Denoise]:
    """The first latents (B, C, H, W), at `level`, and the denoiser in place of `denoise`.

    Inpainting at strength 1 starts from noise alone. Raises ValueError if an inpainting UNet has no
    mask.
    """
    if inpainting_unet and not request.masks:
        raise ValueError("this model is for inpainting: it needs an image and a mask_image")
    variation = request.variation_seeds, request.variation_strength
    size = (noise.size[1] * vae.config.factor, noise.size[2] * vae.config.factor)
    images = _images(request, size).to(noise.device, noise.dtype)
    if not request.masks:
        latents = _encode(vae, images, noise)
        eps = noise.first(*variation)
        return level.alpha * latents + level.sigma * eps, denoise
    masks = _masks(request, size).to(noise.device, noise.dtype)
    if not inpainting_unet:
        latents = _encode(vae, images, noise)
        eps = noise.first(*variation)
        if request.strength == 1:
            return eps, inpainting_denoiser(denoise, masks, latents, eps, noise_only=level.sigma)
        x = level.alpha * latents + level.sigma * eps
        return x, inpainting_denoiser(denoise, masks, latents, eps, noise_only=None)
    latents = None if request.strength == 1 else _encode(vae, images, noise)
    x = noise.first(*variation)
    if latents is not None:
        x = level.alpha * latents + level.sigma * x
    masked_latents = _encode(vae, masked_images(images, masks), noise)
    channels = mask_channels(latent_masks(masks, masked_latents), masked_latents)
    return x, with_channels(denoise, channels)


def inpainting_denoiser(
    denoise: Denoise, masks: Tensor, latents: Tensor, eps: Tensor, *, noise_only: Tensor | None
) -> Denoise:
    """A denoiser that keeps the init image, `latents`, where masks (B, 1, h, w) are 0.

    There it replaces x_t by the noised latents, alpha latents + sigma eps, and the estimate of x0
    by the latents, so that any model can inpaint (RePaint, Lugmayr et al. 2022, arXiv:2201.09865,
    eq. 8, without resampling). With `ddim` the result is exactly that of diffusers, which blends
    the noised latents in after each step. If sampling starts from noise, `noise_only` is the sigma
    at which x_t is eps alone. If `denoise` gives v of a learned variance after x0, v is unchanged.
    """
    masks = latent_masks(masks, latents)

    def denoise_masked(x: Tensor, level: NoiseLevel) -> Tensor:
        init = level.alpha * latents + level.sigma * eps
        if noise_only is not None and level.sigma == noise_only:
            init = eps
        estimate = denoise(masks * x + (1 - masks) * init, level)
        x0, v = estimate.tensor_split([latents.shape[1]], dim=1)
        return torch.cat([masks * x0 + (1 - masks) * latents, v], dim=1)

    return denoise_masked


def with_channels(denoise: Denoise, channels: Tensor) -> Denoise:
    """A denoiser whose network gets `channels` (B, ..., H, W) concatenated after those of x."""

    def denoise_with_channels(x: Tensor, level: NoiseLevel) -> Tensor:
        return denoise(torch.cat([x, channels], dim=1), level)

    return denoise_with_channels


def composite(images: Tensor, request: Request) -> Tensor:
    """Drawn images (B, 3, h, w) whose kept pixels are the init images' own, not the VAE's."""
    size = (images.shape[2], images.shape[3])
    masks = _masks(request, size).to(images)
    return masks * images + (1 - masks) * _images(request, size).to(images)


def _images(request: Request, size: tuple[int, int]) -> Tensor:
    """The init images, (B, 3, h, w) in [-1, 1]."""
    return torch.stack([from_pil(image, size) for image in request.images])


def _masks(request: Request, size: tuple[int, int]) -> Tensor:
    """The masks, (B, 1, h, w), 1 where to draw."""
    return torch.stack([mask_from_pil(mask, size) for mask in request.masks])


def _encode(vae: VAE, images: Tensor, noise: ImageNoise) -> Tensor:
    """A sample of each image's posterior, encoded alone: its bits are the same in any batch."""
    dtype = next(vae.parameters()).dtype
    examples = zip(images.to(dtype).split(1), noise().to(dtype).split(1), strict=True)
    return torch.cat([vae.encode(x).sample(eps) for x, eps in examples]).to(noise.dtype)
