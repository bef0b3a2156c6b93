"""Data sets that are read in order: no index, no random access, no download beforehand.

Training takes what it gets through a shuffle buffer. Which samples make up a step is a function of
(seed, step): every process reads the full stream, and decodes its local rows alone.
"""

import hashlib
import json
import math
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, groupby, islice
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset, IterableDataset

from latentdiff.data.bad_samples import ListedBadSamples, breakdown, read_bad_samples
from latentdiff.data.batches import local_rows, outlive_signals
from latentdiff.data.config import DataConfig
from latentdiff.data.decode import BadSample, decode
from latentdiff.data.forms.detect import open_shards
from latentdiff.data.forms.form import FileRange, Record, Shard, Shards, is_public
from latentdiff.data.prefetch import prefetch
from latentdiff.data.samples import Sample, collate, square_pixels
from latentdiff.data.shuffle import shuffled_epoch
from latentdiff.options import fingerprinted

COLUMNS_SEEN_IN = 100  # samples at the beginning that must have the columns asked for
LEAST_COUNTED = 1000  # samples before which the fraction of bad ones says nothing


class EncodedSample(NamedTuple):
    """A sample before its image is decoded, which may turn out to be bad."""

    name: str
    file: bytes | FileRange | None
    captions: list[str]

    def read(self) -> bytes:
        """The image's file. Raises BadSample."""
        assert self.file is not None
        return self.file.read() if isinstance(self.file, FileRange) else self.file


class StreamedImages:
    """Examples `{"image": (3, S, S) uint8, "captions": [str, …]}`, in order or shuffled.

    What is bad by its captions alone, or by an earlier `latentdiff data check`, is passed over and
    counted in `left_out`, anew in each epoch; what cannot be decoded is replaced by the next good
    one, and noted in `replaced`. How many samples there are is not known before the first epoch's
    end.
    """

    captions = None  # which a CaptionedImages has by index

    def __init__(self, config: DataConfig) -> None:
        """Open the data set and look at its first samples.

        Raises ValueError when there is no such data, split or column, or its beginning is broken.
        """
        self.config = config
        self.rules = config.caption_rules()
        image_column, *columns = config.columns()
        opened = open_shards(
            config.location(), config.split, image_column=image_column, columns=columns
        )
        self.shards = opened.shards
        self.listed = read_bad_samples(config)
        if self.listed and not opened.named_as_in_index:
            raise ValueError(
                f"bad_samples={str(config.bad_samples)!r} cannot be used: rows of the hub's files "
                "have no numbers while they are streamed"
            )
        self._check_columns(opened)
        self._files = opened.fingerprint
        self.left_out = Counter[str]()
        self.replaced: dict[str, BadSample] = {}
        self.num_samples: int | None = None
        """Of an epoch, without what is left out; None before the first has ended."""
        self._read = 0  # samples of an epoch that were read, at most

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the files, by size and time, and of how they become images and captions."""
        names = fingerprinted(DataConfig)
        options = {name: getattr(self.config, name) for name in names}
        text = json.dumps([self._files, options, self.listed], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def chunks(
        self, size: int, wanted: Callable[[int], bool]
    ) -> Iterator[tuple[int, Iterable[Sample | BadSample]]]:
        """Go through the data in order, in chunks of `size` consecutive samples.

        See `CaptionedImages.chunks`; of a chunk that is not wanted the captions are read.
        """
        wanted = lru_cache(maxsize=1)(wanted)  # which is asked once for each chunk
        done = 0

        def wanted_now() -> bool:
            return wanted(done // size)

        def numbered() -> Iterator[tuple[int, EncodedSample]]:
            nonlocal done
            for sample in self.encoded(self.shards, wanted_now):
                yield done // size, sample
                done += 1

        for number, group in groupby(numbered(), key=lambda pair: pair[0]):
            if wanted(number):
                samples = (sample for _, sample in group)
                yield number, prefetch(self._sample, samples, threads=self.config.num_workers)

    def some_examples(self, count: int) -> Iterator[dict[str, Any]]:
        """The first `count` good examples, in the order of the files."""
        return islice(self._examples(), count)

    def some_captions(self, count: int) -> Iterator[str]:
        """The captions of the first `count` samples; images are not read."""
        samples = self.encoded(self.shards, None)
        return chain.from_iterable(sample.captions for sample in islice(samples, count))

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
        """This process's rows of the batches of steps `start` … `stop - 1`, see `collate`.

        An epoch goes through the shards in an order of its own; each sample takes the place of one
        that is drawn from a buffer of `shuffle_buffer`. Batches run on across the end of an epoch.
        A bad image is replaced by the next good sample of that order.

        The numbers of processes and workers do not change what is in a batch. With `num_workers`,
        one process reads and so many threads of it decode. Raises ValueError when too much is
        bad, and when an epoch has fewer samples than one batch.
        """
        assert examples is None, "a stream has no random access"
        num_workers = self.config.num_workers
        options = {"batch_size": batch_size, "seed": seed, "stop": stop}
        options |= {"rank": rank, "world_size": world_size}
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

    def shuffled(self, start: int, *, seed: int, batch_size: int = 1) -> Iterator[EncodedSample]:
        """The samples from position `start` on, of one epoch after the other.

        What comes before is read without its images where they can be found again, else with
        them; nothing is decoded. Raises ValueError when an epoch has fewer than `batch_size`.
        """

        def samples(order: Sequence[int], images: Callable[[], bool]) -> Iterator[EncodedSample]:
            return self.encoded([self.shards[i] for i in order], images)

        options = {"buffer_size": self.config.shuffle_buffer, "seed": seed}
        epoch, skip = 0, start
        while True:
            length = yield from shuffled_epoch(
                samples, len(self.shards), epoch=epoch, skip=skip, **options
            )
            if length < batch_size:
                raise ValueError(
                    f"batch_size={batch_size} must be at most {length}, the number of samples in "
                    f"data={self.config.data!r}"
                )
            # The first epoch's end tells how long all are, and so the way to any other.
            epoch, skip = divmod(start, length) if start >= length > 0 == epoch else (epoch + 1, 0)

    def encoded(
        self, shards: Iterable[Shard], images: Callable[[], bool] | None
    ) -> Iterator[EncodedSample]:
        """The samples of the shards, in order, without those that are known to be bad.

        `images` is asked whether the next sample's image is wanted now, if it can be fetched
        later; what cannot be is read, unless `images` is None: then none is.
        """
        self.left_out = left_out = Counter[str]()
        count = 0
        for shard in shards:
            ask = images if shard.seekable and images is not None else lambda: images is not None
            listed = ListedBadSamples(self.listed)
            for record in shard.records(ask):
                row = record.row
                if any(row.get(name) in values for name, values in self.config.exclude.items()):
                    continue
                try:
                    captions = self._captions(record, listed)
                except BadSample as error:
                    left_out[error.reason] += 1
                    total = count + left_out.total()
                    self._check_bad(left_out, total, last=f"{record.name!r} ({error})")
                    continue
                count += 1
                self._read = max(self._read, count)
                yield EncodedSample(record.name, record.file, captions)
        self._check_bad(left_out, count + left_out.total(), complete=True)
        if count == 0:
            raise ValueError(
                f"data={self.config.data!r}: no image is left in split {self.config.split!r}"
            )
        self.num_samples = count
        self._check_replaced()

    def _captions(self, record: Record, listed: ListedBadSamples) -> list[str]:
        """A sample's captions. Raises BadSample when it is known to be bad."""
        if reason := listed.reason(record.name):
            raise BadSample(reason)
        if record.fault is not None:
            raise record.fault
        captions = self.rules.of(record.row)
        if self.rules.columns and not captions:
            raise BadSample("no caption")
        return captions

    def _examples(self) -> Iterator[dict[str, Any]]:
        """One epoch of good examples in the order of the files."""
        for sample in self.encoded(self.shards, lambda: True):
            example = self._example(sample)
            if isinstance(example, BadSample):
                self._replace(sample.name, example)
            else:
                yield example

    def _example(self, sample: EncodedSample) -> dict[str, Any] | BadSample:
        if sample.name in self.replaced:
            return self.replaced[sample.name]
        try:
            pixels = square_pixels(sample.read(), self.config)
        except BadSample as error:
            return error
        return {"image": pixels, "captions": sample.captions}

    def _sample(self, sample: EncodedSample) -> Sample | BadSample:
        try:
            image = decode(sample.read(), self.config.decoding()).image
        except BadSample as error:
            return BadSample(error.reason, f"{sample.name!r} {error.detail}".strip())
        return Sample(sample.name, image, sample.captions)

    def _batches(
        self, start: int, *, batch_size: int, seed: int, stop: int, rank: int, world_size: int
    ) -> Iterator[dict[str, Any]]:
        """What `batches` gives, made in this process."""
        samples = self.shuffled(start * batch_size, seed=seed, batch_size=batch_size)
        waiting = deque[EncodedSample]()
        local = local_rows(range(batch_size), rank, world_size)

        def good(position: int, example: dict[str, Any] | BadSample) -> dict[str, Any]:
            """The example, or the next good one of the stream, which all processes know."""
            while isinstance(example, BadSample):
                self._replace(waiting[position].name, example)
                position += 1
                if position == len(waiting):
                    waiting.append(next(samples))
                example = self._example(waiting[position])
            return example

        for _ in range(start, stop):
            waiting.extend(islice(samples, max(0, batch_size - len(waiting))))
            encoded = (waiting[i] for i in local)
            examples = prefetch(self._example, encoded, threads=self.config.num_workers)
            yield collate([good(i, one) for i, one in zip(local, examples, strict=True)])
            for _ in range(batch_size):
                waiting.popleft()

    def _replace(self, name: str, error: BadSample) -> None:
        """Note an image that turned out to be bad. Raises ValueError when there are too many."""
        if not self.replaced:
            warnings.warn(f"a sample is replaced by the next: {name!r} ({error})", stacklevel=3)
        self.replaced[name] = error
        self._check_replaced()

    def _check_replaced(self) -> None:
        if self.replaced:
            name, error = next(reversed(self.replaced.items()))
            self._check_bad(
                Counter(error.reason for error in self.replaced.values()),
                self._read if self.num_samples is None else self.num_samples,
                complete=self.num_samples is not None,
                last=f"{name!r} ({error})",
            )

    def _check_bad(
        self, reasons: Counter[str], total: int, *, complete: bool = False, last: str = ""
    ) -> None:
        """Raise ValueError when too many of `total` samples are bad.

        Before an epoch is `complete`, that is by more than chance.
        """
        bad = reasons.total()
        allowed = min(self.config.max_bad * total, total - 1)
        if not complete:
            expected = self.config.max_bad * max(total, LEAST_COUNTED)
            allowed = expected + 3 * math.sqrt(expected)  # three standard deviations
        if bad and bad > allowed:
            raise ValueError(
                f"data={self.config.data!r}: {bad} of {total} samples are bad, more than "
                f"max_bad={self.config.max_bad}: {breakdown(reasons)}"
                + (f"; the last is {last}" if last else "")
            )

    def _check_columns(self, opened: Shards) -> None:
        """Raise ValueError when a column that the options name is not there."""
        columns, where = opened.columns, ""
        if columns is None:
            records = chain.from_iterable(shard.records(lambda: False) for shard in self.shards)
            rows = [record.row for record in islice(records, COLUMNS_SEEN_IN)]
            names = dict.fromkeys(name for row in rows for name in row if is_public(name))
            columns, where = ["image", *names], f" in its first {len(rows)} samples"
        self.config.check_columns(columns, opened.image_columns, where)


class _Batches(IterableDataset[Any]):
    """What a DataLoader goes through; a ValueError is its last element instead of being raised."""

    def __init__(self, stream: StreamedImages, start: int, options: dict[str, int]) -> None:
        self.stream, self.start, self.options = stream, start, options

    def __iter__(self) -> Iterator[dict[str, Any] | ValueError]:
        try:
            yield from self.stream._batches(self.start, **self.options)
        except ValueError as error:
            yield error


def _as_it_is(batch: Any) -> Any:
    return batch
