"""An autoencoder around its training: what a given one starts as, and what is measured of it."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from latentdiff.images import to_floats
from latentdiff.models.vae import VAE, Posterior
from latentdiff.training.losses import hinge_loss

TOGETHER = 16  # images that are measured at a time, in float32


def given_vae(folder: Path, *, image_size: int, decoder_only: bool) -> VAE:
    """The VAE of a folder, to be trained on; with `decoder_only` its encoder needs no gradient.

    `image_size` is the side of the images in pixels. Raises ValueError for a folder that holds no
    VAE, and for one without the 1×1 convolutions in which the scale of its latents is undone.
    """
    vae = VAE.from_pretrained(folder)
    vae.config = replace(vae.config, sample_size=image_size)
    if decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
        return vae
    # Its latents are standard after scaling; before it is where the KL asks for that.
    C = vae.config.latent_channels
    vae.fold_latent_statistics(torch.zeros(C), torch.full((C,), 1 / vae.config.scaling_factor))
    return vae


def latent_statistics(vae: VAE, images: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel of the latents of images (3, H, W) uint8: (C,), (C,)."""
    posteriors = [vae.encode(images) for images in _parts(vae, images)]
    whole = Posterior(
        torch.cat([p.mean for p in posteriors]), torch.cat([p.logvar for p in posteriors])
    )
    mean = whole.mean.mean(dim=(0, 2, 3))
    # The variance of a sampled latent: that of its mean plus the mean of its variance.
    variance = whole.mean.var(dim=(0, 2, 3)) + whole.logvar.exp().mean(dim=(0, 2, 3))
    return mean, variance.sqrt()


def discriminator_scores(
    vae: VAE, discriminator: nn.Module, images: Iterable[Tensor]
) -> dict[str, float]:
    """Mean scores of images (3, H, W) uint8 and of their reconstructions, and the hinge loss.

    The loss is 1 where the discriminator tells nothing and 0 where it is always sure.
    """
    scores = [
        (discriminator(images), discriminator(vae.decode(vae.encode(images).mean)))
        for images in _parts(vae, images)
    ]
    real, fake = (torch.cat(part) for part in zip(*scores, strict=True))
    return {
        "disc_real": float(real.mean()),
        "disc_fake": float(fake.mean()),
        "disc_loss": float(hinge_loss(real, fake)),
    }


def _parts(vae: VAE, images: Iterable[Tensor]) -> Iterator[Tensor]:
    """Images (3, H, W) uint8, some at a time as the VAE takes them: (B, 3, H, W) in [-1, 1]."""
    device = next(vae.parameters()).device
    left = iter(images)
    while part := list(islice(left, TOGETHER)):
        yield to_floats(torch.stack(part).to(device))
