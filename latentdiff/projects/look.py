"""Looks at data before a project is made of it: how many images, how large, which captions."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from latentdiff.data.bad_samples import (
    BAD_SAMPLES,
    ListedBadSamples,
    advice,
    breakdown,
    read_bad_samples,
)
from latentdiff.data.caption_lengths import some_captions
from latentdiff.data.check import Summary, check_data
from latentdiff.data.config import DataConfig
from latentdiff.data.dataset import index_captions, open_captioned
from latentdiff.data.forms.detect import open_index

SIZES = (32, 64, 128, 256, 512)
LARGEST = {False: 64, True: 256}
"""The largest size that is chosen: on CPUs, and on a GPU."""
ENLARGED = 2.0  # the most that an image is enlarged; smaller ones are bad samples
DENSE = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI")
PLAIN_NAMES = ("text", "caption", "captions", "prompt", "description")
NUM_PROMPTS = 8


@dataclass(frozen=True)
class Look:
    """What was found in the split `train`."""

    config: DataConfig
    """The options of data that fit, `max_bad` among them."""
    num_images: int
    """Those that can be trained on."""
    summary: Summary
    writing: dict[str, int]
    """How many captions are written in each script, such as LATIN or CJK."""
    longest: int
    """Characters that all but one caption in twenty have at most."""
    tokens: int
    """The same in tokens, about: one for three letters, or for a character of DENSE writing."""
    prompts: list[str]
    """Some captions, to draw by in the end."""


def look_at(
    data: str,
    out: Path,
    *,
    gpu: bool,
    image_size: int | None = None,
    caption_columns: Sequence[str] | None = None,
) -> Look:
    """Decode every image once and choose the options of data; the check's files go into `out`.

    Raises ValueError for data that cannot be read or has no captions, for fewer than four images
    that can be used, and for an image_size that is not one of SIZES.
    """
    if image_size is not None and image_size not in SIZES:
        raise ValueError(f"image_size={image_size} must be one of {', '.join(map(str, SIZES))}")
    columns = find_columns(data) if caption_columns is None else tuple(caption_columns)
    config = DataConfig(data=data, caption_columns=columns, image_size=1, max_bad=1)
    summary = check_data(config, out, split="train")
    if summary.samples - summary.bad < 4:
        why = f": {breakdown(summary.reasons)}" if summary.bad else ""
        raise ValueError(
            f"data={data!r} has {summary.samples - summary.bad} images that can be trained on, "
            f"and at least 4 are needed{why}"
        )
    side = summary.shorter_side
    if image_size is None:
        fitting = [s for s in SIZES if s <= LARGEST[gpu] and s <= ENLARGED * side["p05"]]
        image_size = max(fitting, default=SIZES[0])
    # Only as much as is needed: what is enlarged is blurred.
    limit = min(ENLARGED, max(1.0, image_size / side["min"]))
    config = replace(config, image_size=image_size, upscale_limit=limit)
    if side["min"] * limit < image_size:
        summary = check_data(config, out, split="train")
    num_images = summary.samples - summary.bad
    share = summary.bad / summary.samples
    allowed = float(advice(summary.bad, summary.samples).rpartition(" ")[2])
    config = replace(config, max_bad=max(0.01, allowed) if share > 0.01 else 0.01)
    if num_images < 4:
        raise ValueError(
            f"data={data!r} has {num_images} images of {image_size} pixels, and at least 4 are "
            f"needed: {breakdown(summary.reasons)}; choose a smaller --image_size"
        )
    texts = _texts(replace(config, bad_samples=out / BAD_SAMPLES))
    count = min(NUM_PROMPTS, len(texts))
    return Look(
        config=config,
        num_images=num_images,
        summary=summary,
        writing=dict(Counter(map(script, texts)).most_common()),
        longest=int(summary.caption_lengths.get("p95", 0)),
        tokens=4 + int(np.quantile([_num_tokens(text) for text in texts], 0.95)),
        prompts=[texts[i * len(texts) // count] for i in range(count)],
    )


def find_columns(data: str) -> tuple[str, ...]:
    """The columns with captions: `text` and its languages, such as text_zh, or a usual name.

    Raises ValueError, saying how captions are given, where there is none.
    """
    config = DataConfig(data=data)
    columns = open_index(config.location(), config.split, columns=()).columns
    languages = [name for name in columns if name == "text" or name.startswith("text_")]
    found = languages or [name for name in PLAIN_NAMES if name in columns][:1]
    if not found:
        others = [name for name in columns if name not in ("image", "file_name")]
        named = f"; --caption_columns names one of {others}" if others else ""
        raise ValueError(
            f"data={data!r} has no captions: write a .txt beside each image, 1.txt for 1.png, or "
            'metadata.jsonl with rows such as {"file_name": "1.png", "text": "a cat"}' + named
        )
    return tuple(found)


def script(text: str) -> str:
    """The writing of most letters, by Unicode's names: LATIN, CJK, CYRILLIC, …; OTHER of none."""
    words = (unicodedata.name(letter, "OTHER").split()[0] for letter in text if letter.isalpha())
    return _most(words) or "OTHER"


def _num_tokens(text: str) -> int:
    return len(text) if script(text) in DENSE else len(text) // 3


def _texts(config: DataConfig) -> list[str]:
    """Captions of the images that are not in the list of bad samples."""
    index, listed = open_captioned(config), ListedBadSamples(read_bad_samples(config))
    names = index.names() if listed.reasons else ()
    bad = {row for row, name in enumerate(names) if listed.reason(name) is not None}
    return some_captions(index_captions(index, config), without=bad)


def _most(words: Iterable[str]) -> str | None:
    counted = Counter(words).most_common(1)
    return counted[0][0] if counted else None
