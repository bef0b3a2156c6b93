"""Captioned pictures as uint8 tensors of one size, without what is bad."""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from latentdiff.data.captions import Captions
from latentdiff.data.decode import BadSample, Decoding, decode
from latentdiff.data.shapes import build_shapes
from latentdiff.data.sources import Source, open_source, splits
from latentdiff.pictures import to_rgb

SHAPES_FOLDER = Path("runs/shapes/data")  # where `data: shapes` draws its pictures, once
MEMORY_LIMIT = 1 << 30  # bytes of decoded pictures that are kept, so that small sets decode once
BAD_SAMPLES = "bad_samples.jsonl"  # what `latentdiff data check` writes

DUPLICATE = "duplicate name"  # the reason of a row whose picture an earlier row has


@dataclass(frozen=True)
class DataConfig:
    """Which pictures and captions, at what size, and what is bad."""

    data: str = "shapes"
    """A folder of pictures, .tar or .parquet files, a hub data set, or "shapes": a small set that
    is drawn on the spot."""
    split: str = "train"
    image_size: int = 64
    """Side in pixels: the shorter side is scaled to it and the middle cut out."""
    image_column: str = "image"
    caption_columns: Sequence[str] = ("text",)
    """Columns with a caption, or with a list of them; one is drawn at random each time."""
    caption_templates: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Column: forms such as "a {}", each of which makes one caption of each of the column's."""
    caption_weights: Mapping[str, str] = field(default_factory=dict)
    """Column: the column with a number, or a list of them, for how often its captions are drawn."""
    allow_empty_caption: bool = False
    """Train on pictures without a caption as on pictures with an empty one."""
    exclude: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Column: values; rows that have one of the values are left out."""
    upscale_limit: float = 1.0
    """Pictures that would have to be enlarged by more than this are bad."""
    max_megapixels: float = 64
    """Larger pictures are bad, which their headers tell."""
    first_frame: bool = False
    """Take the first frame of an animation, which is bad otherwise."""
    background: str = "white"
    """The colour behind transparent pictures, such as "white" or "#808080"."""
    bad_samples: Path | None = None
    """What `latentdiff data check` found, to be left out; bad_samples.jsonl in `data` if None."""
    max_bad: float = 0.01
    """The share of bad samples above which the data is refused."""
    num_workers: int = 0
    """Processes that read pictures ahead."""

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size={self.image_size} must be at least 1")
        if self.num_workers < 0:
            raise ValueError(f"num_workers={self.num_workers} must not be negative")
        if self.upscale_limit < 1:
            raise ValueError(f"upscale_limit={self.upscale_limit} must be at least 1")
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"max_bad={self.max_bad} must be in [0, 1]")
        self.decoding()
        for option in ("caption_templates", "caption_weights"):
            for name in getattr(self, option):
                if name not in self.caption_columns:
                    raise ValueError(
                        f"{option}: {name!r} must be one of "
                        f"caption_columns={list(self.caption_columns)}"
                    )
        for name, forms in self.caption_templates.items():
            if not forms or any("{}" not in form for form in forms):
                raise ValueError(
                    f"caption_templates: {name!r} must have forms with {{}}, not {list(forms)}"
                )

    def place(self) -> str:
        """The folder, file or hub data set that `data` is; "shapes" are drawn if they are not."""
        if self.data != "shapes":
            return self.data
        if not SHAPES_FOLDER.exists():
            build_shapes(SHAPES_FOLDER, count=2000, seed=0, size=64)
        return str(SHAPES_FOLDER)

    def splits(self) -> list[str]:
        """The names of the parts of the data. Raises ValueError when it cannot be read."""
        return splits(self.place())

    def decoding(self) -> Decoding:
        """How files become pictures. Raises ValueError when that is impossible."""
        return Decoding(
            background=self.background,
            max_megapixels=self.max_megapixels,
            first_frame=self.first_frame,
        )


class CaptionedImages(Dataset[dict[str, Any]]):
    """Examples `{"image": (3, S, S) uint8, "captions": [str, …]}`.

    What is known to be bad when the set is opened is left out and counted in `left_out`; what turns
    out to be bad later is replaced by the next good sample, and noted in `replaced`.
    """

    def __init__(self, config: DataConfig) -> None:
        """Open the data set.

        Raises ValueError when there is no such data, split or column, when its metadata is broken,
        when nothing is left, or when more than `max_bad` is bad.
        """
        self.config = config
        self.source = open_data(config)
        self.decoding = config.decoding()
        captions = captions_of(self.source, config)
        faults = dict(self.source.faults)
        for index in np.flatnonzero(missing_captions(captions, config)).tolist():
            faults.setdefault(index, BadSample("no caption"))
        faults |= _known(self.source, config)
        kept = _wanted(self.source, config)
        self.left_out = Counter(faults[i].reason for i in sorted(faults) if kept[i])
        total = int(kept.sum())
        kept[list(faults)] = False
        if sum(self.left_out.values()) > config.max_bad * total:
            first = min(faults)
            raise ValueError(
                f"data={config.data!r}: {sum(self.left_out.values())} of {total} samples are bad, "
                f"more than max_bad={config.max_bad}: {breakdown(self.left_out)}; the first is "
                f"{self.source.name(first)!r} ({faults[first]})"
            )
        if not kept.any():
            raise ValueError(f"data={config.data!r}: no picture is left in split {config.split!r}")
        self._kept = None if kept.all() else np.flatnonzero(kept)
        self.rows = self.source.rows if self._kept is None else self.source.rows.select(self._kept)
        self.rows = self.rows.with_format(None)
        self.rows._fingerprint = self._fingerprint()
        self.captions = captions_of(self.source, config, self.rows)
        self.replaced: dict[int, BadSample] = {}
        size = len(self.rows) * 3 * config.image_size**2
        self._images: dict[int, Tensor] | None = {} if size <= MEMORY_LIMIT else None

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> Tensor:
        """The picture as (3, S, S) uint8. Raises ValueError when it is bad."""
        if self._images is not None and index in self._images:
            return self._images[index]
        number = index if self._kept is None else int(self._kept[index])
        try:
            data = self.source.read(number, self.config.image_column)
            picture = decode(data, self.decoding).image
            check_size(picture.size, self.config)
        except BadSample as error:
            raise BadSample(
                error.reason,
                f"data={self.config.data!r}: the picture of row {index}, "
                f"{self.source.name(number)!r}, cannot be used: {error.detail}; "
                "`latentdiff data check` finds all such pictures",
            ) from error
        pixels = torch.from_numpy(np.array(square(picture, self.config.image_size)))
        pixels = pixels.permute(2, 0, 1).contiguous()
        if self._images is not None:
            self._images[index] = pixels
        return pixels

    def __getitem__(self, index: int) -> dict[str, Any]:
        for other in range(index, index + len(self)):
            other %= len(self)
            if other in self.replaced:
                continue
            try:
                return self._example(other)
            except BadSample as error:
                self._replace(other, error)
        raise AssertionError("the run ends before every sample is bad")

    def _example(self, index: int) -> dict[str, Any]:
        captions = self.captions[index] if self.captions else []  # a VAE's data has none
        return {"image": self.image(index), "captions": captions}

    def _replace(self, index: int, error: BadSample) -> None:
        """Note a bad sample. Raises ValueError when there are too many."""
        self.replaced[index] = error
        if len(self.replaced) > min(self.config.max_bad * len(self), len(self) - 1):
            reasons = Counter(error.reason for error in self.replaced.values())
            raise ValueError(
                f"{len(self.replaced)} of {len(self)} samples turned out to be bad, more than "
                f"max_bad={self.config.max_bad}: {breakdown(reasons)}; the last: {error}"
            ) from error
        if len(self.replaced) == 1:
            warnings.warn(f"a sample is replaced by the next: {error}", stacklevel=3)

    def _fingerprint(self) -> str:
        """A hash of the source's, of what is left out, and of how pictures are decoded."""
        digest = hashlib.sha256(self.source.rows._fingerprint.encode())
        digest.update(repr((self.decoding, self.config.image_column)).encode())
        if self._kept is not None:
            digest.update(self._kept.tobytes())
        return digest.hexdigest()[:16]


def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Examples -> `{"images": (B, 3, S, S) uint8, "captions": [[str, …], …]}`."""
    return {
        "images": torch.stack([example["image"] for example in examples]),
        "captions": [example["captions"] for example in examples],
    }


def square(picture: Image.Image, size: int) -> Image.Image:
    """Upright, on white where transparent, shorter side scaled to `size`, the middle cut out."""
    return ImageOps.fit(to_rgb(picture), (size, size), Image.Resampling.LANCZOS)


def open_data(config: DataConfig) -> Source:
    """The source of a configuration, with all the columns that it names. Raises ValueError."""
    source = open_source(config.place(), config.split)
    named = (*config.caption_columns, *config.caption_weights.values(), *config.exclude)
    for name in (config.image_column, *named):
        if name not in source.columns:
            raise ValueError(
                f"data={config.data!r} has no column {name!r}, only {source.columns}; captions are "
                "in metadata.jsonl beside the pictures, with rows such as "
                '{"file_name": "1.png", "text": "a cat"}, or in a .txt file for each'
            )
    if config.image_column not in source.pictures:
        raise ValueError(
            f"data={config.data!r}: the column {config.image_column!r} holds no pictures but "
            f"{source.rows.features[config.image_column]}"
        )
    return source


def captions_of(source: Source, config: DataConfig, rows: Any = None) -> Captions:
    """The captions of a source, or of some of its rows. Raises ValueError for other columns."""
    try:
        return Captions(
            source.rows if rows is None else rows,
            config.caption_columns,
            templates=config.caption_templates,
            weights=config.caption_weights,
            allow_empty=config.allow_empty_caption,
        )
    except ValueError as error:
        raise ValueError(f"data={config.data!r}: {error}") from error


def missing_captions(captions: Captions, config: DataConfig) -> np.ndarray:
    """(N,) bool: the samples that are bad for want of a caption."""
    if not config.caption_columns or config.allow_empty_caption:
        return np.zeros(len(captions.rows), dtype=bool)
    return ~captions.present()


def check_size(size: tuple[int, int], config: DataConfig) -> None:
    """Raise BadSample when a picture (width, height) is too small for the configuration."""
    if min(size) * config.upscale_limit < config.image_size:
        raise BadSample(
            "too small",
            f"{size[0]} x {size[1]} for image_size={config.image_size} and "
            f"upscale_limit={config.upscale_limit}",
        )


def breakdown(reasons: Mapping[str, int]) -> str:
    """Counts by reason, the most frequent first, in words."""
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {reason}" for reason, count in ordered)


def _known(source: Source, config: DataConfig) -> dict[int, BadSample]:
    """The samples of the file of bad samples, by number. Raises ValueError when it is broken."""
    path = config.bad_samples
    if path is None:
        path = Path(config.place()) / BAD_SAMPLES
        if not path.is_file():
            return {}
    reasons = {}
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                reasons.setdefault(row["path"], row["reason"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"bad_samples={str(path)!r} cannot be read: {error}") from error
    faults: dict[int, BadSample] = {}
    seen = set[str]()
    for i, name in enumerate(source.names() if reasons else ()):
        if name in reasons:
            if name in seen or reasons[name] != DUPLICATE:  # the first of a name is good
                faults[i] = BadSample(reasons[name])
            seen.add(name)
    return faults


def _wanted(source: Source, config: DataConfig) -> np.ndarray:
    """(N,) bool: the rows without an excluded value."""
    kept = np.ones(len(source.rows), dtype=bool)
    for name, values in config.exclude.items():
        start = 0
        for chunk in source.rows.data.column(name).chunks:
            for i, value in enumerate(chunk.to_pylist(), start=start):
                kept[i] &= value not in values
            start += len(chunk)
    return kept
