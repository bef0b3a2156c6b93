"""Before and after a VAE's training: the initial VAE, latent statistics, discriminator scores."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from latentdiff.images import to_floats
from latentdiff.models.vae import VAE
from latentdiff.tasks.vae.losses import hinge_loss

BATCH_SIZE = 16  # of images, in float32


def initial_vae(folder: Path, *, image_size: int, decoder_only: bool) -> VAE:
    """The VAE of a folder, to be trained on; `decoder_only` freezes its encoder.

    `image_size` is the side of the images in pixels. Raises ValueError for a folder that holds no
    VAE, and for one without the 1×1 convolutions in which the scale of its latents is undone.
    """
    vae = VAE.from_pretrained(folder)
    vae.config = replace(vae.config, sample_size=image_size)
    if decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
        return vae
    # Its latents have unit variance after scaling, and the KL asks for that before scaling.
    C = vae.config.latent_channels
    vae.fold_latent_statistics(torch.zeros(C), torch.full((C,), 1 / vae.config.scaling_factor))
    return vae


def latent_statistics(vae: VAE, images: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel of the latents of images (3, H, W) uint8: (C,), (C,)."""
    posteriors = [vae.encode(batch) for batch in _batches(vae, images)]
    means = torch.cat([p.mean for p in posteriors])
    logvars = torch.cat([p.logvar for p in posteriors])
    mean = means.mean(dim=(0, 2, 3))
    # The variance of a sampled latent: that of its mean plus the mean of its variance.
    variance = means.var(dim=(0, 2, 3)) + logvars.exp().mean(dim=(0, 2, 3))
    return mean, variance.sqrt()


def discriminator_scores(
    vae: VAE, discriminator: nn.Module, images: Iterable[Tensor]
) -> dict[str, float]:
    """Mean scores of images (3, H, W) uint8 and of their reconstructions, and the hinge loss.

    The loss is 1 if the discriminator tells nothing apart, and 0 if it is always sure.
    """
    scores = [
        (discriminator(batch), discriminator(vae.decode(vae.encode(batch).mean)))
        for batch in _batches(vae, images)
    ]
    real, fake = (torch.cat(column) for column in zip(*scores, strict=True))
    return {
        "disc_real": float(real.mean()),
        "disc_fake": float(fake.mean()),
        "disc_loss": float(hinge_loss(real, fake)),
    }


def _batches(vae: VAE, images: Iterable[Tensor]) -> Iterator[Tensor]:
    """Images (3, H, W) uint8 as batches for the VAE, (B, 3, H, W) in [-1, 1]."""
    device = next(vae.parameters()).device
    source = iter(images)
    while batch := list(islice(source, BATCH_SIZE)):
        yield to_floats(torch.stack(batch).to(device))
