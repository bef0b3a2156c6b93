"""Captioned images as uint8 tensors of one size, without what is bad."""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from latentdiff.data.ahead import ahead
from latentdiff.data.buckets import Size, check_scale, nearest
from latentdiff.data.captions import Captions
from latentdiff.data.config import DataConfig
from latentdiff.data.decode import BadSample, decode
from latentdiff.data.sources import Source, check_columns, open_source
from latentdiff.data.views import cut
from latentdiff.images import to_rgb

MEMORY_LIMIT = 1 << 30  # bytes of decoded images that are kept, so that small sets decode once
BAD_SAMPLES = "bad_samples.jsonl"  # what `latentdiff data check` writes

DUPLICATE = "duplicate name"  # the reason of a row whose image an earlier row has


class Sample(NamedTuple):
    """One image as it is in the data, RGB and upright, at its full size."""

    name: str
    """What it is called in messages, such as the file's name."""
    image: Image.Image
    captions: list[str]


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
            raise ValueError(f"data={config.data!r}: no image is left in split {config.split!r}")
        self._kept = None if kept.all() else np.flatnonzero(kept)
        self.rows = self.source.rows if self._kept is None else self.source.rows.select(self._kept)
        self.rows = self.rows.with_format(None)
        self.captions = captions_of(self.source, config, self.rows)
        self.replaced: dict[int, BadSample] = {}
        self.apart: frozenset[int] = frozenset()
        """Samples that never stand in for a bad one, such as held-out ones."""
        size = len(self.rows) * 3 * config.image_size**2
        self._images: dict[int, Tensor] | None = {} if size <= MEMORY_LIMIT else None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of which samples there are, and of all that their images and captions are of.

        The source's own fingerprint covers its rows with all their texts, and sizes and times of
        the files that they came from: nothing is read for it.
        """
        config = self.config
        options = {
            name: getattr(config, name)
            for name in (
                *("data", "split", "image_size", "image_column", "caption_columns"),
                *("caption_templates", "caption_weights", "allow_empty_caption", "upscale_limit"),
            )
        }
        text = json.dumps(options, sort_keys=True) + repr(self.decoding)
        digest = hashlib.sha256(text.encode())
        digest.update(self.source.rows._fingerprint.encode())
        if self._kept is not None:
            digest.update(self._kept.tobytes())
        return digest.hexdigest()

    def chunks(
        self, size: int, wanted: Callable[[int], bool]
    ) -> Iterator[tuple[int, Iterable[Sample | BadSample]]]:
        """Go through the data in order, in chunks of `size` consecutive samples.

        Yields the number of each chunk that is `wanted`, which is asked before anything of it is
        read, and its samples, which are decoded as they are taken: take them all before the next
        chunk. One that cannot be decoded, or has no captions that make sense, is its error.
        """
        for number, start in enumerate(range(0, len(self), size)):
            if wanted(number):
                ids = range(start, min(start + size, len(self)))
                yield number, ahead(self._sample, ids, threads=self.config.num_workers)

    def _sample(self, index: int) -> Sample | BadSample:
        number = self._number(index)
        name = self.source.name(number)
        try:
            image = decode(self.source.read(number, self.config.image_column), self.decoding)
            captions = self.captions[index] if self.captions else []
        except BadSample as error:
            return BadSample(error.reason, f"{name!r} {error.detail}".strip())
        return Sample(name, image.image, captions)

    def image(self, index: int) -> Tensor:
        """The image as (3, S, S) uint8. Raises ValueError when it is bad."""
        if self._images is not None and index in self._images:
            return self._images[index]
        number = self._number(index)
        try:
            data = self.source.read(number, self.config.image_column)
            pixels = square_pixels(data, self.config)
        except BadSample as error:
            raise BadSample(
                error.reason,
                f"data={self.config.data!r}: the image of row {index}, "
                f"{self.source.name(number)!r}, cannot be used: {error.detail}; "
                "`latentdiff data check` finds all such images",
            ) from error
        if self._images is not None:
            self._images[index] = pixels
        return pixels

    def __getitem__(self, index: int) -> dict[str, Any]:
        for other in range(index, index + len(self)):
            other %= len(self)
            if other in self.replaced or (other != index and other in self.apart):
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

    def _number(self, index: int) -> int:
        """The source's number of a sample."""
        return index if self._kept is None else int(self._kept[index])


def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Examples -> `{"images": (B, 3, S, S) uint8, "captions": [[str, …], …]}`."""
    return {
        "images": torch.stack([example["image"] for example in examples]),
        "captions": [example["captions"] for example in examples],
    }


def square_pixels(data: bytes, config: DataConfig) -> Tensor:
    """A file's image as a square, (3, S, S) uint8. Raises BadSample."""
    image = decode(data, config.decoding()).image
    side = config.image_size
    check_scale(image.size, (side, side), config.upscale_limit)
    pixels = torch.from_numpy(np.array(square(image, side)))
    return pixels.permute(2, 0, 1).contiguous()


def square(image: Image.Image, size: int) -> Image.Image:
    """Upright, on white where transparent, shorter side scaled to `size`, the middle cut out."""
    return cut(to_rgb(image), (size, size))


def open_data(config: DataConfig) -> Source:
    """The source of a configuration, with all the columns that it names. Raises ValueError."""
    source = open_source(config.place(), config.split)
    check_columns(config.data, named_columns(config), source.columns)
    if config.image_column not in source.images:
        raise ValueError(
            f"data={config.data!r}: the column {config.image_column!r} holds no images but "
            f"{source.rows.features[config.image_column]}"
        )
    return source


def named_columns(config: DataConfig) -> list[str]:
    """The columns that the configuration asks for."""
    named = (*config.caption_columns, *config.caption_weights.values(), *config.exclude)
    return list(dict.fromkeys((config.image_column, *named)))


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


def check_size(size: Size, config: DataConfig) -> None:
    """Raise BadSample when an image (width, height) is too small for the configuration."""
    check_scale(size, config.buckets()[nearest(size, config.buckets())], config.upscale_limit)


def breakdown(reasons: Mapping[str, int]) -> str:
    """Counts by reason, the most frequent first, in words."""
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {reason}" for reason, count in ordered)


def read_bad_samples(config: DataConfig) -> dict[str, str]:
    """Names and reasons of what `latentdiff data check` found. Raises ValueError when broken."""
    path = config.bad_samples
    if path is None:
        path = Path(config.place()) / BAD_SAMPLES
        if not path.is_file():
            return {}
    reasons: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                reasons.setdefault(row["path"], row["reason"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"bad_samples={str(path)!r} cannot be read: {error}") from error
    return reasons


def _known(source: Source, config: DataConfig) -> dict[int, BadSample]:
    """The samples of the file of bad samples, by number."""
    reasons = read_bad_samples(config)
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
