"""What a safetensors file says it holds, checked in full before any tensor is read.

The form: eight bytes with the header's length, the header as JSON, then the numbers. safetensors'
own reader takes a name that is there twice, and as many tensors as a file cares to name.
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
    """Names of all tensors of a file, each with its shape, dtype and place; and the metadata."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    places: dict[str, tuple[int, int]]
    """First byte of each tensor and the first after it, counted from the start of the file."""
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read what a safetensors file holds, without its numbers.

    Raises ValueError if the file is missing, is not whole, names a tensor twice or holds more than
    any model does; for a pickled checkpoint with the command that converts one.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected weights as safetensors")
    with path.open("rb") as file:
        try:
            return _parse(file)
        except ValueError as error:
            # Asked only now: a safetensors file may begin with the same bytes, its header's length.
            file.seek(0)
            start = file.read(4)
            if start == b"PK\x03\x04" or start[:1] == b"\x80":
                raise ValueError(refuse_pickle(path)) from error
            raise ValueError(f"{path}: is not a whole safetensors file ({error})") from error


def refuse_pickle(path: Path) -> str:
    """The sentence that refuses a pickled checkpoint."""
    return (
        f"{path}: is a pickled checkpoint, which can run code when it is opened; only safetensors "
        "files are read, and `latentdiff convert --unsafe_pickle` makes one of it"
    )


def parse_json(text: bytes) -> Any:
    """JSON in which no object has a key twice; ValueError, also where it is nested too deep."""
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        if b"\\u" in text:
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except UnicodeEncodeError:
        raise ValueError("it has half of a character that \\u writes in two") from None
    return content


def shown(value: object) -> str:
    """A value from a file as a message shows it: in one line, and not longer than a few."""
    return _REPR.repr(value)


def named(name: str) -> str:
    """A tensor's name as a message shows it: as it is, if it is such as tensors have."""
    return name if re.fullmatch(r"[\w.\-/]{1,200}", name) else shown(name)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 120
_REPR.maxlist = _REPR.maxtuple = 12


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {shown(twice)} is there twice")
    return found


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

    shapes, dtypes, places = {}, {}, {}
    for name, entry in content.items():
        shapes[name], dtypes[name], (begin, end) = _entry(name, entry)
        places[name] = (begin + 8 + length, end + 8 + length)
    # Each byte belongs to one tensor: nothing overlaps, nothing is left over.
    position = 8 + length
    for name, (begin, end) in sorted(places.items(), key=lambda item: item[1]):
        if begin != position:
            raise ValueError(f"tensor {named(name)} does not begin where the one before it ends")
        position = end
    if position != size:
        raise ValueError(f"its tensors end at byte {position} of {size}")
    return Header(shapes, dtypes, places, metadata)


def _entry(name: str, entry: object) -> tuple[tuple[int, ...], torch.dtype, tuple[int, int]]:
    """Shape, dtype and offsets of one tensor, which agree with each other."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {named(name)} is described by {shown(entry)}")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise ValueError(
            f"tensor {named(name)} has dtype {shown(entry['dtype'])}; allowed: {', '.join(DTYPES)}"
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise ValueError(
            f"tensor {named(name)} has shape {shown(shape)} and data_offsets {shown(offsets)}; "
            "both must be lists of whole numbers from 0 on"
        )
    # Also where a zero leaves no numbers at all, torch multiplies the rest.
    if len(shape) > MAX_DIMENSIONS or math.prod(max(side, 1) for side in shape) >= 2**48:
        raise ValueError(f"tensor {named(name)} has the shape {shown(shape)}")
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise ValueError(
            f"tensor {named(name)} of shape {shape} does not fill the bytes {offsets[0]} "
            f"to {offsets[1]} that it has"
        )
    return tuple(shape), dtype, (offsets[0], offsets[1])


def _counts(values: object) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    )
