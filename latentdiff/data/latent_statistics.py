"""LatentStatistics: what is measured on the latents of some images, channel by channel.

Shapes: N images, C latent channels, h x w the latents' size.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Self

import torch
from torch import Tensor

from latentdiff.images import to_floats
from latentdiff.models.vae import VAE

FAR = 10.0  # deviations from a channel's mean, where a Gaussian has one value in 10^23


@dataclass(frozen=True)
class LatentStatistics:
    """Statistics of latents around each channel's mean, (C,) each."""

    active: Tensor
    """Variance of the posterior's mean over the images, averaged over positions (Burda et al.)."""
    variance: Tensor
    """Variance of sampled latents: of the mean over images and positions, plus the noise's."""
    mean: Tensor
    far: Tensor
    """Fraction of the means' variance in values more than FAR deviations away."""
    largest: Tensor
    """The largest absolute value of a mean."""

    @classmethod
    @torch.no_grad()
    def of(cls, vae: VAE, images: Iterable[Tensor], *, batch_size: int) -> Self:
        """Encode images (3, S, S) uint8, two at least, so many at a time, as the cache does."""
        device = next(vae.parameters()).device
        source, means, noise = iter(images), list[Tensor](), list[Tensor]()
        while batch := list(islice(source, batch_size)):
            posterior = vae.encode(to_floats(torch.stack(batch).to(device)))
            means.append(posterior.mean.float().cpu())
            noise.append(posterior.logvar.float().exp().sum(dim=(0, 2, 3)).cpu())
        z = torch.cat(means)  # (N, C, h, w)
        mean = z.mean(dim=(0, 2, 3))
        squares = (z - mean[:, None, None]).square()
        spread = squares.mean(dim=(0, 2, 3))
        is_far = squares > FAR**2 * spread[:, None, None]
        return cls(
            active=z.var(dim=0).mean(dim=(1, 2)),
            variance=spread + torch.stack(noise).sum(0) / (z.numel() / len(mean)),
            mean=mean,
            far=(squares * is_far).mean(dim=(0, 2, 3)) / spread,
            largest=z.abs().amax(dim=(0, 2, 3)),
        )
