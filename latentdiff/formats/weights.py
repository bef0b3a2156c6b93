"""Weights and configurations on disk: safetensors and JSON, nothing else, written atomically.

Pickled checkpoints (.ckpt, .pt, .bin) run code when they are opened, so nothing here reads one.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


def load_safetensors(path: Path, *, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Read every tensor of a safetensors file, by name; the content decides, not the extension.

    Raises ValueError if the file is missing, is not safetensors or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected weights as safetensors")
    try:
        return load_file(path, device=str(device))
    except SafetensorError as error:
        # Asked only now: a safetensors file may begin with the same bytes, its header's length.
        with path.open("rb") as file:
            start = file.read(4)
        if start == b"PK\x03\x04" or start[:1] == b"\x80":
            raise ValueError(
                f"{path}: is a pickled checkpoint, which can run code when it is opened; "
                "only safetensors files are read"
            ) from error
        raise ValueError(f"{path}: is not a whole safetensors file ({error})") from error


def save_safetensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors: whoever opens `path` sees the old file or the new, whole.

    `metadata` is kept in the file's header beside `format: pt`, which transformers asks for.
    """
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with _replacing(Path(path)) as temporary:
        save_file(contiguous, temporary, metadata={"format": "pt", **(metadata or {})})


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; ValueError names the file if it is missing or is anything else."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a JSON object")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a JSON {type(content).__name__}, expected an object")
    return content


def save_json(content: Mapping[str, Any], path: Path) -> None:
    """Write an object as readable JSON with sorted keys (as diffusers does), atomically."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    with _replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; once it is on disk, it takes `path`'s place.

    The temporary file is in the same folder because os.replace is atomic only within one file
    system, and it is synchronised first because otherwise a power cut leaves an empty file under
    the final name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.touch()
    mode = temporary.stat().st_mode  # what the user's umask gives; safetensors would leave 0600
    try:
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
