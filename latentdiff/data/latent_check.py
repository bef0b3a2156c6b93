"""The latent statistics check: whether a VAE's latents are fit to train a denoiser on.

It measures the scaled latents of some of the denoiser's training images, and reads the last losses
of the VAE's discriminator. docs/vae.md has the reason for each limit.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

from torch import Tensor

from latentdiff.data.buckets import check_scale
from latentdiff.data.crop_flip import CropFlip
from latentdiff.data.decode import BadSample
from latentdiff.data.latent_statistics import FAR, LatentStatistics
from latentdiff.data.opening import ImageDataset
from latentdiff.data.reconstruction_check import (
    NUM_DECODED,
    ReconstructionLimits,
    reconstruction,
    reconstruction_faults,
)
from latentdiff.data.samples import Sample
from latentdiff.formats.weights import load_json
from latentdiff.models.vae import VAE

ACTIVE = 0.01
"""Least fraction of a channel's variance that must depend on the image, so that the channel counts
as active (Burda et al. 2016, arXiv:1509.00519, who compare with a variance of 1)."""
DEVIATIONS = (0.25, 4.0)
"""Allowed root mean square of all latents. A signal-to-noise ratio that is off by more than a
factor of 4 needs another noise schedule (Esser et al. 2024, arXiv:2403.03206, shift theirs by 3 for
16 times as many pixels)."""
FAR_FRACTION = 0.1
"""Largest fraction of a channel's variance in values more than FAR deviations from its mean; for
Student's t with three degrees of freedom, whose kurtosis is infinite, it is 0.13."""
HINGE = 0.1
"""Least mean hinge loss of a discriminator. The loss is 1 when it cannot tell images from
reconstructions, and 0 when all scores are beyond the margins and give no gradient (Lim & Ye 2017,
eq. 9, halved)."""
NUM_IMAGES, GROUP = 256, 16  # images that are measured, in groups of consecutive ones
TRAINING = "training.json"  # train_vae.py writes it beside the VAE


def faults(
    latents: LatentStatistics, training: Mapping[str, Any], *, learned: bool = True
) -> list[str]:
    """List what is wrong with a VAE, one sentence each; the list is empty for usable latents.

    `training` is the content of TRAINING: the discriminator's last `disc_loss` and, if they are
    known, its mean scores `disc_real` and `disc_fake`; it is empty for a VAE from elsewhere.
    `learned` tells whether the encoder is learned, so that the sentences can advise on training.
    """
    found = list[str]()
    if not all(x.isfinite().all() for x in (latents.active, latents.variance)):
        return ["some latents are not finite"]
    active = (latents.active / latents.variance).tolist()
    if dead := [c for c, fraction in enumerate(active) if fraction < ACTIVE]:
        found.append(
            "posterior collapse: too small a fraction of the variance depends on the image in "
            f"{_channels(dead, active)}, where {ACTIVE} is the least of a channel that is used; "
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
    if wild := [c for c, fraction in enumerate(far) if fraction > FAR_FRACTION]:
        found.append(
            f"unbounded latents: too large a fraction of the variance lies more than {FAR:g} "
            f"deviations from the mean in {_channels(wild, far)}, where {FAR_FRACTION} is allowed, "
            f"and the largest value is {float(latents.largest[wild].max()):.3g}; "
            + (
                "train it with a higher kl_weight"
                if learned
                else "it is the images in which a few positions stand out"
            )
        )
    loss = training.get("disc_loss", 1.0)
    if not loss >= HINGE:  # also true of NaN
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
    vae: VAE,
    dataset: ImageDataset,
    folder: Path,
    *,
    batch_size: int,
    refuse: bool,
    limits: ReconstructionLimits | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Check the latents of up to NUM_IMAGES images before all are encoded by the VAE in `folder`,
    and a quarter of these as the VAE gives them back, which is said.

    Raises ValueError with all the faults that are found; without `refuse` it warns of those of the
    latents instead, and `limits` are none.
    """
    found = list[str]()
    images = list(some_images(dataset))
    if len(images) > 1:
        latents = LatentStatistics.of(vae, images, batch_size=batch_size)
        noted = folder / TRAINING
        training = load_json(noted) if noted.is_file() else {}
        found = faults(latents, training, learned=vae.config.encoder == "kl")
        given_back = reconstruction(
            vae, images[:: -(-len(images) // NUM_DECODED)], batch_size=batch_size
        )
        say(str(given_back))
        if refuse:
            limits = ReconstructionLimits() if limits is None else limits
            found += reconstruction_faults(given_back, limits)
    if found:
        sentence = f"the VAE in {folder} is not fit to train on: {'; '.join(found)}"
        if refuse:
            raise ValueError(f"{sentence}; --check_latents false goes on all the same")
        warnings.warn(sentence, stacklevel=2)


def some_images(dataset: ImageDataset) -> Iterator[Tensor]:
    """Yield up to NUM_IMAGES good images as square crops, (3, S, S) uint8.

    They come from groups that are evenly spaced over the data, or from the beginning of a stream.
    """
    size = next(size for size in dataset.config.buckets() if size[0] == size[1])
    total, groups = dataset.num_samples, NUM_IMAGES // GROUP
    num_chunks = groups if total is None else -(-total // GROUP)
    chosen = {i * num_chunks // groups for i in range(groups)}
    chunks = dataset.chunks(GROUP, lambda number: number in chosen)
    for sample in chain.from_iterable(samples for _, samples in islice(chunks, len(chosen))):
        if isinstance(sample, Sample):
            with suppress(BadSample):  # too small an image
                check_scale(sample.image.size, size, dataset.config.upscale_limit)
                yield CropFlip().views(sample.image, sample.name, size)[0]


def _channels(numbers: Sequence[int], fractions: Sequence[float]) -> str:
    """Format channels with their fractions: "channel 2 (0.0003)"."""
    return ", ".join(f"channel {number} ({fractions[number]:.2g})" for number in numbers)
