"""LatentStatistics: mean, variance and outliers of the latents of some images, by channel.

Shapes: N images of size S x S, C latent channels, h x w the latents' size.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Self

import torch
from torch import Tensor

from latentdiff.images import to_floats
from latentdiff.models.vae import VAE

FAR = 10.0  # standard deviations, beyond which a Gaussian has one value in 10^23


@dataclass(frozen=True)
class LatentStatistics:
    """Statistics of the latents' posteriors q(z | x) for each channel, (C,) each."""

    active: Tensor
    """Variance of the posterior mean over the images, averaged over positions (Burda et al.)."""
    variance: Tensor
    """Variance of sampled latents: of the posterior mean over images and positions, plus the mean
    posterior variance."""
    mean: Tensor
    """Mean of the posterior mean over images and positions."""
    far: Tensor
    """Fraction of the posterior means' variance in values more than FAR deviations from `mean`."""
    largest: Tensor
    """Largest absolute value of a posterior mean."""

    @classmethod
    @torch.no_grad()
    def of(cls, vae: VAE, images: Iterable[Tensor], *, batch_size: int) -> Self:
        """Encode two or more images, (3, S, S) uint8, in batches, and measure their latents."""
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
