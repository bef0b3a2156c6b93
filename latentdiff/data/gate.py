"""Whether the latents of a VAE are fit to train on: what is measured of them, and faults in words.

Measured are the latents that a denoiser would see, on some images of its own data, and what the
training of the VAE noted of its discriminator. docs/vae.md has the reasons for each limit.
Shapes: N images, C latent channels, h x w the latents' size.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from latentdiff.data.buckets import check_scale
from latentdiff.data.cache_writer import Chunked
from latentdiff.data.decode import BadSample
from latentdiff.data.images import Sample
from latentdiff.data.views import Views
from latentdiff.formats.weights import load_json
from latentdiff.images import to_floats
from latentdiff.models.vae import VAE

ACTIVE = 0.01
"""Least share of a channel's variance that depends on the image (Burda et al. 2016,
arXiv:1509.00519, where the unit is a variance of 1)."""
DEVIATIONS = (0.25, 4.0)
"""Of all latents from 0: a factor of 4 in signal against noise, beyond which schedules are made
anew (Esser et al. 2024, arXiv:2403.03206, shift theirs by 3 for 16 times as many pixels)."""
FAR = 10.0  # deviations from a channel's mean, where a Gaussian has one value in 10^23
FAR_SHARE = 0.1
"""Most of a channel's variance that may lie further out; a Student's t of three degrees of freedom,
whose kurtosis is infinite, has 0.13 there."""
HINGE = 0.1
"""Least mean of a discriminator's hinge loss, which is 1 when it cannot tell and 0 when all scores
are beyond the margins, so that nothing is left to learn from (Lim & Ye 2017, eq. 9, halved)."""
SAMPLE, TOGETHER = 256, 16  # images that are measured, and how many of them are neighbours
TRAINING = "training.json"  # beside a VAE, of train_vae.py


@dataclass(frozen=True)
class LatentStatistics:
    """What was measured on the latents of some images, around each channel's mean: (C,) each."""

    active: Tensor
    """Variance of the posterior's mean over the images, at each place, and then its mean."""
    variance: Tensor
    """That of latents as they are drawn: of the mean over images and places, plus the noise's."""
    mean: Tensor
    far: Tensor
    """Share of the means' variance in values more than FAR deviations away."""
    largest: Tensor
    """The largest size of a mean."""

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


def faults(
    latents: LatentStatistics, training: Mapping[str, Any], *, learned: bool = True
) -> list[str]:
    """What is wrong with a VAE, a sentence each; none if its latents are fit to train on.

    `training` is what its training noted (TRAINING), such as the discriminator's last `disc_loss`
    and, if it is known, its mean scores, `disc_real` and `disc_fake`; nothing for a VAE from
    elsewhere. `learned` is whether its encoder is, so that other training would mend the latents.
    """
    found = list[str]()
    if not all(x.isfinite().all() for x in (latents.active, latents.variance)):
        return ["some latents are not finite"]
    shares = (latents.active / latents.variance).tolist()
    if dead := [c for c, share in enumerate(shares) if share < ACTIVE]:
        found.append(
            "posterior collapse: too small a share of the variance depends on the image in "
            f"{_channels(dead, shares)}, where {ACTIVE} is the least of a channel that is used; "
            + (
                "train it with a lower kl_weight or fewer latent_channels"
                if learned
                else "it is the images that hardly differ there"
            )
        )
    deviation = float((latents.variance + latents.mean.square()).mean().sqrt())
    least, most = DEVIATIONS
    if not least <= deviation <= most:
        word = "unbounded" if deviation > most else "vanishing"
        found.append(
            f"{word} latents: their deviation from 0 is {deviation:.3g}, where noise has 1 and "
            f"{least} to {most} is allowed; the scaling_factor, or what is folded in, is not that "
            "of this data"
        )
    far = latents.far.tolist()
    if wild := [c for c, share in enumerate(far) if share > FAR_SHARE]:
        found.append(
            f"unbounded latents: too large a share of the variance lies more than {FAR:g} "
            f"deviations from the mean in {_channels(wild, far)}, where {FAR_SHARE} is allowed, "
            f"and the largest value is {float(latents.largest[wild].max()):.3g}; "
            + (
                "train it with a higher kl_weight"
                if learned
                else "it is the images in which a few places stand out"
            )
        )
    loss = training.get("disc_loss", 1.0)
    if not loss >= HINGE:  # one that is not a number either
        scores = ""
        if training.keys() >= {"disc_real", "disc_fake"}:
            scores = (
                f", with mean scores of {training['disc_real']:.2g} for images and "
                f"{training['disc_fake']:.2g} for what the decoder makes of them"
            )
        found.append(
            f"saturated discriminator: its loss ended at {loss:.2g}, where {HINGE} is the least of "
            f"one that still learns{scores}; train it with a later disc_start or a lower "
            "disc_weight"
        )
    return found


def check_latents(
    vae: VAE, dataset: Chunked, folder: Path, *, batch_size: int, refuse: bool
) -> None:
    """Look at what the VAE in `folder` makes of up to 256 of the images, before all are encoded.

    Raises ValueError, in words, when something is wrong; warns instead unless told to `refuse`.
    """
    found = list[str]()
    images = list(some_images(dataset))
    if len(images) > 1:
        latents = LatentStatistics.of(vae, images, batch_size=batch_size)
        noted = folder / TRAINING
        training = load_json(noted) if noted.is_file() else {}
        found = faults(latents, training, learned=vae.config.encoder == "kl")
    if found:
        sentence = f"the VAE in {folder} is not fit to train on: {'; '.join(found)}"
        if refuse:
            raise ValueError(f"{sentence}; --check_latents false goes on all the same")
        warnings.warn(sentence, stacklevel=2)


def some_images(dataset: Chunked) -> Iterator[Tensor]:
    """Up to 256 good images as squares (3, S, S) uint8: from all over a set, a stream's first."""
    size = next(size for size in dataset.config.buckets() if size[0] == size[1])
    parts = SAMPLE // TOGETHER
    number = -(-len(dataset) // TOGETHER) if isinstance(dataset, Sized) else parts
    chosen = {i * number // parts for i in range(parts)}
    chunks = dataset.chunks(TOGETHER, lambda number: number in chosen)
    for _, samples in islice(chunks, len(chosen)):
        for sample in samples:
            if isinstance(sample, Sample) and _is_large(sample, size, dataset.config.upscale_limit):
                yield Views().of(sample.image, sample.name, size)[0]


def _is_large(sample: Sample, size: tuple[int, int], limit: float) -> bool:
    try:
        check_scale(sample.image.size, size, limit)
    except BadSample:
        return False
    return True


def _channels(numbers: Sequence[int], shares: Sequence[float]) -> str:
    """Such as "channel 2 (0.0003)"."""
    return ", ".join(f"channel {number} ({shares[number]:.2g})" for number in numbers)
