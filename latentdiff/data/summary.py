"""What a training is trained on, in numbers and examples: for the report of its run."""

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

MAX_READ = 2000  # samples whose captions are read, evenly spaced
EXAMPLES = 8


def images_summary(dataset: ImageDataset, *, num_val: int | None = None) -> dict[str, Any]:
    """The summary of images; see `cache_summary`.

    `num_val` is the size of the validation split, None for a training that has none. Of a stream
    nothing is known beforehand but what `latentdiff data check` has written.
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
    """The summary of latents, of which `num_val` are the validation split.

    How many samples there are, of which sizes, how many are left out for which reason, how many
    captions they have and of how many characters, some captions, and, if `data` is on
    disk, what `latentdiff data check` has written.
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
        with suppress(BadSample):  # weights that do not fit: training will say so
            read.append(captions[i * len(captions) // count])
    shown = [read[i * len(read) // EXAMPLES] for i in range(EXAMPLES) if read]
    return {
        "captions_each": _spread([len(texts) for texts in read]),
        "characters_each": _spread([len(text) for texts in read for text in texts]),
        "captions": list(dict.fromkeys(texts[0] for texts in shown if texts)),
    }


def _checked(data: Path) -> dict[str, Any]:
    """What `latentdiff data check` has written, if the data is on disk."""
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
