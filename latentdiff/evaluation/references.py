"""References: the true images that drawings are judged by, with the concept and style of each.

They are an image folder, or any data set of `DataConfig`, with a column for either; all splits are
read, so that a drawing can be found near any of them.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from latentdiff.data.config import DataConfig
from latentdiff.data.dataset import CaptionedImages, open_captioned


@dataclass(frozen=True, eq=False)
class References:
    """N images of S x S pixels with what they show."""

    pixels: Tensor
    """(N, 3, S, S) uint8."""
    concepts: list[str]
    styles: list[str]
    splits: list[str]
    rows: Sequence[Mapping[str, Any]]
    """All columns of each, but for the image."""

    def __len__(self) -> int:
        return len(self.concepts)

    def image(self, i: int) -> Image.Image:
        """Return an image as RGB."""
        return as_image(self.pixels[i])

    @cached_property
    def index(self) -> dict[tuple[str, str], int]:
        """The image of each pair of a concept and a style; the first, where there are several."""
        pairs = list(zip(self.concepts, self.styles, strict=True))
        return {pairs[i]: i for i in reversed(range(len(pairs)))}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all pixels, concepts, styles and splits: the same wherever the data lies."""
        digest = hashlib.sha256(self.pixels.numpy().tobytes())
        digest.update(repr((self.concepts, self.styles, self.splits)).encode())
        return digest.hexdigest()


def read_references(
    data: Path | str, *, image_size: int, concept: str = "concept", style: str = "style"
) -> References:
    """Read all splits of a data set, each image cropped and resized to `image_size` as in training.

    `concept` and `style` name the columns that say what an image shows. Raises ValueError for data
    that cannot be read, a column that is missing, and a row without a value in it.
    """
    parts = []
    for split in DataConfig(data=str(data)).splits():
        config = DataConfig(
            data=str(data),
            split=split,
            image_size=image_size,
            caption_columns=(),
            exclude={concept: (), style: ()},  # which asks for the columns, and leaves nothing out
            upscale_limit=image_size,
        )
        index = open_captioned(config)
        others = set(index.columns) - set(index.image_columns)
        config = replace(config, exclude=dict.fromkeys(sorted(others), ()))
        parts.append((split, CaptionedImages(config)))
    rows = [row for _, part in parts for row in _texts(part)]
    for name in (concept, style):
        missing = next((row for row in rows if not isinstance(row[name], str)), None)
        if missing is not None:
            raise ValueError(
                f"data={str(data)!r}: the column {name!r} holds {missing[name]!r}; it must be a "
                "text in every row"
            )
    return References(
        pixels=torch.stack([part.image(i) for _, part in parts for i in range(len(part))]),
        concepts=[row[concept] for row in rows],
        styles=[row[style] for row in rows],
        splits=[split for split, part in parts for _ in range(len(part))],
        rows=rows,
    )


def _texts(part: CaptionedImages) -> list[dict[str, Any]]:
    """The rows without their images."""
    columns = [name for name in part.rows.column_names if name not in part.index.image_columns]
    return part.rows.select_columns(columns).to_list()


def as_image(pixels: Tensor) -> Image.Image:
    """An image (3, S, S) uint8 as RGB."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
