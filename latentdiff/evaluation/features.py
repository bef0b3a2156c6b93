"""Images as vectors of a CLIP's image tower, and how far two sets of images are apart.

N images, D numbers each: the tower's projected state, not scaled to length 1, as in "FID with
CLIP features" (Kynkäänniemi et al. 2023, arXiv:2203.06026), which agrees better with people than
Inception's features of ImageNet classes. Distances are of one tower: those of two say nothing of
each other.
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
    """An image tower that makes vectors (N, D) of images of any size."""

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
        """Vectors (N, D) of RGB images, on the CPU; read as they are needed.

        Of each the largest square in the middle is scaled to the tower's size, as in training.
        """
        side = self.clip.config.vision_config.image_size
        found = [torch.empty(0, self.width)]
        rest = iter(images)
        while part := list(islice(rest, self.batch_size)):
            squares = [crop_to(image, (side, side)) for image in part]
            batch = torch.stack([from_pil(square, (side, side)) for square in squares])
            values = self.pixels(batch.to(self.clip.device))
            found.append(self.clip.get_image_features(pixel_values=values).pooler_output.cpu())
        return torch.cat(found)


@dataclass(frozen=True)
class Comparison:
    """How far a set of drawn images is from a set of true ones."""

    frechet: float
    """As FID: 0 for the same Gaussian; too large by a bias for few images."""
    kernel: float
    """As KID: on average 0 for the same distribution, however few the images are."""
    num_drawn: int
    num_true: int


def compare(drawn: Tensor, true: Tensor) -> Comparison:
    """Both distances of vectors (N, D) and (M, D).

    Warns when there are not more vectors than numbers in each. Raises ValueError for a set of one.
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
    """The images in a folder and the folders in it, RGB, in the order of their names.

    `grid.png` is passed over. Raises ValueError when there are none, and, when its turn comes, for
    one that cannot be decoded.
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
