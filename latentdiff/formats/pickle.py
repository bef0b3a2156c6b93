"""Pickled checkpoints (.ckpt, .pt, .bin), read for one purpose: to be written as safetensors.

Nothing else unpickles. torch's restricted unpickler (`weights_only=True`) builds tensors and plain
containers and refuses the rest; it has had holes (CVE-2025-32434 before torch 2.6, CVE-2026-24747
before 2.10), so that nobody comes here without having asked for it by name.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from latentdiff.formats.diffusers import find_stems
from latentdiff.formats.header import MAX_TENSORS, named, shown
from latentdiff.formats.hub import NOT_WEIGHTS
from latentdiff.formats.shards import PICKLES
from latentdiff.formats.weights import save_safetensors


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a pickled checkpoint by name, on the CPU; all else in it is dropped.

    Of a checkpoint of a training those of its `state_dict`. Raises ValueError if the file is no
    such checkpoint, or asks for anything but tensors to be built.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a pickled checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken file makes of the unpickler
        raise ValueError(
            f"{path}: holds more than tensors, or is no checkpoint, and was not opened "
            f"({str(error).splitlines()[0]})"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds {shown(type(content).__name__)}, not tensors by name")
    tensors = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if not 0 < len(tensors) <= MAX_TENSORS:
        raise ValueError(f"{path}: holds {len(tensors)} tensors; allowed: 1 to {MAX_TENSORS}")
    return _own_memory(tensors, path)


def convert_pickle(path: Path, out: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write the tensors of a pickled checkpoint as safetensors, under the same names.

    `dtype` is what floating-point numbers become. Raises ValueError as `read_pickle` does.
    """
    tensors = read_pickle(path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[name] = tensor.to(dtype or tensor.dtype)
    save_safetensors(tensors, out)


def convert_pickled_folder(folder: Path, out: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a pipeline folder whose weights are pickles as one with safetensors.

    Only what a pipeline is read from is taken over. Raises ValueError as `read_pickle` does, and
    where a part has not one file of pickled weights.
    """
    weights, stems = {}, find_stems(folder)
    for part, stem in stems.items():
        former = "pytorch_model" if stem == "model" else stem  # transformers' name
        weights[part] = next(
            (path for end in PICKLES if (path := folder / part / f"{former}{end}").is_file()), None
        )
        if weights[part] is None:
            raise ValueError(f"{folder / part} holds no {former}.bin")
    for part, path in weights.items():
        convert_pickle(path, out / part / f"{stems[part]}.safetensors", dtype=dtype)
    for pattern in NOT_WEIGHTS:
        for path in folder.glob(pattern):
            target = out / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _own_memory(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors, none sharing memory with another, as safetensors asks.

    A few bytes can be viewed as a tensor of any size, which copying would make real.
    """
    size = path.stat().st_size
    if sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()) > 2 * size:
        raise ValueError(f"{path}: its tensors would take more than twice its {size} bytes")
    seen = set()
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise ValueError(f"{path}: tensor {named(name)} is sparse or quantized")
        memory = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if memory in seen else tensor.contiguous()
        seen.add(memory)
    return tensors
