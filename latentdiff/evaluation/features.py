"""CLIP features of images, and distances between two sets of images.

N images, D features each: the image tower's projected state, not normalised, as in "FID with CLIP
features" (Kynkäänniemi et al. 2023, arXiv:2203.06026), which agrees better with people than
features of an Inception trained on ImageNet classes. Distances by different towers cannot be
compared.
"""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPModel

from latentdiff.data.crop_flip import crop_to
from latentdiff.data.decode import SUFFIXES, BadSample, Decoding, decode
from latentdiff.evaluation.frechet import Moments, frechet_distance
from latentdiff.evaluation.kernel import kernel_distance
from latentdiff.images import from_pil
from latentdiff.models.clip_start import Pixels, load_clip

GRID = "grid.png"  # which `latentdiff generate` writes beside its images


class Features:
    """A CLIP's image tower: features (N, D) of images of any size."""

    def __init__(self, clip: CLIPModel, pixels: Pixels, *, batch_size: int = 64) -> None:
        self.clip: Any = clip.requires_grad_(False).eval()  # whose methods' types say nothing
        self.pixels = pixels
        self.batch_size = batch_size

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Self:
        """Read a folder of transformers' CLIPModel, or `model/` of a train_clip.py run.

        Raises ValueError as `load_clip` does.
        """
        folder = Path(folder)
        inner = folder / "clip"
        towers = load_clip(inner if (inner / "config.json").is_file() else folder)
        return cls(towers.model, towers.pixels)

    @property
    def width(self) -> int:
        """D."""
        return self.clip.config.projection_dim

    @torch.no_grad()
    def __call__(self, images: Iterable[Image.Image]) -> Tensor:
        """Features (N, D) of RGB images, on the CPU; the images are iterated batch by batch.

        The largest square in the middle of each is resized to the tower's size, as in training.
        """
        side = self.clip.config.vision_config.image_size
        features = [torch.empty(0, self.width)]
        remaining = iter(images)
        while batch := list(islice(remaining, self.batch_size)):
            squares = [crop_to(image, (side, side)) for image in batch]
            pixels = torch.stack([from_pil(square, (side, side)) for square in squares])
            values = self.pixels(pixels.to(self.clip.device))
            features.append(self.clip.get_image_features(pixel_values=values).pooler_output.cpu())
        return torch.cat(features)


@dataclass(frozen=True)
class Comparison:
    """Distances of a set of drawn images from a set of true ones."""

    frechet: float
    """As FID: 0 for equal Gaussians; biased upwards for few images."""
    kernel: float
    """As KID: unbiased, so its mean is 0 for equal distributions, however few the images are."""
    num_drawn: int
    num_true: int


def compare(drawn: Tensor, true: Tensor) -> Comparison:
    """Both distances between features (N, D) and (M, D).

    Warns when N or M is not above D. Raises ValueError for a set of one image.
    """
    least, width = min(len(drawn), len(true)), drawn.shape[1]
    if 1 < least <= width:
        warnings.warn(
            f"{least} images are too few for the Fréchet distance of {width} features: their "
            f"covariance has {width - least + 1} directions in which it is 0, and the distance is "
            "mostly that; read the kernel distance",
            stacklevel=2,
        )
    moments = []
    for features in (drawn, true):
        moments.append(Moments())
        moments[-1].add(features)
    (a, b) = moments
    return Comparison(
        frechet=frechet_distance(a.mean, a.covariance, b.mean, b.covariance),
        kernel=kernel_distance(drawn, true),
        num_drawn=len(drawn),
        num_true=len(true),
    )


def images_of(folder: Path) -> Iterator[Image.Image]:
    """Iterate over the images in a folder and its subfolders, RGB, sorted by path.

    `grid.png` is skipped. Raises ValueError when there are no images and, during the iteration,
    for one that cannot be decoded.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of images")
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.name != GRID and path.is_file()
    )
    if not paths:
        raise ValueError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))})")
    return map(_read, paths)


def _read(path: Path) -> Image.Image:
    try:
        return decode(path.read_bytes(), Decoding()).image
    except BadSample as error:
        raise ValueError(f"{path}: {error}") from error
