"""Losses of the three modules, apart from the diffusion loss, which is `Diffusion.loss`."""

from typing import Literal

from torch import Tensor

from latentdiff.models.vae import Posterior

Reconstruction = Literal["l1", "l2"]


def vae_loss(
    reconstruction: Tensor,
    images: Tensor,
    posterior: Posterior,
    *,
    norm: Reconstruction,
    kl_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The negative ELBO of a VAE up to scale (Kingma & Welling 2014, eq. 7): loss, distance, KL.

    Distance and KL are means over the batch and per pixel value (3·H·W of them), in nats for the
    KL, so that `kl_weight` means the same at every picture size. All three are scalars.
    """
    # Under autocast both come in bfloat16, whose three digits a sum of thousands needs.
    difference = reconstruction.float() - images
    posterior = Posterior(posterior.mean.float(), posterior.logvar.float())
    distance = difference.abs().mean() if norm == "l1" else difference.square().mean()
    kl = posterior.kl().mean() / images[0].numel()
    return distance + kl_weight * kl, distance, kl
