"""The losses of a VAE: negative ELBO with a learned output scale, and adversarial loss."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.models.vae import Posterior
from latentdiff.options import option

Reconstruction = Literal["l1", "l2"]


@dataclass(frozen=True)
class VAELossConfig:
    """Terms and weights of the loss."""

    reconstruction: Reconstruction = "l1"
    kl_weight: float = option(1e-3, needs="vae.encoder=kl")
    """Weight of the KL, in nats per pixel value; `vae.encoder: downsample` has no KL."""
    learn_logvar: bool = False
    """Learn the scale of the output distribution p(x | z), Gaussian for l2 and Laplace for l1, so
    that the reconstruction counts in nats. With a kl_weight of 1 the loss is the negative ELBO."""
    perceptual_weight: float = 0.0
    """Weight of LPIPS (LDM: 1), whose network is in perceptual_weights."""
    perceptual_weights: Path | None = option(None, needs="perceptual_weight")
    """Safetensors file with torchvision's VGG16, as in LDM, or AlexNet."""
    disc_weight: float = 0.0
    """Weight of a PatchGAN's adversarial loss (LDM: 0.5): how long its gradient is at the decoder's
    last layer, relative to that of the other terms."""
    disc_start: int = option(0, needs="disc_weight")
    """Steps before the adversarial loss begins: an untrained decoder could only lose."""
    equivariance_probability: float = 0.0
    """Of a step in which the latents are scaled down and turned, and the images that the decoder
    is to give likewise (Kouzelis et al. 2025, EQ-VAE: 0.5)."""

    def __post_init__(self) -> None:
        for name in ("perceptual_weight", "disc_weight", "disc_start"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.equivariance_probability <= 1:
            raise ValueError(
                f"equivariance_probability={self.equivariance_probability} must be in [0, 1]"
            )
        if self.perceptual_weight > 0 and self.perceptual_weights is None:
            raise ValueError(
                f"perceptual_weight={self.perceptual_weight} needs perceptual_weights, a "
                "safetensors file of torchvision's VGG16 or AlexNet"
            )


def vae_loss(
    reconstruction: Tensor,
    images: Tensor,
    posterior: Posterior,
    *,
    norm: Reconstruction,
    kl_weight: float,
    logvar: Tensor | None = None,
    num_encoded: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The negative ELBO of a VAE up to scale (Kingma & Welling 2014, eq. 7): loss, distance, KL.

    Distance and KL are means over the batch and per pixel value (3·H·W of them), in nats for the
    KL, so that `kl_weight` means the same at every image size. All three are scalars.
    With `logvar` () the distance counts by its `pixel_nats`, and at a kl_weight of 1 the loss is
    the negative ELBO itself, in nats per pixel value. `num_encoded` is the number of pixel values
    of an image that was encoded, where `images` have another size.
    """
    # In float32: under autocast both are bfloat16, which is too coarse for sums of thousands.
    difference = reconstruction.float() - images
    posterior = Posterior(posterior.mean.float(), posterior.logvar.float())
    distance = difference.abs().mean() if norm == "l1" else difference.square().mean()
    kl = posterior.kl().mean() / (images[0].numel() if num_encoded is None else num_encoded)
    error = distance if logvar is None else pixel_nats(distance, logvar, norm=norm)
    return error + kl_weight * kl, distance, kl


def pixel_nats(distance: Tensor, logvar: Tensor, *, norm: Reconstruction) -> Tensor:
    """-log p(x | z) in nats per pixel value, (), from the mean distance () of images in [-1, 1].

    Each pixel value has a distribution around the reconstruction, of one scale s for all:
    - l2: a Gaussian of variance s = exp(logvar): (d / s + logvar + log 2π) / 2 nats for the mean
      squared error d;
    - l1: a Laplace distribution of scale s = exp(logvar): d / s + logvar + log 2 nats for the mean
      absolute error d.

    Both are least at exp(logvar) = d. LDM's and VQGAN's loss is that of l1 without log 2.
    """
    nats = distance / logvar.exp() + logvar
    return nats + math.log(2) if norm == "l1" else 0.5 * (nats + math.log(2 * math.pi))


class OutputScale(nn.Module):
    """Learns the `logvar` of `pixel_nats`: distance () -> nats ().

    It begins at 0, as in LDM, which is far too wide: a good one is about -3 (l1) or -5 (l2). Hence
    its own learning rate, since a step of AdamW is about as long as that.
    """

    LEARNING_RATE = 0.02

    def __init__(self, norm: Reconstruction) -> None:
        super().__init__()
        self.norm: Reconstruction = norm
        self.logvar = nn.Parameter(torch.zeros(()))

    def forward(self, distance: Tensor) -> Tensor:
        """() -> ()."""
        return pixel_nats(distance, self.logvar, norm=self.norm)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss () from its scores of any shapes (Lim & Ye 2017, eq. 9, halved)."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adversarial_weight(
    loss: Tensor, adversarial: Tensor, last_layer: Tensor, *, mean: Callable[[Tensor], Tensor]
) -> Tensor:
    """The adaptive weight () that gives the adversarial loss as large a gradient as `loss` has.

    VQGAN (Esser et al. 2021, arXiv:2012.09841), eq. 7: the ratio of both gradients' norms with
    regard to the decoder's last weights, 10,000 at most. Both losses keep their graphs. `mean`
    averages over processes, so that they all have the same weight.
    """
    loss_norm, adversarial_norm = (
        mean(torch.autograd.grad(one, last_layer, retain_graph=True)[0]).norm()
        for one in (loss, adversarial)
    )
    return (loss_norm / (adversarial_norm + 1e-4)).clamp(max=1e4).detach()
