"""What a VAE allows: true images as it gives them back, than which no denoiser draws better."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentdiff.evaluation.intervals import percentile_interval, resampling_weights
from latentdiff.evaluation.references import References
from latentdiff.evaluation.results import Figure
from latentdiff.images import to_floats, to_pil
from latentdiff.models.vae import VAE

EQUAL = 60.0  # dB, above that of two images with a single pixel between them: of equal ones


@torch.no_grad()
def through_vae(vae: VAE, references: References, wanted: Sequence[int]) -> Iterator[Image.Image]:
    """Yield reference images as the VAE gives them back."""
    device = next(vae.parameters()).device
    for i in wanted:
        image = to_floats(references.pixels[i : i + 1]).to(device)
        yield to_pil(vae.decode(vae.encode(image).mean)[0])


def mean_psnr(
    images: Sequence[Image.Image], references: References, wanted: Sequence[int]
) -> Figure:
    """The mean over the images of each one's PSNR to its reference, in dB.

    Its interval is that of other images, by bootstrap. Equal images have `EQUAL` dB.
    """
    pairs = zip(images, wanted, strict=True)
    values = torch.stack([_psnr(image, references.pixels[i]) for image, i in pairs])
    means = resampling_weights(len(values)) @ values / len(values)
    return Figure(float(values.mean()), *percentile_interval(means), of=len(values))


def _psnr(image: Image.Image, pixels: Tensor) -> Tensor:
    """PSNR in dB of an RGB image and of pixels (3, S, S) uint8."""
    drawn = torch.from_numpy(np.asarray(image, dtype=np.float64)).permute(2, 0, 1)
    error = (drawn - pixels).square().mean() / 255**2
    return -10 * torch.log10(error.clamp(min=10 ** (-EQUAL / 10)))
