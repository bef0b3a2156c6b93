"""Data sets that are read in order: no index, no random access, no download of the whole.

Training takes what it gets through a shuffle buffer. Which samples make up a step is a function of
(seed, step): every process goes through the whole stream, and decodes its own rows alone.
"""

import hashlib
import json
import math
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import chain, groupby, islice
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, IterableDataset

from latentdiff.data.ahead import ahead
from latentdiff.data.batches import outlive_signals, shard
from latentdiff.data.captions import CaptionRules
from latentdiff.data.config import DataConfig
from latentdiff.data.decode import BadSample, decode
from latentdiff.data.images import (
    DUPLICATE,
    Sample,
    breakdown,
    collate,
    named_columns,
    read_bad_samples,
    square_pixels,
)
from latentdiff.data.shards import Place, Raw, Shard, Shards, open_shards
from latentdiff.data.sources import check_columns, visible

LOOKED_AT = 100  # samples at the beginning that must have the columns asked for
SURE = 1000  # samples before which a share says nothing
NOT_DATA = {"num_workers", "max_bad", "bad_samples", "bucket_step", "max_aspect", "shuffle_buffer"}


class Kept(NamedTuple):
    """A sample that is trained on unless its image turns out to be bad."""

    name: str
    file: bytes | Place | None
    captions: list[str]


class StreamedImages:
    """Examples `{"image": (3, S, S) uint8, "captions": [str, …]}`, in order or shuffled.

    What is bad by its captions alone, or by an earlier `latentdiff data check`, is passed over and
    counted in `left_out`, anew in each epoch; what cannot be decoded is replaced by the next good
    one, and noted in `replaced`. How many samples there are is not known before the first epoch's
    end.
    """

    def __init__(self, config: DataConfig) -> None:
        """Open the data set and look at its first samples.

        Raises ValueError when there is no such data, split or column, or its beginning is broken.
        """
        self.config = config
        self.rules = CaptionRules(
            columns=config.caption_columns,
            templates=config.caption_templates,
            weights=config.caption_weights,
            allow_empty=config.allow_empty_caption,
        )
        found = open_shards(
            config.place(),
            config.split,
            image_column=config.image_column,
            columns=[name for name in named_columns(config) if name != config.image_column],
        )
        self.shards = found.shards
        self.known = read_bad_samples(config)
        if self.known and not found.numbered:
            raise ValueError(
                f"bad_samples={str(config.bad_samples)!r} cannot be used: rows of the hub's files "
                "have no numbers while they are streamed"
            )
        self._check_columns(found)
        self._files = found.fingerprint
        self.left_out = Counter[str]()
        self.replaced: dict[str, BadSample] = {}
        self.num_samples: int | None = None
        """Of an epoch, without what is left out; None before the first has ended."""
        self._read = 0  # samples of an epoch that were read, at most

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the files, by size and time, and of how they become images and captions."""
        names = [one.name for one in fields(DataConfig) if one.name not in NOT_DATA]
        options = {name: getattr(self.config, name) for name in names}
        text = json.dumps([self._files, options, self.known], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def chunks(
        self, size: int, wanted: Callable[[int], bool]
    ) -> Iterator[tuple[int, Iterable[Sample | BadSample]]]:
        """Go through the data in order, in chunks of `size` consecutive samples.

        See `CaptionedImages.chunks`; of a chunk that is not wanted the captions are read.
        """
        asked: dict[int, bool] = {}
        done = 0

        def ask(number: int) -> bool:
            if number not in asked:
                asked.clear()
                asked[number] = wanted(number)
            return asked[number]

        def wanted_now() -> bool:
            return ask(done // size)

        def numbered() -> Iterator[tuple[int, Kept]]:
            nonlocal done
            for kept in self._kept(self.shards, wanted_now):
                yield done // size, kept
                done += 1

        for number, group in groupby(numbered(), key=lambda pair: pair[0]):
            if ask(number):
                samples = (kept for _, kept in group)
                yield number, ahead(self._sample, samples, threads=self.config.num_workers)

    def examples(self) -> Iterator[dict[str, Any]]:
        """One epoch of good examples in the order of the files."""
        for kept in self._kept(self.shards, lambda: True):
            example = self._example(kept)
            if isinstance(example, BadSample):
                self._pass_over(kept.name, example)
            else:
                yield example

    def captions(self) -> Iterator[list[str]]:
        """One epoch of captions in the order of the files; images are not read."""
        for kept in self._kept(self.shards, None):
            yield kept.captions

    def batches(
        self,
        start: int,
        *,
        batch_size: int,
        seed: int,
        stop: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ) -> Iterator[dict[str, Any]]:
        """This process's part of the batches of steps `start` … `stop - 1`, see `collate`.

        An epoch goes through the shards in an order of its own; each sample takes the place of one
        that is drawn from a buffer of `shuffle_buffer`. Batches run on across the end of an epoch.
        A bad image is replaced by the next good sample of that order.

        The numbers of processes and workers do not change what is in a batch. With workers, one
        process reads and `num_workers` threads of it decode. Raises ValueError when too much is
        bad, and when an epoch has fewer samples than one batch.
        """
        options = {"batch_size": batch_size, "seed": seed, "stop": stop}
        options |= {"rank": rank, "world_size": world_size, "threads": num_workers}
        loader = DataLoader(
            _Batches(self, start, options),
            batch_size=None,
            num_workers=min(num_workers, 1),
            prefetch_factor=2 * num_workers or None,
            collate_fn=_as_it_is,
            worker_init_fn=outlive_signals,
        )
        for batch in loader:
            if isinstance(batch, ValueError):  # out of the worker, without its stack
                raise batch
            yield batch

    def shuffled(self, start: int, *, seed: int, batch_size: int = 1) -> Iterator[Kept]:
        """The samples from position `start` on, of one epoch after the other.

        What comes before is read without its images where they can be found again, else with
        them; nothing is decoded. Raises ValueError when an epoch has fewer than `batch_size`.
        """
        epoch, skip = 0, start
        while True:
            passed = yield from self._epoch(seed, epoch, skip)
            if passed < batch_size:
                raise ValueError(
                    f"batch_size={batch_size} must be at most {passed}, the number of samples in "
                    f"data={self.config.data!r}"
                )
            # The first epoch's end tells how long all are, and so the way to any other.
            epoch, skip = divmod(start, passed) if start >= passed > 0 == epoch else (epoch + 1, 0)

    def _epoch(self, seed: int, epoch: int, skip: int) -> Generator[Kept, None, int]:
        """One epoch from its sample number `skip` on; returns how many it has.

        Shards come in an order of their own, samples are drawn from the buffer.
        """
        order = np.random.default_rng([seed, epoch]).permutation(len(self.shards))
        draw = np.random.default_rng([seed, epoch, 1])
        size, buffer = self.config.shuffle_buffer, list[Kept]()
        passed = 0

        def wanted_now() -> bool:
            return passed >= skip

        for kept in self._kept([self.shards[i] for i in order], wanted_now):
            if len(buffer) < size:
                buffer.append(kept)
                continue
            place = int(draw.integers(size))
            drawn, buffer[place] = buffer[place], kept
            if passed >= skip:
                yield drawn
            passed += 1
        for place in draw.permutation(len(buffer)):
            if passed >= skip:
                yield buffer[place]
            passed += 1
        return passed

    def _kept(self, shards: Sequence[Shard], images: Callable[[], bool] | None) -> Iterator[Kept]:
        """The samples of the shards, in order, without those that are bad by what is known.

        `images` is asked whether the next sample's image is wanted now, if it can be fetched
        later; what cannot be is read, unless `images` is None: then none is.
        """
        self.left_out = left_out = Counter[str]()
        kept = 0
        for part in shards:
            asked = images if part.places and images is not None else lambda: images is not None
            seen = set[str]()
            for raw in part.samples(asked):
                if any(raw.row.get(name) in out for name, out in self.config.exclude.items()):
                    continue
                try:
                    captions = self._captions(raw, seen)
                except BadSample as error:
                    left_out[error.reason] += 1
                    total = kept + sum(left_out.values())
                    self._check(left_out, total, whole=False, last=f"{raw.name!r} ({error})")
                    continue
                kept += 1
                self._read = max(self._read, kept)
                yield Kept(raw.name, raw.file, captions)
        total = kept + sum(left_out.values())
        self._check(left_out, total, whole=True, last="")
        if kept == 0:
            raise ValueError(
                f"data={self.config.data!r}: no image is left in split {self.config.split!r}"
            )
        self.num_samples = kept
        self._check_replaced()

    def _captions(self, raw: Raw, seen: set[str]) -> list[str]:
        """A sample's captions. Raises BadSample when it is bad by what is known of it."""
        reason = self.known.get(raw.name)
        if reason is not None:
            if raw.name in seen or reason != DUPLICATE:  # the first of a name is good
                raise BadSample(reason)
            seen.add(raw.name)
        if raw.fault is not None:
            raise raw.fault
        captions = self.rules.of(raw.row)
        if self.rules.columns and not captions:
            raise BadSample("no caption")
        return captions

    def _example(self, kept: Kept) -> dict[str, Any] | BadSample:
        if kept.name in self.replaced:
            return self.replaced[kept.name]
        try:
            return {"image": square_pixels(_bytes(kept), self.config), "captions": kept.captions}
        except BadSample as error:
            return error

    def _sample(self, kept: Kept) -> Sample | BadSample:
        try:
            image = decode(_bytes(kept), self.config.decoding()).image
        except BadSample as error:
            return BadSample(error.reason, f"{kept.name!r} {error.detail}".strip())
        return Sample(kept.name, image, kept.captions)

    def _made(
        self,
        start: int,
        *,
        batch_size: int,
        seed: int,
        stop: int,
        rank: int,
        world_size: int,
        threads: int,
    ) -> Iterator[dict[str, Any]]:
        """What `batches` gives, made in this process."""
        samples = self.shuffled(start * batch_size, seed=seed, batch_size=batch_size)
        waiting = deque[Kept]()
        own = shard(range(batch_size), rank, world_size)

        def good(place: int, example: dict[str, Any] | BadSample) -> dict[str, Any]:
            """The example, or the next good one of the stream, which all processes know."""
            while isinstance(example, BadSample):
                self._pass_over(waiting[place].name, example)
                place += 1
                if place == len(waiting):
                    waiting.append(next(samples))
                example = self._example(waiting[place])
            return example

        for _ in range(start, stop):
            waiting.extend(islice(samples, max(0, batch_size - len(waiting))))
            found = ahead(self._example, (waiting[i] for i in own), threads=threads)
            yield collate([good(i, one) for i, one in zip(own, found, strict=True)])
            for _ in range(batch_size):
                waiting.popleft()

    def _pass_over(self, name: str, error: BadSample) -> None:
        """Note an image that turned out to be bad. Raises ValueError when there are too many."""
        if not self.replaced:
            warnings.warn(f"a sample is replaced by the next: {name!r} ({error})", stacklevel=3)
        self.replaced[name] = error
        self._check_replaced()

    def _check_replaced(self) -> None:
        if self.replaced:
            name, error = next(reversed(self.replaced.items()))
            self._check(
                Counter(error.reason for error in self.replaced.values()),
                self._read if self.num_samples is None else self.num_samples,
                whole=self.num_samples is not None,
                last=f"{name!r} ({error})",
            )

    def _check(self, reasons: Counter[str], total: int, *, whole: bool, last: str) -> None:
        """Raise ValueError when too many of `total` samples are bad, by more than chance."""
        bad = sum(reasons.values())
        allowed = min(self.config.max_bad * total, total - 1)
        if not whole:
            expected = self.config.max_bad * max(total, SURE)
            allowed = expected + 3 * math.sqrt(expected)  # three standard deviations
        if bad and bad > allowed:
            raise ValueError(
                f"data={self.config.data!r}: {bad} of {total} samples are bad, more than "
                f"max_bad={self.config.max_bad}: {breakdown(reasons)}"
                + (f"; the last is {last}" if last else "")
            )

    def _check_columns(self, found: Shards) -> None:
        """Raise ValueError when a column that is asked for is not there."""
        columns, where = found.columns, ""
        if columns is None:
            raws = chain.from_iterable(part.samples(lambda: False) for part in self.shards)
            rows = [raw.row for raw in islice(raws, LOOKED_AT)]
            names = dict.fromkeys(name for row in rows for name in row if visible(name))
            columns, where = ["image", *names], f" in its first {len(rows)} samples"
        check_columns(self.config.data, named_columns(self.config), columns, where)
        if self.config.image_column not in found.images:
            raise ValueError(
                f"data={self.config.data!r}: the column {self.config.image_column!r} holds no "
                f"images; those that do are {list(found.images)}"
            )


class _Batches(IterableDataset[Any]):
    """What a DataLoader goes through; a ValueError is its last element instead of being raised."""

    def __init__(self, stream: StreamedImages, start: int, options: dict[str, int]) -> None:
        self.stream, self.start, self.options = stream, start, options

    def __iter__(self) -> Iterator[dict[str, Any] | ValueError]:
        try:
            yield from self.stream._made(self.start, **self.options)
        except ValueError as error:
            yield error


def _bytes(kept: Kept) -> bytes:
    assert kept.file is not None
    return kept.file.read() if isinstance(kept.file, Place) else kept.file


def _as_it_is(batch: Any) -> Any:
    return batch
