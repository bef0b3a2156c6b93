"""StreamedImages: a data set that is read in order, without an index and without a download.

Training draws samples from a shuffle buffer. The samples of a step are a function of (seed, step):
every process reads the full stream, and decodes only its own rows of each batch.
"""

import hashlib
import json
import math
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, groupby, islice
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset

from latentdiff.data.bad_samples import ListedBadSamples, advice, breakdown, read_bad_samples
from latentdiff.data.batches import local_rows, outlive_signals
from latentdiff.data.config import DataConfig
from latentdiff.data.decode import BadSample
from latentdiff.data.forms.detect import open_shards
from latentdiff.data.forms.form import Record, Shard, Shards, is_public
from latentdiff.data.prefetch import prefetch
from latentdiff.data.samples import EncodedSample, Sample, collate, decoded, square_pixels
from latentdiff.data.shuffle import shuffled_epoch
from latentdiff.options import fingerprinted

COLUMNS_SEEN_IN = 100  # a column must occur in as many samples at the beginning
MIN_COUNTED = 1000  # samples; of fewer, the fraction of bad ones is too uncertain to refuse


class StreamedImages:
    """Examples `{"image": (3, S, S) uint8, "captions": [str, …]}`, in order or shuffled.

    Samples that are bad by their captions alone, or that `latentdiff data check` has listed, are
    passed over and counted in `left_out`, anew in each epoch. A sample that cannot be decoded is
    replaced by the next good one, and its fault is kept in `replaced`. The number of samples is
    unknown until the first epoch has ended.
    """

    captions = None  # a CaptionedImages has them by index

    def __init__(self, config: DataConfig) -> None:
        """Open the data set and read the captions of its first samples.

        Raises ValueError when there is no such data, split or column, or its metadata is broken.
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
        """Samples of an epoch, without those that are left out; None until an epoch has ended."""
        self._read = 0  # the most samples that were read of any epoch so far

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the files' sizes and times, and of the options that decide what is read."""
        names = fingerprinted(DataConfig)
        options = {name: getattr(self.config, name) for name in names}
        options = self.config.with_prompts(options)
        text = json.dumps([self._files, options, self.listed], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def chunks(
        self, size: int, wanted: Callable[[int], bool]
    ) -> Iterator[tuple[int, Iterable[Sample | BadSample]]]:
        """Iterate over the data in order, in chunks of `size` consecutive samples.

        See `CaptionedImages.chunks`; the captions of chunks that are not wanted are read as well.
        """
        wanted = lru_cache(maxsize=1)(wanted)  # one call for each chunk
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

    def samples(self) -> Iterator[EncodedSample]:
        """Iterate over the data in order; images are read, and not decoded."""
        return self.encoded(self.shards, lambda: True)

    def some_examples(self, count: int) -> Iterator[dict[str, Any]]:
        """Yield the first `count` good examples, in the order of the files."""
        return islice(self._examples(), count)

    def caption_lists(self, count: int) -> Iterator[list[str]]:
        """Yield each caption of a sample once, in a list for each of the first `count` samples.

        Images are not read.
        """
        samples = islice(self.encoded(self.shards, None), count)
        return (list(dict.fromkeys(sample.captions)) for sample in samples)

    def some_captions(self, count: int) -> Iterator[str]:
        """Yield the captions of `caption_lists`."""
        return chain.from_iterable(self.caption_lists(count))

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

        Each epoch shuffles the shards, and draws samples from a buffer of `shuffle_buffer` (see
        `shuffled_epoch`). Batches continue across the end of an epoch. A bad image is replaced by
        the next good sample of the shuffled order.

        The content of a batch does not depend on the numbers of processes and workers. With
        `num_workers`, one worker process reads, and decodes in that many threads. Raises ValueError
        when too many samples are bad, and when an epoch has fewer samples than one batch.
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
            collate_fn=_identity,
            worker_init_fn=outlive_signals,
        )
        for batch in loader:
            if isinstance(batch, ValueError):  # from the worker, without its stack trace
                raise batch
            yield batch

    def shuffled(self, start: int, *, seed: int, batch_size: int = 1) -> Iterator[EncodedSample]:
        """Yield the samples from position `start` on, through one shuffled epoch after the other.

        The samples before `start` are read as well, without their images where a shard is seekable;
        nothing is decoded. Raises ValueError when an epoch has fewer than `batch_size` samples.
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
            # All epochs are as long as the first, so that the others before `start` can be skipped.
            epoch, skip = divmod(start, length) if start >= length > 0 == epoch else (epoch + 1, 0)

    def encoded(
        self, shards: Iterable[Shard], images: Callable[[], bool] | None
    ) -> Iterator[EncodedSample]:
        """Yield the samples of the shards, in order, without those that are known to be bad.

        In seekable shards, `images()` decides for each sample whether its image is read now or can
        be left for later. Other shards read all their images. With `images` None no image is read.
        """
        self.left_out = left_out = Counter[str]()
        count = 0
        for shard in shards:
            ask = images if shard.seekable and images is not None else lambda: images is not None
            listed = ListedBadSamples(self.listed)
            for record in shard.records(ask):
                row = record.row
                if any(self.config.excluding(name, row.get(name)) for name in self.config.exclude):
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
        """Return a sample's captions. Raises BadSample for a sample that is known to be bad."""
        if reason := listed.reason(record.name):
            raise BadSample(reason)
        if record.fault is not None:
            raise record.fault
        captions = self.rules.of(record.row)
        if self.rules.columns and not captions:
            raise BadSample("no caption")
        return captions

    def _examples(self) -> Iterator[dict[str, Any]]:
        """Yield one epoch of good examples in the order of the files."""
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
        return decoded(sample, self.config)

    def _batches(
        self, start: int, *, batch_size: int, seed: int, stop: int, rank: int, world_size: int
    ) -> Iterator[dict[str, Any]]:
        """Yield the batches of `batches`, computed in this process."""
        samples = self.shuffled(start * batch_size, seed=seed, batch_size=batch_size)
        waiting = deque[EncodedSample]()
        local = local_rows(range(batch_size), rank, world_size)

        def good(position: int, example: dict[str, Any] | BadSample) -> dict[str, Any]:
            """Return the example or, if it is bad, the next good one, as in all other processes."""
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
        """Record an image that turned out to be bad. Raises ValueError when there are too many."""
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

        Before an epoch is `complete`, their number must exceed `max_bad` by more than chance.
        """
        bad = reasons.total()
        # 0.29 * 100 is 28.999999999999996.
        allowed = min(self.config.max_bad * total + 1e-6, total - 1)
        if not complete:
            expected = self.config.max_bad * max(total, MIN_COUNTED)
            allowed = expected + 3 * math.sqrt(expected)  # three standard deviations of a Poisson
        if bad and bad > allowed:
            raise ValueError(
                f"data={self.config.data!r}: {bad} of {total} samples are bad, more than "
                f"max_bad={self.config.max_bad}: {breakdown(reasons)}"
                + (f"; the last is {last}" if last else "")
                + f"; {advice(bad, total)}"
            )

    def _check_columns(self, opened: Shards) -> None:
        """Raise ValueError when a column that the options name is missing."""
        columns, where = opened.columns, ""
        if columns is None:
            records = chain.from_iterable(shard.records(lambda: False) for shard in self.shards)
            rows = [record.row for record in islice(records, COLUMNS_SEEN_IN)]
            names = dict.fromkeys(name for row in rows for name in row if is_public(name))
            columns, where = ["image", *names], f" in its first {len(rows)} samples"
        self.config.check_columns(columns, opened.image_columns, where)


class _Batches(IterableDataset[Any]):
    """A stream's batches for a DataLoader; a ValueError becomes the last element."""

    def __init__(self, stream: StreamedImages, start: int, options: dict[str, int]) -> None:
        self.stream, self.start, self.options = stream, start, options

    def __iter__(self) -> Iterator[dict[str, Any] | ValueError]:
        try:
            yield from self.stream._batches(self.start, **self.options)
        except ValueError as error:
            yield error


def _identity(batch: Any) -> Any:
    return batch
