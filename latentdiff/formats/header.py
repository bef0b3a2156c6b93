"""The header of a safetensors file, checked in full before any tensor is read.

The format is eight bytes with the header's length, the header as JSON, then the tensors' bytes.
safetensors' own reader accepts a name that occurs twice, and any number of tensors.
"""

import json
import math
import os
import re
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from latentdiff.formats.stand_in import stand_in

# A full SD 2.1 has 1,700 tensors in a header of 200 kB; metadata may hold a tokenizer or an image.
MAX_HEADER_BYTES = 16_000_000
MAX_TENSORS = 50_000
MAX_DIMENSIONS = 8

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Header:
    """Shape, dtype and byte range of each tensor of a file, by name; and the metadata."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    byte_ranges: dict[str, tuple[int, int]]
    """Begin and end of each tensor, counted from the start of the file."""
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file.

    Raises ValueError if the file is missing, is truncated, names a tensor twice or holds more than
    any model does; for a pickled checkpoint, the message names the command that converts one.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected weights as safetensors")
    with path.open("rb") as file:
        try:
            return _parse(file)
        except ValueError as error:
            # Only now: a safetensors header's length may have the same bytes as a pickle's start.
            file.seek(0)
            start = file.read(100)
            if start.startswith(b"PK\x03\x04") or start[:1] == b"\x80":
                raise ValueError(pickle_message(path)) from error
            wrong = stand_in(start) or f"is not a whole safetensors file ({error})"
            if path.suffix == ".json":
                wrong = f"is JSON; give the model's folder, {path.parent}"
            raise ValueError(f"{path}: {wrong}") from error


def pickle_message(path: Path) -> str:
    """The error message for a pickled checkpoint."""
    return (
        f"{path}: is a pickled checkpoint, which can run code when it is opened; only safetensors "
        "files are read, and `latentdiff convert --unsafe_pickle` makes one of it"
    )


def parse_json(text: bytes) -> Any:
    """JSON in which no object has a key twice; ValueError, also where it is nested too deep."""
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
        if b"\\u" in text:
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except UnicodeEncodeError:
        raise ValueError("it has half of a character that \\u writes in two") from None
    return content


def short_repr(value: object) -> str:
    """The repr of a value from a file, cut to a length that an error message can hold."""
    return " ".join(_REPR.repr(value).split())  # an array has lines


def name_repr(name: str) -> str:
    """A tensor's name for an error message: unquoted if it has only the usual characters."""
    return name if re.fullmatch(r"[\w.\-/]{1,200}", name) else short_repr(name)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 120
_REPR.maxlist = _REPR.maxtuple = 12


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {short_repr(twice)} is there twice")
    return content


def _parse(file: BinaryIO) -> Header:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"its {size} bytes are fewer than its header asks for")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header of {length} bytes is over the limit of {MAX_HEADER_BYTES}")
    content = parse_json(file.read(length))
    if not isinstance(content, dict):
        raise ValueError("its header is not a JSON object")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata is not an object of texts")
    if len(content) > MAX_TENSORS:
        raise ValueError(f"its {len(content)} tensors are over the limit of {MAX_TENSORS}")

    shapes, dtypes, byte_ranges = {}, {}, {}
    for name, entry in content.items():
        shapes[name], dtypes[name], (begin, end) = _entry(name, entry)
        byte_ranges[name] = (begin + 8 + length, end + 8 + length)
    # Each byte belongs to one tensor: nothing overlaps, nothing is left over.
    position = 8 + length
    for name, (begin, end) in sorted(byte_ranges.items(), key=lambda item: item[1]):
        if begin != position:
            raise ValueError(
                f"tensor {name_repr(name)} does not begin where the one before it ends"
            )
        position = end
    if position != size:
        raise ValueError(f"its tensors end at byte {position} of {size}")
    return Header(shapes, dtypes, byte_ranges, metadata)


def _entry(name: str, entry: object) -> tuple[tuple[int, ...], torch.dtype, tuple[int, int]]:
    """Shape, dtype and offsets of one tensor, which agree with each other."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name_repr(name)} is described by {short_repr(entry)}")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ValueError(
            f"tensor {name_repr(name)} has dtype {short_repr(entry['dtype'])}; "
            f"allowed: {', '.join(DTYPES)}"
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(
            f"tensor {name_repr(name)} has shape {short_repr(shape)} and data_offsets "
            f"{short_repr(offsets)}; both must be lists of whole numbers from 0 on"
        )
    # torch multiplies the other sides even where one of them is 0.
    if len(shape) > MAX_DIMENSIONS or math.prod(max(side, 1) for side in shape) >= 2**48:
        raise ValueError(f"tensor {name_repr(name)} has the shape {short_repr(shape)}")
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise ValueError(
            f"tensor {name_repr(name)} of shape {shape} does not fill the bytes {offsets[0]} "
            f"to {offsets[1]} that it has"
        )
    return tuple(shape), dtype, (offsets[0], offsets[1])


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    )
