"""Losses of the three modules, apart from the diffusion loss, which is `Diffusion.loss`."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

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


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss () from its scores of any shapes (Lim & Ye 2017, eq. 9, halved)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adversarial_weight(
    loss: Tensor, adversarial: Tensor, last: Tensor, *, mean: Callable[[Tensor], Tensor]
) -> Tensor:
    """What makes the adversarial loss pull at the last layer as much as the rest does, ().

    VQGAN (Esser et al. 2021, arXiv:2012.09841), eq. 7: the ratio of both gradients' norms with
    regard to the decoder's last weights, 10,000 at most. Both losses keep their graphs. `mean` is
    that of all processes, so that they all have the same weight.
    """
    norms = [
        mean(torch.autograd.grad(one, last, retain_graph=True)[0]).norm()
        for one in (loss, adversarial)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=1e4).detach()
