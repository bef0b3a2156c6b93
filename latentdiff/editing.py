"""Image-to-image and inpainting: where sampling starts from, and what of an image is to stay.

Shapes: B images, C latent channels, H/W latent size, h/w image size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.diffusion import Network
from latentdiff.levels import Denoise, NoiseLevel
from latentdiff.models.vae import VAE
from latentdiff.noise import ImageNoise


@dataclass(frozen=True)
class Given:
    """Images that are given, (B, 3, h, w) in [-1, 1], and where to draw them anew.

    `masks` (B, 1, h, w) is 1 where to draw and 0 where to keep; None draws all of it anew.
    """

    images: Tensor
    masks: Tensor | None = None

    def latents(self, vae: VAE, noise: ImageNoise) -> Tensor:
        """The images as latents, (B, C, H, W)."""
        return _encode(vae, self.images, noise)

    def channels(self, vae: VAE, noise: ImageNoise) -> Tensor:
        """What an inpainting UNet sees beside x_t: mask and masked images, (B, 1 + C, H, W)."""
        assert self.masks is not None
        masked = _encode(vae, self.images * (1 - self.masks), noise)  # grey where it is drawn
        return torch.cat([self.latent_masks(masked), masked], dim=1)

    def latent_masks(self, latents: Tensor) -> Tensor:
        """The masks at the latents' size, (B, 1, H, W): the nearest pixel, as in diffusers."""
        assert self.masks is not None
        return F.interpolate(self.masks, size=latents.shape[-2:])

    def keep(
        self, denoise: Denoise, latents: Tensor, eps: Tensor, *, noise_only: Tensor | None
    ) -> Denoise:
        """A denoiser that knows what to keep: there x0 is `latents`, and x_t that with noise eps.

        So any model inpaints (Lugmayr et al. 2022, arXiv:2201.09865, eq. 8, without resampling).
        As a sampler moves x by what the denoiser estimates, what is kept stays the image: with
        `ddim` exactly as if latents were blended after each step, which is what diffusers does.
        `noise_only` is the sigma at which x_t is eps, if sampling starts from noise, as there. What
        `denoise` gives after x0, the share of a learned variance, is left as it is.
        """
        masks = self.latent_masks(latents)

        def denoise_rest(x: Tensor, level: NoiseLevel) -> Tensor:
            known = level.alpha * latents + level.sigma * eps
            if noise_only is not None and level.sigma == noise_only:
                known = eps
            given = denoise(masks * x + (1 - masks) * known, level)
            x0, shares = given.tensor_split([latents.shape[1]], dim=1)
            return torch.cat([masks * x0 + (1 - masks) * latents, shares], dim=1)

        return denoise_rest

    def paste(self, images: Tensor) -> Tensor:
        """Drawn images with the kept pixels of the given ones, which the VAE would change."""
        if self.masks is None:
            return images
        masks = self.masks.to(images)
        return masks * images + (1 - masks) * self.images.to(images)


def with_channels(network: Network, channels: Tensor) -> Network:
    """A network that is shown `channels` (B, ..., H, W) beside x, in both halves of guidance."""

    def call(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        more = channels.repeat(len(x) // len(channels), 1, 1, 1)
        return network(torch.cat([x, more], dim=1), timestep, context)

    return call


def _encode(vae: VAE, images: Tensor, noise: ImageNoise) -> Tensor:
    """A sample of each image's posterior, one by one, so that neighbours change nothing."""
    dtype = next(vae.parameters()).dtype
    pairs = zip(images.to(dtype).split(1), noise().to(dtype).split(1), strict=True)
    return torch.cat([vae.encode(x).sample(eps) for x, eps in pairs]).to(noise.dtype)
