"""Captioned pictures from a folder or a hub data set, as uint8 tensors of one size.

A folder is a `datasets` image folder: pictures beside a `metadata.jsonl` whose rows have
`file_name` and the caption columns, with or without `train/` and `test/` folders.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets.exceptions import DatasetsError
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from latentdiff.data.shapes import build_shapes
from latentdiff.pictures import to_rgb

SHAPES_FOLDER = Path("runs/shapes/data")  # where `data: shapes` draws its pictures, once
MEMORY_LIMIT = 1 << 30  # bytes of decoded pictures that are kept, so that small sets decode once


@dataclass(frozen=True)
class DataConfig:
    """Which pictures and captions, at what size."""

    data: str = "shapes"
    """An image folder, a hub data set, or "shapes": a small set that is drawn on the spot."""
    split: str = "train"
    image_size: int = 64
    """Side in pixels: the shorter side is scaled to it and the middle cut out."""
    image_column: str = "image"
    caption_columns: Sequence[str] = ("text",)
    """Columns with a caption, or with a list of them; one is drawn at random each time."""
    caption_templates: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Column: forms such as "a {}", each of which makes one caption of each of the column's."""
    exclude: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Column: values; rows that have one of the values are left out."""
    num_workers: int = 0
    """Processes that read pictures ahead."""

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size={self.image_size} must be at least 1")
        if self.num_workers < 0:
            raise ValueError(f"num_workers={self.num_workers} must not be negative")
        for name, forms in self.caption_templates.items():
            if name not in self.caption_columns:
                raise ValueError(
                    f"caption_templates: {name!r} must be one of "
                    f"caption_columns={list(self.caption_columns)}"
                )
            if not forms or any("{}" not in form for form in forms):
                raise ValueError(
                    f"caption_templates: {name!r} must have forms with {{}}, not {list(forms)}"
                )


class CaptionedImages(Dataset[dict[str, Any]]):
    """Examples `{"image": (3, S, S) uint8, "captions": [str, …]}`."""

    def __init__(self, config: DataConfig) -> None:
        """Open the data set.

        Raises ValueError when there is no such folder or split, when metadata names pictures that
        are missing, or when a column is.
        """
        self.config = config
        self.rows = _load(config)
        wanted = (config.image_column, *config.caption_columns, *config.exclude)
        for name in wanted:
            if name not in self.rows.column_names:
                raise ValueError(
                    f"data={config.data!r} has no column {name!r}, only {self.rows.column_names}"
                )
        if not isinstance(self.rows.features[config.image_column], datasets.Image):
            raise ValueError(
                f"data={config.data!r}: the column {config.image_column!r} holds no pictures but "
                f"{self.rows.features[config.image_column]}"
            )
        for name, values in config.exclude.items():
            column = self.rows[name]
            kept = [i for i, value in enumerate(column) if value not in values]
            self.rows = self.rows.select(kept)
        if not len(self.rows):
            raise ValueError(f"data={config.data!r}: no picture is left in split {config.split!r}")
        columns = [self.rows[name] for name in config.caption_columns]
        forms = [config.caption_templates.get(name, ("{}",)) for name in config.caption_columns]
        self.captions = [_captions(values, forms) for values in zip(*columns, strict=True)]
        empty = [i for i, texts in enumerate(self.captions) if not texts]
        if empty:
            raise ValueError(
                f"data={config.data!r}: {len(empty)} pictures have no caption in "
                f"{list(config.caption_columns)}, the first is row {empty[0]}"
            )
        size = len(self.rows) * 3 * config.image_size**2
        self._images: dict[int, Tensor] | None = {} if size <= MEMORY_LIMIT else None

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> Tensor:
        """The picture as (3, S, S) uint8. Raises ValueError when its file is damaged."""
        if self._images is not None and index in self._images:
            return self._images[index]
        try:
            picture = self.rows[index][self.config.image_column]
        except OSError as error:
            raise ValueError(
                f"data={self.config.data!r}: the picture of row {index} cannot be read: {error}"
            ) from error
        pixels = torch.from_numpy(np.array(square(picture, self.config.image_size)))
        pixels = pixels.permute(2, 0, 1).contiguous()
        if self._images is not None:
            self._images[index] = pixels
        return pixels

    def __getitem__(self, index: int) -> dict[str, Any]:
        captions = self.captions[index] if self.captions else []  # a VAE's data has none
        return {"image": self.image(index), "captions": captions}


def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Examples -> `{"images": (B, 3, S, S) uint8, "captions": [[str, …], …]}`."""
    return {
        "images": torch.stack([example["image"] for example in examples]),
        "captions": [example["captions"] for example in examples],
    }


def square(picture: Image.Image, size: int) -> Image.Image:
    """Upright, on white where transparent, shorter side scaled to `size`, the middle cut out."""
    return ImageOps.fit(to_rgb(picture), (size, size), Image.Resampling.LANCZOS)


def _load(config: DataConfig) -> datasets.Dataset:
    folder = Path(config.data)
    datasets.disable_progress_bars()
    if config.data == "shapes":
        folder = SHAPES_FOLDER
        if not folder.exists():
            build_shapes(folder, count=2000, seed=0, size=64)
    try:
        if folder.is_dir():
            _check_folder(folder, captions=bool(config.caption_columns))
            loaded = datasets.load_dataset("imagefolder", data_dir=str(folder))
        else:
            loaded = datasets.load_dataset(config.data)
    except (ValueError, OSError, DatasetsError) as error:
        what = "as an image folder" if folder.is_dir() else "as a folder or from the hub"
        reason = " ".join(str(error).split())
        raise ValueError(f"data={config.data!r} cannot be read {what}: {reason}") from error
    assert isinstance(loaded, datasets.DatasetDict)
    if config.split not in loaded:
        raise ValueError(
            f"data={config.data!r} has no split {config.split!r}, only {sorted(map(str, loaded))}"
        )
    return loaded[config.split]


def _check_folder(folder: Path, *, captions: bool) -> None:
    """Refuse a folder without captions, and captions without pictures, before `datasets` does."""
    metadata = sorted(folder.rglob("metadata.jsonl"))
    if captions and not metadata:
        raise ValueError(
            "it has no metadata.jsonl; write one beside the pictures with rows such as "
            '{"file_name": "1.png", "text": "a cat"}'
        )
    for path in metadata:
        names = []
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    names.append(str(json.loads(line)["file_name"]))
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{path}, line {number}: expected a JSON object with file_name, "
                        f"got {line.strip()!r}"
                    ) from error
        missing = [name for name in names if not (path.parent / name).is_file()]
        if missing or not names:
            raise ValueError(
                f"{path} has captions without pictures: {len(missing)} of {len(names)}, "
                f"the first is {missing[0]!r}"
                if missing
                else f"{path} has no rows"
            )


def _captions(
    values: Sequence[str | list[str] | None], forms: Sequence[Sequence[str]]
) -> list[str]:
    """All captions of a row, from text columns and columns with lists of texts, in all forms."""
    found: list[str] = []
    for value, templates in zip(values, forms, strict=True):
        texts = value if isinstance(value, list) else [value] if value else []
        found += [template.replace("{}", text) for text in texts for template in templates]
    return found
