"""The files of a folder that hold a network's weights: one, or the shards that an index names.

diffusers and transformers name both alike. A variant, such as `fp16`, is a second set of weights
beside the plain one; the index of its shards has one name today and had another before.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from latentdiff.formats.header import Header, named, read_header, refuse_pickle, shown
from latentdiff.formats.weights import load_files, load_json

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
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

    `expected` and what follows are those of `load_safetensors`. Raises ValueError as it does, and
    where there are no such weights, naming the variants that there are; where a shard is missing,
    lies outside the folder or does not hold just what the index says.
    """
    whole, headers = read_headers(folder, stem, variant)
    return load_files(
        headers, whole, expected=expected, optional=optional, rename=rename, dtype=dtype
    )


def read_headers(folder: Path, stem: str, variant: str | None) -> tuple[Path, dict[Path, Header]]:
    """What a folder's weights are, without their numbers: file or index, and header of each file.

    Raises ValueError as `load_weights` does.
    """
    folder = Path(folder)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = find_variants(names, stem)
    if variant not in found:
        raise ValueError(refuse_missing(folder, stem, variant, names))
    whole = folder / found[variant]
    return whole, {whole: read_header(whole)} if whole.suffix != ".json" else _shards(whole)


def find_variants(names: Iterable[str], stem: str) -> dict[str | None, str]:
    """The sets of weights among a folder's files: variant -> file or index; None is the plain one.

    A single file goes before shards.
    """
    forms = (
        rf"{stem}(?:\.(?P<variant>{_VARIANT}))?\.safetensors",
        rf"{stem}\.safetensors\.index(?:\.(?P<variant>{_VARIANT}))?\.json",
        rf"{stem}\.safetensors(?:\.(?P<variant>{_VARIANT}))\.index\.json",  # diffusers before 0.30
    )
    names = sorted(names)
    found: dict[str | None, str] = {}
    for form in forms:
        for name in names:
            if match := re.fullmatch(form, name):
                found.setdefault(match["variant"], name)
    return found


def describe_variants(variants: Iterable[str | None]) -> str:
    """The variants that there are, as a message lists them."""
    return ", ".join(sorted({variant or "plain" for variant in variants})) or "none"


def refuse_missing(folder: Path, stem: str, variant: str | None, names: Iterable[str]) -> str:
    """The sentence that says what the folder holds instead of the weights asked for."""
    file = f"{stem}.safetensors" if variant is None else f"{stem}.{variant}.safetensors"
    found = find_variants(names, stem)
    if found:
        return f"{folder / file}: no such file; variants found: {describe_variants(found)}"
    pickles = sorted(name for name in names if name.lower().endswith(PICKLES))
    if pickles:
        return refuse_pickle(folder / pickles[0])
    return f"{folder / file}: no such file; expected weights as safetensors"


def _shards(index: Path) -> dict[Path, Header]:
    """The headers of the shards, once the index and they are found to say the same."""
    placed = load_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ValueError(f"{index}: weight_map must be an object that gives each tensor its file")
    shards: dict[str, set[str]] = {}
    for name, shard in placed.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise ValueError(
                f"{index}: tensor {named(name)} is in {shown(shard)}; allowed: .safetensors files "
                "in the same folder"
            )
        shards.setdefault(shard, set()).add(name)
    if len(shards) > MAX_SHARDS:
        raise ValueError(f"{index}: names {len(shards)} shards, more than {MAX_SHARDS}")
    headers = {}
    for shard, names in shards.items():
        path = index.parent / shard
        if not _stays(path):
            raise ValueError(f"{path}: is a link to outside its folder")
        headers[path] = read_header(path)
        wrong = names ^ headers[path].shapes.keys()
        if wrong:
            first = min(wrong)
            says = "is not there, as the index says" if first in names else "is not in the index"
            raise ValueError(f"{path}: tensor {named(first)} {says}")
    return headers


def _stays(path: Path) -> bool:
    """Whether a file lies in its folder, or in the cache of huggingface_hub that it is part of.

    There `snapshots/<commit>/unet/file` is a link to `blobs/<hash>`.
    """
    folder, target = path.parent.resolve(), path.resolve().parent
    blobs = [parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots"]
    return target == folder or target in blobs
