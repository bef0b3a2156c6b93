"""Weights as safetensors and configurations as JSON, one file each, written atomically.

Pickled checkpoints (.ckpt, .pt, .bin) can run code when they are opened, so nothing here reads one.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.formats.header import Header, name_repr, parse_json, read_header
from latentdiff.formats.stand_in import stand_in

MAX_JSON_BYTES = 16_000_000  # an index of 50,000 tensors, the most that we read, has 5 MB
_WIDE = (torch.bfloat16, torch.float32, torch.float64)  # what has a wider range than float16


def load_safetensors(
    path: Path,
    *,
    expected: Mapping[str, Tensor] | None = None,
    optional: Callable[[str], bool] | None = None,
    rename: Callable[[str], str] | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, by name, whatever the file's extension.

    expected: tensors (meta ones will do) with the names, the shapes and the kinds of number,
    floating-point or not, that the file must hold; compared with its header before any memory is
    taken for weights.
    optional: whether the file may hold a tensor that is not expected, by its name; it is not read.
    rename: our name for a name in the file; `expected` and `optional` use our names.
    dtype: what floating-point numbers become, one tensor after another.
    Raises ValueError if the file is missing, is not safetensors, is damaged, does not fit
    `expected` or holds NaN or infinity.
    """
    path = Path(path)
    return load_files(
        {path: read_header(path)},
        path,
        expected=expected,
        optional=optional,
        rename=rename,
        dtype=dtype,
    )


def load_files(
    headers: Mapping[Path, Header],
    source: Path,
    *,
    expected: Mapping[str, Tensor] | None,
    optional: Callable[[str], bool] | None,
    rename: Callable[[str], str] | None,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Read files that together hold the weights of a network, as `load_safetensors` reads one.

    All headers are checked before the first tensor is read. source: the path that error messages
    name, of the one file or of the index.
    """
    locations: dict[str, tuple[Path, str]] = {}  # by our name
    for path, header in headers.items():
        for name in header.shapes:
            ours = name if rename is None else rename(name)
            unexpected = expected is not None and ours not in expected
            if unexpected and optional is not None and optional(ours):
                continue
            if ours in locations:
                raise ValueError(f"{source}: tensor {name_repr(ours)} is there twice")
            locations[ours] = (path, name)
    if expected is not None:
        check_shapes(source, expected, {n: headers[p].shapes[k] for n, (p, k) in locations.items()})
        for ours, (path, name) in locations.items():
            if expected[ours].is_floating_point() != headers[path].dtypes[name].is_floating_point:
                raise ValueError(
                    f"{source}: tensor {ours} holds {headers[path].dtypes[name]} numbers"
                )
    tensors = {}
    with ExitStack() as stack:
        files = {path: stack.enter_context(path.open("rb")) for path in headers}
        for ours, (path, name) in locations.items():
            tensors[ours] = _read(files[path], headers[path], name, dtype)
    return tensors


def save_safetensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors, atomically: `path` is always the complete old or new file.

    `metadata` goes into the file's header beside `format: pt`, which transformers asks for.
    """
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with replacing(Path(path)) as temporary:
        save_file(contiguous, temporary, metadata={**(metadata or {}), "format": "pt"})


def to_write(
    tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The tensors on the CPU, with floating-point numbers as `dtype`; None leaves them as they are.

    Raises ValueError, naming the tensor and `path`, for numbers that no reader of ours takes: NaN,
    infinite ones, and those that would become infinite. Nothing should be written then.
    """
    check_tensors(tensors, path, dtype)
    return {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None)
        for name, tensor in tensors.items()
    }


def check_tensors(tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype | None) -> None:
    """Raise ValueError where `to_write` does."""
    for name, tensor in tensors.items():
        try:
            check_numbers(name, tensor, dtype)
        except ValueError as error:
            raise ValueError(f"{path} cannot be written: {error}") from error


def check_shapes(
    source: Path | str, expected: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ValueError, naming the first, unless the file's tensors are the expected ones."""
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    wrong = [name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name)]
    if wrong:
        first = min(wrong)
        raise ValueError(
            f"{source} does not fit the configuration in {len(wrong)} tensors, first "
            f"{name_repr(first)}: {shapes.get(first, 'missing')} in the file, "
            f"{wanted.get(first, 'none')} by the configuration"
        )


def check_numbers(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise ValueError for NaN and infinite numbers, and for those too large for `dtype`.

    Whole numbers are always right.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    # aminmax gives NaN if any number is NaN, and takes a thirtieth of isfinite's time.
    numbers = tensor.detach().float() if tensor.dtype.itemsize == 1 else tensor.detach()
    ends = torch.stack(numbers.aminmax())
    if not ends.isfinite().all():
        raise ValueError(f"tensor {name_repr(name)} holds NaN or infinite numbers")
    # Rounding keeps the order, so that all numbers are finite where the least and largest are.
    if dtype is not None and not ends.to(dtype).double().isfinite().all():
        largest = float(ends.double().abs().max())
        wider = [str(d).removeprefix("torch.") for d in _WIDE if torch.finfo(d).max >= largest]
        raise ValueError(
            f"tensor {name_repr(name)} is too large for {dtype}: it holds {largest:g}, up to "
            f"{torch.finfo(dtype).max:g} is allowed; {' or '.join(wider)} can hold it"
        )


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; ValueError names the file if it is missing or is anything else."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a JSON object")
    with path.open("rb") as file:
        text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{path}: is over the limit of {MAX_JSON_BYTES} bytes")
    try:
        content = parse_json(text)
    except ValueError as error:  # not JSON, or not UTF-8
        wrong = stand_in(text) or f"is not valid JSON ({error})"
        raise ValueError(f"{path}: {wrong}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a JSON {type(content).__name__}, expected an object")
    return content


def save_json(content: Mapping[str, Any], path: Path) -> None:
    """Write an object as readable JSON with sorted keys (as diffusers does), atomically."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    with replacing(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _read(file: BufferedReader, header: Header, name: str, dtype: torch.dtype | None) -> Tensor:
    """Read one tensor into memory: a memory map would be lost with the file."""
    begin, end = header.byte_ranges[name]
    numbers = torch.empty(end - begin, dtype=torch.uint8)
    file.seek(begin)
    if file.readinto(numbers.numpy().data) != end - begin:
        raise ValueError(f"{file.name}: became shorter while it was read")
    tensor = numbers.view(header.dtypes[name]).reshape(header.shapes[name])
    if not tensor.is_floating_point():
        return tensor
    try:
        check_numbers(name, tensor, dtype)
    except ValueError as error:
        raise ValueError(f"{file.name}: {error}") from error
    return tensor if dtype is None else tensor.to(dtype)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; the file written there then replaces `path`.

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
