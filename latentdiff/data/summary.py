"""Summarises the data of a training run, in counts and example captions, for the run's report."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.data.cache import LatentCache
from latentdiff.data.check import SUMMARY
from latentdiff.data.decode import BadSample
from latentdiff.data.opening import ImageDataset
from latentdiff.formats.weights import load_json

MAX_READ = 2000  # evenly spaced samples whose captions are read
EXAMPLES = 8


def images_summary(dataset: ImageDataset, *, num_val: int | None = None) -> dict[str, Any]:
    """Summarise a data set of images, with the keys of `cache_summary`.

    `num_val` is the size of the validation split, None for a training without one. A stream's
    summary has only `data` and the result of `latentdiff data check`.
    """
    config = dataset.config
    summary: dict[str, Any] = {"data": config.data}
    if dataset.captions is not None:
        summary |= {
            "samples": dataset.num_samples,
            **({} if num_val is None else {"num_val": num_val}),
            "left_out": dict(dataset.left_out),
            "sizes": {f"{config.image_size}x{config.image_size}": dataset.num_samples},
            **_captions(dataset.captions),
        }
    return summary | {"check": _checked(Path(config.location()))}


def cache_summary(cache: LatentCache, data: str, *, num_val: int = 0) -> dict[str, Any]:
    """Summarise a latent cache, of which `num_val` samples are the validation split.

    The summary has the numbers of samples, of their variants, of samples of each size and of
    samples that were left out for each reason; the spread of the captions' number and length, and
    some captions; and, if `data` is on disk, the result of `latentdiff data check`.
    """
    counts = np.bincount(cache.buckets, minlength=len(cache.sizes)).tolist()
    return {
        "data": data,
        "samples": len(cache),
        "num_val": num_val,
        "variants": cache.crop_flip.num_variants,
        "left_out": cache.header["left_out"],
        "sizes": {f"{w}x{h}": count for (w, h), count in zip(cache.sizes, counts, strict=True)},
        **_captions(cache.captions),
        "check": _checked(Path(data)),
    }


def _captions(captions: Sequence[list[str]]) -> dict[str, Any]:
    count = min(len(captions), MAX_READ)
    read = list[list[str]]()
    for i in range(count):
        with suppress(BadSample):  # training reports weights that do not fit
            read.append(captions[i * len(captions) // count])
    shown = [read[i * len(read) // EXAMPLES] for i in range(EXAMPLES) if read]
    return {
        "captions_each": _spread([len(texts) for texts in read]),
        "characters_each": _spread([len(text) for texts in read for text in texts]),
        "captions": list(dict.fromkeys(texts[0] for texts in shown if texts)),
    }


def _checked(data: Path) -> dict[str, Any]:
    """Read the summary that `latentdiff data check` wrote; {} without one."""
    path = (data if data.is_dir() else data.parent) / SUMMARY
    if not path.is_file():
        return {}
    summary = load_json(path)
    summary.pop("data", None)
    return summary


def _spread(numbers: Sequence[int]) -> dict[str, float]:
    if not numbers:
        return {}
    low, median, high = np.quantile(numbers, [0, 0.5, 1]).tolist()
    return {"min": low, "median": median, "max": high}
