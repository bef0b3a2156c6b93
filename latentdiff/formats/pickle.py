"""Convert pickled checkpoints (.ckpt, .pt, .bin) to safetensors; no other module unpickles.

torch's restricted unpickler (`weights_only=True`) builds tensors and plain containers and refuses
the rest. It has had holes (CVE-2025-32434 before torch 2.6, CVE-2026-24747 before 2.10), so that
only an option that says so by its name, `--unsafe-pickle`, leads here, and the weights of a judge,
whose SHA-256 is compared first (evaluation/network.py).
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from latentdiff.formats.diffusers import find_stems
from latentdiff.formats.header import MAX_TENSORS, name_repr, short_repr
from latentdiff.formats.hub import CONFIG_PATTERNS
from latentdiff.formats.sharded_weights import PICKLE_SUFFIXES
from latentdiff.formats.weights import check_tensors, save_safetensors


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a pickled checkpoint by name, on the CPU; all else in it is dropped.

    If the file is a training checkpoint with a `state_dict`, its tensors are read. Raises
    ValueError if the file is no checkpoint, holds objects that are not tensors or containers, or
    tensors further inside, which would be lost.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a pickled checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file can make the unpickler raise anything
        raise ValueError(
            f"{path}: holds more than tensors, or is no checkpoint, and was not opened "
            f"({str(error).splitlines()[0]})"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds {short_repr(type(content).__name__)}, not tensors by name")
    tensors = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    inside = [
        name
        for name, value in content.items()
        if isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())
    ]
    if inside:
        raise ValueError(
            f"{path}: holds {len(tensors)} tensors and others inside {short_repr(inside[0])}; only "
            "tensors by name are read, or those of a state_dict"
        )
    if not 0 < len(tensors) <= MAX_TENSORS:
        raise ValueError(f"{path}: holds {len(tensors)} tensors; allowed: 1 to {MAX_TENSORS}")
    return _unshare_memory(tensors, path)


def convert_pickle(path: Path, out: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write the tensors of a pickled checkpoint as safetensors, under the same names.

    `dtype` is what floating-point numbers become. Raises ValueError as `read_pickle` does, and for
    numbers that are too large for `dtype`. Those that are infinite already stay so: LDM's tables
    of a schedule that ends in pure noise are, and nothing reads them.
    """
    tensors = read_pickle(path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and dtype is not None:
            if tensor.isfinite().all():
                check_tensors({name: tensor}, out, dtype)
            tensors[name] = tensor.to(dtype)
    save_safetensors(tensors, out)


def convert_pickled_folder(folder: Path, out: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a pipeline folder whose weights are pickles as one with safetensors.

    Only the files that a pipeline is read from are copied. Raises ValueError as `read_pickle` does,
    and where a component has no file of pickled weights.
    """
    weights, stems = {}, find_stems(folder)
    for component, stem in stems.items():
        former = "pytorch_model" if stem == "model" else stem  # transformers' name
        weights[component] = next(
            (
                path
                for end in PICKLE_SUFFIXES
                if (path := folder / component / f"{former}{end}").is_file()
            ),
            None,
        )
        if weights[component] is None:
            raise ValueError(f"{folder / component} holds no {former}.bin")
    for component, path in weights.items():
        convert_pickle(path, out / component / f"{stems[component]}.safetensors", dtype=dtype)
    for pattern in CONFIG_PATTERNS:
        for path in folder.glob(pattern):
            target = out / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _unshare_memory(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors, none sharing memory with another, as safetensors asks.

    A few bytes can be viewed as a tensor of any size, which a copy would allocate.
    """
    size = path.stat().st_size
    if sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()) > 2 * size:
        raise ValueError(f"{path}: its tensors would take more than twice its {size} bytes")
    seen = set()
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise ValueError(f"{path}: tensor {name_repr(name)} is sparse or quantized")
        memory = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if memory in seen else tensor.contiguous()
        seen.add(memory)
    return tensors
