"""Read a network's weights from its folder: one file, or the shards that an index lists.

diffusers and transformers use the same file names. A variant, such as `fp16`, is a second set of
weights beside the plain one; diffusers has changed the name of the index of its shards.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from latentdiff.formats.header import Header, name_repr, pickle_message, read_header, short_repr
from latentdiff.formats.weights import load_files, load_json

PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
MAX_SHARDS = 1000

_VARIANT = r"[A-Za-z0-9_]+"
_SHARD = re.compile(r"[A-Za-z0-9_.-]+\.safetensors")  # no separator, so always in the same folder


def load_weights(
    folder: Path,
    stem: str,
    *,
    variant: str | None = None,
    expected: Mapping[str, Tensor] | None = None,
    optional: Callable[[str], bool] | None = None,
    rename: Callable[[str], str] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Read a network's weights from its folder: `<stem>[.variant].safetensors`, or its shards.

    `expected`, `optional`, `rename` and `dtype` are those of `load_safetensors`. Raises ValueError
    as it does, and where there are no such weights, naming the variants that there are; where a
    shard is missing, lies outside the folder or differs from what the index says of it.
    """
    source, headers = read_headers(folder, stem, variant)
    return load_files(
        headers, source, expected=expected, optional=optional, rename=rename, dtype=dtype
    )


def read_headers(folder: Path, stem: str, variant: str | None) -> tuple[Path, dict[Path, Header]]:
    """Find a folder's weights: the file or index, and the header of each file.

    Raises ValueError as `load_weights` does.
    """
    folder = Path(folder)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    variants = find_variants(names, stem)
    if variant not in variants:
        raise ValueError(missing_weights_message(folder, stem, variant, names))
    source = folder / variants[variant]
    if source.suffix == ".json":
        return source, _read_shard_headers(source)
    return source, {source: read_header(source)}


def find_variants(names: Iterable[str], stem: str) -> dict[str | None, str]:
    """Map each variant among a folder's files to its file or index; None is the plain weights.

    A single file goes before shards.
    """
    forms = (
        rf"{stem}(?:\.(?P<variant>{_VARIANT}))?\.safetensors",
        rf"{stem}\.safetensors\.index(?:\.(?P<variant>{_VARIANT}))?\.json",
        rf"{stem}\.safetensors(?:\.(?P<variant>{_VARIANT}))\.index\.json",  # diffusers before 0.30
    )
    names = sorted(names)
    variants: dict[str | None, str] = {}
    for form in forms:
        for name in names:
            if match := re.fullmatch(form, name):
                variants.setdefault(match["variant"], name)
    return variants


def describe_variants(variants: Iterable[str | None]) -> str:
    """The variants that there are, as a message lists them."""
    return ", ".join(sorted({variant or "plain" for variant in variants})) or "none"


def missing_weights_message(
    folder: Path, stem: str, variant: str | None, names: Iterable[str]
) -> str:
    """The error message for missing weights: what the folder holds instead."""
    file = f"{stem}.safetensors" if variant is None else f"{stem}.{variant}.safetensors"
    variants = find_variants(names, stem)
    if variants:
        return f"{folder / file}: no such file; variants found: {describe_variants(variants)}"
    pickles = sorted(name for name in names if name.lower().endswith(PICKLE_SUFFIXES))
    if pickles:
        return pickle_message(folder / pickles[0])
    return f"{folder / file}: no such file; expected weights as safetensors"


def _read_shard_headers(index: Path) -> dict[Path, Header]:
    """The headers of an index's shards; ValueError unless they hold the tensors that it lists."""
    weight_map = load_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map must be an object that gives each tensor its file")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise ValueError(
                f"{index}: tensor {name_repr(name)} is in {short_repr(shard)}; allowed: "
                ".safetensors files in the same folder"
            )
        shards.setdefault(shard, set()).add(name)
    if len(shards) > MAX_SHARDS:
        raise ValueError(f"{index}: names {len(shards)} shards, more than {MAX_SHARDS}")
    headers = {}
    for shard, names in shards.items():
        path = index.parent / shard
        if not _is_inside_folder(path):
            raise ValueError(f"{path}: is a link to outside its folder")
        headers[path] = read_header(path)
        wrong = names ^ headers[path].shapes.keys()
        if wrong:
            first = min(wrong)
            says = "is not there, as the index says" if first in names else "is not in the index"
            raise ValueError(f"{path}: tensor {name_repr(first)} {says}")
    return headers


def _is_inside_folder(path: Path) -> bool:
    """Whether a file, or what it links to, lies in its folder or in huggingface_hub's cache of it.

    In that cache `snapshots/<commit>/unet/file` is a link to `blobs/<hash>`.
    """
    folder, target = path.parent.resolve(), path.resolve().parent
    blobs = [parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots"]
    return target == folder or target in blobs
