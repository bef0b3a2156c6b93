"""Decode a whole data set once: which samples are bad and why, and what the others are like."""

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

from latentdiff.data.bad_samples import BAD_SAMPLES, DUPLICATE
from latentdiff.data.captions import Captions
from latentdiff.data.config import DataConfig
from latentdiff.data.dataset import index_captions, known_faults, open_captioned
from latentdiff.data.decode import BadSample, decode
from latentdiff.data.forms.detect import Index
from latentdiff.data.samples import check_size

SUMMARY = "summary.json"
ASPECT_RATIOS = ("1:3", "1:2", "9:16", "2:3", "3:4", "1:1", "4:3", "3:2", "16:9", "2:1", "3:1")
EXAMPLES = 20  # names of extra files and duplicates that the summary lists
AT_ONCE = 256  # images between the threads and the report


@dataclass
class Summary:
    """What `summary.json` holds; sizes in pixels, lengths in characters."""

    samples: int = 0
    bad: int = 0
    splits: dict[str, int] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    """Of bad samples; each has one."""
    notes: Counter[str] = field(default_factory=Counter)
    """What was done to good ones, such as "CMYK without a profile"."""
    sizes: Counter[str] = field(default_factory=Counter)
    """The most frequent sizes, as "640x480"."""
    shorter_side: dict[str, float] = field(default_factory=dict)
    aspect_ratios: Counter[str] = field(default_factory=Counter)
    """Width to height, by the nearest of ASPECT_RATIOS."""
    captions_each: dict[str, float] = field(default_factory=dict)
    caption_lengths: dict[str, float] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)
    """Good samples whose file has the bytes of one before: these are trained on."""
    extra_files: dict[str, Any] = field(default_factory=dict)
    """Images that no row of metadata names."""


class _Good(NamedTuple):
    size: tuple[int, int]
    notes: tuple[str, ...]
    digest: int


def check_data(config: DataConfig, out: Path, *, split: str | None = None) -> Summary:
    """Decode everything, write bad_samples.jsonl and summary.json into `out`; return the latter.

    All splits, unless one is named. `config.num_workers` is a number of threads. What an earlier
    check found plays no part. Raises ValueError when the data cannot be opened.
    """
    summary, extra = Summary(), list[str]()
    sizes = Counter[tuple[int, int]]()
    sides, lengths, counts, digests = array("L"), array("L"), array("L"), array("Q")
    out.mkdir(parents=True, exist_ok=True)
    staged = out / f".{BAD_SAMPLES}-{os.getpid()}"
    try:
        with staged.open("w", encoding="utf-8") as file:
            for name in [split] if split is not None else config.splits():
                part = replace(config, split=name)
                source = open_captioned(part)
                captions = index_captions(source, part)
                summary.splits[name] = len(source.rows)
                for index, found in _checked(source, captions, part):
                    if isinstance(found, BadSample):
                        summary.reasons[found.reason] += 1
                        row = {"path": source.name(index), "reason": found.reason}
                        row |= {"detail": found.detail} if found.detail else {}
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
                        continue
                    sizes[found.size] += 1
                    sides.append(min(found.size))
                    digests.append(found.digest)
                    summary.notes.update(found.notes)
                    if captions:
                        texts = captions[index]
                        counts.append(len(texts))
                        lengths.extend(map(len, texts))
                extra += source.unlisted()
        summary.samples = sum(summary.splits.values())
        summary.bad = sum(summary.reasons.values())
        summary.sizes = Counter({f"{w}x{h}": n for (w, h), n in sizes.most_common(EXAMPLES)})
        for size, count in sizes.items():
            summary.aspect_ratios[_aspect(*size)] += count
        summary.shorter_side = _spread(sides)
        summary.captions_each, summary.caption_lengths = _spread(counts), _spread(lengths)
        summary.duplicates = {"files": len(digests) - len(np.unique(np.array(digests)))}
        summary.extra_files = {"count": len(extra), "first": extra[:EXAMPLES]}
        text = json.dumps({"data": config.data, **vars(summary)}, ensure_ascii=False, indent=1)
        (out / SUMMARY).write_text(text + "\n", encoding="utf-8")
        os.replace(staged, out / BAD_SAMPLES)
    finally:
        staged.unlink(missing_ok=True)
    return summary


def _checked(
    source: Index, captions: Captions, config: DataConfig
) -> Iterator[tuple[int, BadSample | _Good]]:
    """The samples in order, each with what is wrong or what it is like."""
    known = known_faults(source, captions, config)
    for index in _repeated(source.names()):
        known.setdefault(index, BadSample(DUPLICATE))

    def look(index: int) -> BadSample | _Good:
        if index in known:
            return known[index]
        try:
            data = source.read(index, config.image_column)
            image, notes = decode(data, config.decoding())
            check_size(image.size, config)
            if captions:
                captions[index]  # the weights may not fit
        except BadSample as error:
            return error
        return _Good(image.size, notes, _number(data))

    numbers = iter(tqdm(range(len(source.rows)), desc=config.split, unit="image"))
    with ThreadPoolExecutor(max(1, config.num_workers)) as threads:
        while part := list(islice(numbers, AT_ONCE)):
            yield from zip(part, threads.map(look, part), strict=True)


def _repeated(names: Iterable[str]) -> list[int]:
    """The places of names that came before; eight bytes a name are kept, not the names."""
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
