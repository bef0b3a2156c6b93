"""A finished latent cache and the data it was made of: what differs, and captions read anew.

Encoding takes hours and captions are edited: images are known again by the digests of their files,
and are neither decoded nor encoded.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from latentdiff.data.cache import LatentCache
from latentdiff.data.cache_chunks import SAMPLES, SAMPLES_FILE
from latentdiff.data.captions import counted
from latentdiff.data.config import DataConfig
from latentdiff.data.crop_flip import CropFlip
from latentdiff.data.decode import BadSample
from latentdiff.data.opening import open_images
from latentdiff.data.samples import EncodedSample, digest
from latentdiff.formats.weights import replacing

OF_IMAGES = (
    *("image_size", "bucket_step", "max_aspect", "upscale_limit"),
    *("background", "max_megapixels", "first_frame"),
)
"""Options of data that decide latents; the others decide which samples there are, and captions."""
ADVICE = "choose a new folder or delete this one"
NOT_NOTED = ("num_workers", "shuffle_buffer", "max_bad")


def noted_options(config: DataConfig) -> dict[str, Any]:
    """The options that a cache notes, as JSON gives them back."""
    names = [one.name for one in fields(config) if one.name not in NOT_NOTED]
    text = json.dumps({name: getattr(config, name) for name in names}, default=str)
    return json.loads(text)


def check_same(
    folder: Path, before: Mapping[str, Any], after: Mapping[str, Any], *, finished: bool
) -> None:
    """Raise ValueError, with what has changed, when a cache was made of other inputs.

    Captions and data may differ from those of a finished cache, which is given new captions.
    """
    changed = ["its VAE is another"] if before["vae"] != after["vae"] else []
    noted = "options" in before  # not by older versions
    old, new = _flat(before, noted), _flat(after, noted)
    for name, value in new.items():
        free = finished and name in after["options"] and name not in OF_IMAGES
        if name in old and old[name] != value and not free:
            changed.append(f"{name} was {old[name]!r} and is {value!r}")
    if not changed and before["data"] != after["data"] and not (finished and noted):
        changed.append("files of its data have changed" if noted else "its data is another")
    if not (noted or finished):
        changed.append("another version of latentdiff began it")
    if changed:
        raise ValueError(f"{folder} holds another cache: {'; '.join(changed)}; {ADVICE}")


def _flat(inputs: Mapping[str, Any], noted: bool) -> dict[str, Any]:
    views = vars(CropFlip(**inputs["views"]))
    flat = {"format": inputs["format"], "chunk_size": inputs["chunk_size"], **views}
    return flat | (inputs["options"] if noted else {"buckets": inputs["buckets"]})


def renew_captions(
    folder: Path,
    samples: Iterable[EncodedSample | BadSample],
    why_bad: Callable[[EncodedSample], BadSample | None],
) -> tuple[int, list[BadSample]]:
    """Rewrite the captions of a finished cache; returns how many images have others now, and the
    samples that are bad.

    `samples` are those of its data, in order, and `why_bad` tells why one cannot be encoded.
    Raises ValueError, naming the first, for images that are not those of the cache.
    """
    changed, bad = 0, list[BadSample]()
    path = folder / SAMPLES_FILE
    with pa.OSFile(str(path)) as source:
        lengths = [batch.num_rows for batch in pa.ipc.open_stream(source)]
    with (
        replacing(path) as temporary,
        pa.OSFile(str(path)) as source,
        pa.ipc.new_stream(str(temporary), SAMPLES) as writer,
    ):
        rows = (row for batch in pa.ipc.open_stream(source) for row in batch.to_pylist())
        pairs = _paired(folder, rows, samples, why_bad, bad)
        for length in lengths:  # so that the same captions again give the same file
            renewed = list[dict[str, Any]]()
            for row, sample in islice(pairs, length):
                texts, counts = counted(sample.captions)
                changed += (texts, counts) != (row["captions"], row["counts"])
                renewed.append(row | {"captions": texts, "counts": counts})
            writer.write_table(pa.Table.from_pylist(renewed, SAMPLES))
        assert next(pairs, None) is None
    return changed, bad


def changed_data(cache: LatentCache) -> str | None:
    """The data of a cache if it is here and other than when the cache was made of it, else None."""
    options = cache.header.get("options")  # of older versions there are none
    if options is None or options["data"] == "shapes" or not Path(options["data"]).exists():
        return None
    bad_samples = options["bad_samples"]
    options = options | {"bad_samples": None if bad_samples is None else Path(bad_samples)}
    try:
        dataset = open_images(DataConfig(**options, max_bad=1.0))
    except ValueError:  # such as a column that is gone
        return options["data"]
    return None if dataset.fingerprint == cache.header["data"] else options["data"]


def _paired(
    folder: Path,
    rows: Iterator[dict[str, Any]],
    samples: Iterable[EncodedSample | BadSample],
    why_bad: Callable[[EncodedSample], BadSample | None],
    bad: list[BadSample],
) -> Iterator[tuple[dict[str, Any], EncodedSample]]:
    """Each row of a cache with its sample of the data; bad samples have none, and go to `bad`."""
    row = next(rows, None)
    for sample in samples:
        if isinstance(sample, BadSample):
            bad.append(sample)
        elif row is not None and _is_of(sample, row):
            yield row, sample
            row = next(rows, None)
        elif (fault := why_bad(sample)) is not None:
            bad.append(fault)
        else:
            there = "no more" if row is None else repr(row["name"])
            what = f"{sample.name!r} stands where the cache has {there}"
            if row is not None and sample.name == row["name"]:
                what = f"{sample.name!r} is another image"
            raise ValueError(f"{folder} was made of other images: {what}; {ADVICE}")
    if row is not None:
        raise ValueError(f"{folder} was made of other images: {row['name']!r} is gone; {ADVICE}")


def _is_of(sample: EncodedSample, row: Mapping[str, Any]) -> bool:
    try:
        return sample.name == row["name"] and digest(sample.read()) == row["digest"]
    except BadSample:  # its file cannot be read
        return False
