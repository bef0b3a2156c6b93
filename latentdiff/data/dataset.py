"""CaptionedImages: a data set with random access, from which known bad samples are left out."""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import datasets
import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from latentdiff.data.bad_samples import ListedBadSamples, advice, breakdown, read_bad_samples
from latentdiff.data.batches import batches
from latentdiff.data.captions import Captions
from latentdiff.data.config import DataConfig
from latentdiff.data.decode import BadSample
from latentdiff.data.forms.detect import Index, open_index
from latentdiff.data.prefetch import prefetch
from latentdiff.data.samples import EncodedSample, Sample, collate, decoded, square_pixels

MEMORY_LIMIT = 1 << 30  # bytes; a data set whose decoded images fit is decoded only once


class CaptionedImages(Dataset[dict[str, Any]]):
    """Examples `{"image": (3, S, S) uint8, "captions": [str, …]}`.

    Samples that are known to be bad when the data set is opened are left out and counted in
    `left_out`. A sample that turns out to be bad when it is decoded is replaced by the next good
    sample, and its fault is kept in `replaced`.
    """

    def __init__(self, config: DataConfig) -> None:
        """Open the data set.

        Raises ValueError when there is no such data, split or column, when the metadata is broken,
        when no sample is left, and when the fraction of bad samples exceeds `max_bad`.
        """
        self.config = config
        self.index = open_captioned(config)
        captions = index_captions(self.index, config)
        faults = known_faults(self.index, captions, config) | _listed_faults(self.index, config)
        selected = _without_excluded(self.index.rows, config)
        self.left_out = Counter(faults[i].reason for i in sorted(faults) if selected[i])
        total = int(selected.sum())
        selected[list(faults)] = False
        if sum(self.left_out.values()) / max(1, total) > config.max_bad:
            first = min(faults)
            raise ValueError(
                f"data={config.data!r}: {sum(self.left_out.values())} of {total} samples are bad, "
                f"more than max_bad={config.max_bad}: {breakdown(self.left_out)}; the first is "
                f"{self.index.name(first)!r} ({faults[first]}); "
                f"{advice(sum(self.left_out.values()), total)}"
            )
        if not selected.any():
            raise ValueError(f"data={config.data!r}: no image is left in split {config.split!r}")
        rows = self.index.rows
        self._selected = None if selected.all() else np.flatnonzero(selected)
        self.rows = rows if self._selected is None else rows.select(self._selected)
        self.rows = self.rows.with_format(None)
        self.num_samples = len(self.rows)
        self.captions = index_captions(self.index, config, self.rows)
        self.replaced: dict[int, BadSample] = {}
        self.validation: frozenset[int] = frozenset()
        """Samples of a validation split, which never stand in for a bad one."""
        size = len(self.rows) * 3 * config.image_size**2
        self._images: dict[int, Tensor] | None = {} if size <= MEMORY_LIMIT else None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the selected samples and of everything that decides images and captions.

        No file is read: the index's own fingerprint covers the rows with all their texts, and the
        sizes and modification times of the files.
        """
        config = self.config
        options = {
            name: getattr(config, name)
            for name in (
                *("data", "split", "image_size", "image_column", "caption_columns"),
                *("caption_templates", "caption_weights", "allow_empty_caption", "upscale_limit"),
            )
        }
        text = json.dumps(config.with_prompts(options), sort_keys=True) + repr(config.decoding())
        digest = hashlib.sha256(text.encode())
        digest.update(self.index.rows._fingerprint.encode())
        if self._selected is not None:
            digest.update(self._selected.tobytes())
        return digest.hexdigest()

    def chunks(
        self, size: int, wanted: Callable[[int], bool]
    ) -> Iterator[tuple[int, Iterable[Sample | BadSample]]]:
        """Iterate over the data in order, in chunks of `size` consecutive samples.

        Yields the number and the samples of each chunk for which `wanted(number)` is true; it is
        called before anything of the chunk is read. Samples are decoded as they are taken, and must
        all be taken before the next chunk. In place of a sample whose image cannot be decoded, or
        whose captions are invalid, stands its BadSample.
        """
        for number, start in enumerate(range(0, len(self), size)):
            if wanted(number):
                ids = range(start, min(start + size, len(self)))
                yield number, prefetch(self._sample, ids, threads=self.config.num_workers)

    def batches(
        self,
        start: int,
        *,
        batch_size: int,
        seed: int,
        stop: int,
        rank: int = 0,
        world_size: int = 1,
        examples: Dataset[Any] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Yield this process's rows of the batches of steps `start` … `stop - 1`, see `collate`.

        `examples` is the subset of this data set that the batches are drawn from, by default all.
        """
        chosen: Any = self if examples is None else examples
        return batches(
            chosen,
            start,
            num_samples=len(chosen),
            collate=collate,
            batch_size=batch_size,
            seed=seed,
            stop=stop,
            rank=rank,
            world_size=world_size,
            num_workers=self.config.num_workers,
        )

    def some_examples(self, count: int) -> Iterator[dict[str, Any]]:
        """Yield up to `count` evenly spaced examples, the same ones each time."""
        count = min(count, len(self))
        return (self[i * len(self) // count] for i in range(count))

    def caption_lists(self, count: int) -> Iterator[list[str]]:
        """Yield each caption of a sample once, whatever its weight, in a list for each sample.

        Those of all samples come, whatever `count` is, since they are read from disk.
        """
        return (list(dict.fromkeys(captions)) for captions in self.captions)

    def some_captions(self, count: int) -> Iterator[str]:
        """Yield the captions of `caption_lists`."""
        return chain.from_iterable(self.caption_lists(count))

    def samples(self) -> Iterator[EncodedSample | BadSample]:
        """Iterate over the data in order; images are read, and not decoded."""
        return prefetch(self._encoded, range(len(self)), threads=self.config.num_workers)

    def _encoded(self, index: int) -> EncodedSample | BadSample:
        row = self._row(index)
        name = self.index.name(row)
        try:
            data = self.index.read(row, self.config.image_column)
            captions = self.captions[index] if self.captions else []
        except BadSample as error:
            return BadSample(error.reason, f"{name!r} {error.detail}".strip())
        return EncodedSample(name, data, captions)

    def _sample(self, index: int) -> Sample | BadSample:
        sample = self._encoded(index)
        return sample if isinstance(sample, BadSample) else decoded(sample, self.config)

    def image(self, index: int) -> Tensor:
        """Return an image as (3, S, S) uint8. Raises BadSample, a ValueError, for a bad one."""
        if self._images is not None and index in self._images:
            return self._images[index]
        row = self._row(index)
        try:
            data = self.index.read(row, self.config.image_column)
            pixels = square_pixels(data, self.config)
        except BadSample as error:
            raise BadSample(
                error.reason,
                f"data={self.config.data!r}: the image of row {index}, "
                f"{self.index.name(row)!r}, cannot be used: {error.detail}; "
                "`latentdiff data check` finds all such images",
            ) from error
        if self._images is not None:
            self._images[index] = pixels
        return pixels

    def __getitem__(self, index: int) -> dict[str, Any]:
        for other in range(index, index + len(self)):
            other %= len(self)
            if other in self.replaced or (other != index and other in self.validation):
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
        """Record a bad sample. Raises ValueError when there are too many."""
        self.replaced[index] = error
        bad = len(self.replaced)
        if bad / len(self) > self.config.max_bad or bad == len(self):
            reasons = Counter(error.reason for error in self.replaced.values())
            raise ValueError(
                f"{len(self.replaced)} of {len(self)} samples turned out to be bad, more than "
                f"max_bad={self.config.max_bad}: {breakdown(reasons)}; the last: {error}; "
                f"{advice(len(self.replaced), len(self))}"
            ) from error
        if len(self.replaced) == 1:
            warnings.warn(f"a sample is replaced by the next: {error}", stacklevel=3)

    def _row(self, index: int) -> int:
        """Return the row of a sample in the index."""
        return index if self._selected is None else int(self._selected[index])


def open_captioned(config: DataConfig) -> Index:
    """Open the data by random access. Raises ValueError unless it has the columns of `config`."""
    _, *columns = config.columns()
    index = open_index(config.location(), config.split, columns=columns)
    config.check_columns(index.columns, index.image_columns)
    return index


def index_captions(
    index: Index, config: DataConfig, rows: datasets.Dataset | None = None
) -> Captions:
    """Return the captions of an index, or of `rows` selected from it.

    Raises ValueError when a caption column holds no texts, or a weight column no numbers.
    """
    try:
        return Captions(index.rows if rows is None else rows, config.caption_rules())
    except ValueError as error:
        raise ValueError(f"data={config.data!r}: {error}") from error


def known_faults(index: Index, captions: Captions, config: DataConfig) -> dict[int, BadSample]:
    """Map the row of each sample that is bad by its metadata alone to what is wrong with it."""
    faults = dict(index.faults)
    if captions.rules.columns and not captions.rules.allow_empty:
        for row in np.flatnonzero(~captions.present()).tolist():
            faults.setdefault(row, BadSample("no caption"))
    return faults


def _listed_faults(index: Index, config: DataConfig) -> dict[int, BadSample]:
    """Map the row of each sample that the list of bad samples names to what is wrong with it."""
    listed = ListedBadSamples(read_bad_samples(config))
    reasons = map(listed.reason, index.names() if listed.reasons else ())
    return {row: BadSample(reason) for row, reason in enumerate(reasons) if reason is not None}


def _without_excluded(rows: datasets.Dataset, config: DataConfig) -> np.ndarray:
    """Select the rows that have none of the excluded values, (N,) bool."""
    selected = np.ones(len(rows), dtype=bool)
    for name, values in config.exclude.items():
        start, found = 0, set[str]()
        for chunk in rows.data.column(name).chunks if values else ():
            for i, value in enumerate(chunk.to_pylist(), start=start):
                if excluding := config.excluding(name, value):
                    selected[i] = False
                    found |= excluding
            start += len(chunk)
        if missing := [value for value in values if value not in found]:
            warnings.warn(
                f"data={config.data!r}: exclude leaves out nothing by {missing[0]!r}, which no row "
                f"has in the column {name!r}",
                stacklevel=3,
            )
    return selected
