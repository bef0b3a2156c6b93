"""CLIP features of images.

N images, D features each: the image tower's projected state, not normalised, as in "FID with CLIP
features" (Kynkäänniemi et al. 2023, arXiv:2203.06026), which agrees better with people than
features of an Inception trained on ImageNet classes. Distances by different towers cannot be
compared.
"""

import re
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPModel

from latentdiff.data.crop_flip import crop_to
from latentdiff.data.decode import SUFFIXES, BadSample, Decoding, decode
from latentdiff.data.forms.files import images_in
from latentdiff.images import from_pil
from latentdiff.models.clip_start import Pixels, load_clip

GRID = re.compile(r"grid(-\d+)?\.png")  # which `latentdiff generate` writes beside its images


class Features:
    """A CLIP's image tower: features (N, D) of images of any size."""

    def __init__(self, clip: CLIPModel, pixels: Pixels, *, batch_size: int = 64) -> None:
        self.clip: Any = clip.requires_grad_(False).eval()  # whose methods' types say nothing
        self.pixels = pixels
        self.batch_size = batch_size

    @classmethod
    def from_pretrained(cls, folder: Path | str, *, device: torch.device | None = None) -> Self:
        """Read a folder of transformers' CLIPModel, or `model/` of a train_clip.py run.

        Without `device` the tower is put on an accelerator, if there is one.

        Raises ValueError as `load_clip` does.
        """
        folder = Path(folder)
        inner = folder / "clip"
        towers = load_clip(inner if (inner / "config.json").is_file() else folder)
        features = cls(towers.model, towers.pixels)
        if device is None:
            device = torch.accelerator.current_accelerator(check_available=True)
        features.clip.to(device or "cpu")
        return features

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


def images_of(folder: Path) -> Iterator[Image.Image]:
    """Iterate over the images in a folder and its subfolders, RGB, sorted by path.

    Grids of `latentdiff generate` are skipped. Raises ValueError when there are no images and,
    during the iteration, for one that cannot be decoded.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder of images")
    names = (name for name in images_in(folder, folder) if not GRID.fullmatch(Path(name).name))
    paths = sorted(folder / name for name in names)
    if not paths:
        raise ValueError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))})")
    return map(_read, paths)


def _read(path: Path) -> Image.Image:
    try:
        return decode(path.read_bytes(), Decoding()).image
    except (BadSample, OSError) as error:
        raise ValueError(f"{path}: {error}") from error


def warn_of_unread(folder: Path) -> None:
    """Warn, with their number, of images in a folder whose formats are not read."""
    unread = Image.registered_extensions().keys() - SUFFIXES
    left_out = sorted(path.name for path in folder.rglob("*") if path.suffix.lower() in unread)
    if left_out:
        warnings.warn(
            f"{folder}: {len(left_out)} files such as {left_out[0]} are of formats that are not "
            "read",
            stacklevel=2,
        )
