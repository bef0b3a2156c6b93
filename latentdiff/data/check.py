"""Decode every sample of a data set once: list the bad ones with reasons, summarise the others."""

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from latentdiff.data.bad_samples import BAD_SAMPLES, DUPLICATE, judged_by
from latentdiff.data.buckets import nearest
from latentdiff.data.captions import Captions
from latentdiff.data.config import DataConfig
from latentdiff.data.dataset import index_captions, known_faults, open_captioned
from latentdiff.data.decode import BadSample, decode
from latentdiff.data.forms.detect import Index
from latentdiff.data.samples import check_size

SUMMARY = "summary.json"
ASPECT_RATIOS = ("1:3", "1:2", "9:16", "2:3", "3:4", "1:1", "4:3", "3:2", "16:9", "2:1", "3:1")
EXAMPLES = 20  # names of extra files and duplicates that the summary lists
AT_ONCE = 256  # images that the threads decode before their results are written


@dataclass
class Summary:
    """What `summary.json` holds; sizes in pixels, lengths in characters."""

    samples: int = 0
    bad: int = 0
    splits: dict[str, int] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    """How many samples are bad for each reason; a bad sample has one."""
    notes: Counter[str] = field(default_factory=Counter)
    """Conversions of good samples, such as "CMYK without a profile"."""
    sizes: Counter[str] = field(default_factory=Counter)
    """The most frequent sizes, as "640x480"."""
    shorter_side: dict[str, float] = field(default_factory=dict)
    aspect_ratios: Counter[str] = field(default_factory=Counter)
    """Width to height, by the nearest of ASPECT_RATIOS."""
    buckets: dict[str, dict[str, int]] = field(default_factory=dict)
    """With bucket_step: how many good images of each split have each size, as "640x384"."""
    captions_each: dict[str, float] = field(default_factory=dict)
    caption_lengths: dict[str, float] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)
    """Good samples whose file is equal to an earlier sample's; they stay in the training set."""
    extra_files: dict[str, Any] = field(default_factory=dict)
    """Images that no row of metadata names; captions that no image has, or what else has them."""


class _Good(NamedTuple):
    size: tuple[int, int]
    notes: tuple[str, ...]
    digest: int


def check_data(config: DataConfig, out: Path, *, split: str | None = None) -> Summary:
    """Decode all samples, write bad_samples.jsonl and summary.json into `out`; return the summary.

    All splits are checked unless `split` names one. `config.num_workers` is the number of threads.
    The result of an earlier check is not read. Raises ValueError when the data cannot be opened.
    """
    summary, unlisted = Summary(), list[str]()
    sizes = Counter[tuple[int, int]]()
    sides, lengths, counts, digests = array("L"), array("L"), array("L"), array("Q")
    out.mkdir(parents=True, exist_ok=True)
    staged = out / f".{BAD_SAMPLES}-{os.getpid()}"
    try:
        with staged.open("w", encoding="utf-8") as file:
            for name in [split] if split is not None else config.splits():
                of_split = replace(config, split=name)
                index = open_captioned(of_split)
                captions = index_captions(index, of_split)
                summary.splits[name] = len(index.rows)
                buckets = Counter[int]()
                for row, result in _checked(index, captions, of_split):
                    if isinstance(result, BadSample):
                        summary.reasons[result.reason] += 1
                        line = {"path": index.name(row), "reason": result.reason}
                        line |= {"detail": result.detail} if result.detail else {}
                        options = judged_by(result.reason, config)
                        line |= {"options": options} if options else {}
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")
                        continue
                    sizes[result.size] += 1
                    buckets[nearest(result.size, config.buckets())] += 1
                    sides.append(min(result.size))
                    digests.append(result.digest)
                    summary.notes.update(result.notes)
                    if captions:
                        texts = captions[row]
                        counts.append(len(texts))
                        lengths.extend(map(len, texts))
                unlisted += index.unlisted()
                if config.bucket_step:
                    shapes = [f"{width}x{height}" for width, height in config.buckets()]
                    summary.buckets[name] = {shapes[i]: buckets[i] for i in sorted(buckets)}
        summary.samples = sum(summary.splits.values())
        summary.bad = sum(summary.reasons.values())
        summary.sizes = Counter({f"{w}x{h}": n for (w, h), n in sizes.most_common(EXAMPLES)})
        for size, count in sizes.items():
            summary.aspect_ratios[_aspect(*size)] += count
        summary.shorter_side = _spread(sides)
        summary.captions_each, summary.caption_lengths = _spread(counts), _spread(lengths)
        summary.duplicates = {"files": len(digests) - len(np.unique(np.array(digests)))}
        summary.extra_files = {"count": len(unlisted), "first": unlisted[:EXAMPLES]}
        text = json.dumps({"data": config.data, **vars(summary)}, ensure_ascii=False, indent=1)
        (out / SUMMARY).write_text(text + "\n", encoding="utf-8")
        os.replace(staged, out / BAD_SAMPLES)
    finally:
        staged.unlink(missing_ok=True)
    return summary


def _checked(
    index: Index, captions: Captions, config: DataConfig
) -> Iterator[tuple[int, BadSample | _Good]]:
    """Yield the rows in order, each with why it is bad or with its properties."""
    known = known_faults(index, captions, config)
    for row in _repeated(index.names()):
        known.setdefault(row, BadSample(DUPLICATE))

    def check(row: int) -> BadSample | _Good:
        if row in known:
            return known[row]
        try:
            data = index.read(row, config.image_column)
            image, notes = decode(data, config.decoding())
            check_size(image.size, config)
            if captions:
                captions[row]  # the weights may not fit
        except BadSample as error:
            return error
        return _Good(image.size, notes, _number(data))

    rows = iter(tqdm(range(len(index.rows)), desc=f"checking {config.split}", unit="image"))
    with ThreadPoolExecutor(max(1, config.num_workers)) as threads:
        while batch := list(islice(rows, AT_ONCE)):
            yield from zip(batch, threads.map(check, batch), strict=True)


def _repeated(names: Iterable[str]) -> list[int]:
    """Find the rows whose name an earlier row has; memory holds eight bytes for each name."""
    hashes = np.fromiter((_number(name.encode()) for name in names), np.uint64)
    _, first = np.unique(hashes, return_index=True)
    again = np.ones(len(hashes), dtype=bool)
    again[first] = False
    return np.flatnonzero(again).tolist()


def _number(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _aspect(width: int, height: int) -> str:
    def distance(name: str) -> float:
        across, down = map(int, name.split(":"))
        return abs(np.log(width / height) - np.log(across / down))

    return min(ASPECT_RATIOS, key=distance)


def _spread(values: "array[int]") -> dict[str, float]:
    if not values:
        return {}
    numbers = np.array(values)
    names = ("min", "p05", "median", "p95", "max")
    quantiles = np.quantile(numbers, [0, 0.05, 0.5, 0.95, 1]).tolist()
    return {"mean": round(float(numbers.mean()), 2), **dict(zip(names, quantiles, strict=True))}
