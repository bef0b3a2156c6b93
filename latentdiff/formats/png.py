"""Metadata of a PNG file: how the image was drawn, as a line for people and as a JSON record.

`parameters` is the text that AUTOMATIC1111's web UI writes (formats/a1111.py), which many programs
show. `latentdiff` is our JSON record, the only one that is read to draw an image again.
"""

import io
import json
import warnings
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Any,
    Literal,
    NotRequired,
    Required,
    TypedDict,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from PIL import Image, PngImagePlugin

from latentdiff.formats.header import short_repr
from latentdiff.formats.weights import replacing

PARAMETERS = "parameters"
RECORD = "latentdiff"
RECORD_VERSION = 1
LONG = 1000  # characters; a longer record is compressed
MAX_BYTES = 2**28  # of a file; Pillow reads a text chunk whole before it asks how long it is
SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # which all begin with a keyword
LONGEST_KEYWORD = 79


class FileRecord(TypedDict):
    """A file that an image was drawn from: its name and hash."""

    name: str
    sha256: str


class LoraRecord(FileRecord):
    """A LoRA and how strongly it was applied."""

    scale: float


class RequestRecord(TypedDict, total=False):
    """The options of `pipe(...)` that draw the image alone; those left out have their default."""

    prompt: Required[str]
    seed: Required[int]
    steps: int
    guidance_scale: float
    guidance_rescale: float
    guidance_interval: list[float]
    guidance_eta: float
    guidance_norm_threshold: float
    guidance_momentum: float
    negative_prompt: str
    prompt_weighting: bool
    height: int
    width: int
    sampler: str
    level_spacing: str
    strength: float
    variation_strength: float
    variation_seed: int
    cache_interval: int


class Record(TypedDict):
    """Everything that decides the pixels of one image."""

    request: RequestRecord
    image: NotRequired[FileRecord]
    mask_image: NotRequired[FileRecord]
    model: str
    model_sha256: str | None
    dtype: Literal["float32", "float16", "bfloat16"]
    device: str
    engine: NotRequired[Literal["torch", "openvino"]]
    """What computed the networks; not in records before there were engines: torch."""
    compiled: NotRequired[bool]
    """Whether torch had compiled them; not in records before it could: no."""
    batched: NotRequired[bool]
    """Whether a CPU denoised it at once with others, though that changes its last bits."""
    vae_tiling: NotRequired[int]
    """The side of the tiles that the VAE decoded, if it did."""
    packages: dict[str, str]
    loras: list[LoraRecord]


@dataclass(frozen=True)
class Metadata:
    """The two texts of a PNG file; None for one that it does not hold."""

    parameters: str | None
    record: Record | None


def save_png(
    image: Image.Image,
    path: str | Path,
    *,
    parameters: str | None = None,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Write a PNG file, atomically, as `png_bytes` makes it."""
    data = png_bytes(image, parameters=parameters, record=record)
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(data)


def png_bytes(
    image: Image.Image,
    *,
    parameters: str | None = None,
    record: Mapping[str, Any] | None = None,
) -> bytes:
    """An image as a PNG file with the texts that are given; the pixels stay the same.

    `record` has the fields of `Record`; anything else is a ValueError.
    Texts may hold any characters: in the record they come back as they were, in `parameters` those
    that no PNG text can hold (NUL, lone surrogates) become question marks.
    """
    texts = PngImagePlugin.PngInfo()
    if parameters is not None:
        printable = parameters.encode("utf-8", "replace").decode("utf-8").replace("\0", "?")
        texts.add_text(PARAMETERS, printable)
    if record is not None:
        # ASCII, because UTF-8 cannot hold the lone surrogates of an undecodable command line.
        content = json.dumps({"version": RECORD_VERSION, **record}, allow_nan=False)
        _record(content)  # what cannot be read is not written
        texts.add_itxt(RECORD, content, zip=LONG < len(content) <= PngImagePlugin.MAX_TEXT_CHUNK)
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=texts)
    return file.getvalue()


def read_png(path: str | Path) -> Metadata:
    """Read the metadata of a PNG file; no pixel is decoded.

    Raises ValueError, in one sentence that names the file, if it is not a PNG file or says nothing,
    and if its record is damaged, of another version, or has fields that are unknown, missing or of
    a wrong type.
    """
    path = Path(path)
    info = _info(path)
    parameters, content = info.get(PARAMETERS), info.get(RECORD)
    if not isinstance(parameters, str):
        parameters = None
    if not isinstance(content, str):
        if parameters is None:
            raise ValueError(f"{path}: has no metadata that says how the image was drawn")
        return Metadata(parameters, None)
    try:
        return Metadata(parameters, _record(content))
    except ValueError as error:
        raise ValueError(f"{path}: its record of the drawing cannot be read: {error}") from error


def without_texts(data: bytes, *, keep: Container[str] = ()) -> bytes:
    """A PNG file without its texts and colour profile, but for texts of the keywords in `keep`.

    Pillow refuses the whole image for a compressed text of more than a MiB, such as a large
    workflow of ComfyUI, and takes a text with the keyword `transparency` or `interlace` for the
    property of that name. What is no PNG file, or follows a chunk that is cut off, stays as it is.
    """
    if not data.startswith(SIGNATURE):
        return data
    kept, begin, position = [], 0, len(SIGNATURE)
    while position + 12 <= len(data):  # length, kind and check sum
        kind = data[position + 4 : position + 8]
        end = position + 12 + int.from_bytes(data[position : position + 4])
        if end > len(data):
            break
        if kind in TEXTS:
            keyword = data[position + 8 : position + 9 + LONGEST_KEYWORD].split(b"\0")[0]
            if keyword.decode("latin-1") not in keep:
                kept.append(data[begin:position])
                begin = end
        position = end
    return b"".join([*kept, data[begin:]]) if kept else data


def _info(path: Path) -> dict[Any, Any]:
    if not path.is_file():
        what = "is no file" if path.exists() else "no such file"
        raise ValueError(f"{path}: {what}; expected a PNG image")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: is larger than {MAX_BYTES >> 20} MiB, too large to be read")
    try:
        with warnings.catch_warnings():
            # Nothing is decoded, so that a huge image does no harm.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            # The texts of other programs may be longer than Pillow allows.
            data = without_texts(path.read_bytes(), keep=(PARAMETERS, RECORD))
            with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                return dict(image.info)
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{path}: is not a PNG image, or is damaged") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as a PNG image ({error})") from error


def _record(content: str) -> Record:
    try:
        values = json.loads(content, parse_constant=_refuse_constant)
        if not isinstance(values, dict):
            raise ValueError(f"it is a JSON {type(values).__name__}, not an object")
        version = values.pop("version", None)
        if version != RECORD_VERSION or isinstance(version, bool):
            raise ValueError(
                f"its version={short_repr(version)} is not {RECORD_VERSION}, the one known here"
            )
        return _checked(values, Record, "record")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _checked(value: Any, kind: Any, name: str) -> Any:
    """Convert a JSON value to the type `kind`; ValueError names the field of a wrong type."""
    if is_typeddict(kind):
        return _fields(value, kind, name)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:  # X | None
        assert arguments[1] is NoneType
        return None if value is None else _checked(value, arguments[0], name)
    if origin is dict and isinstance(value, dict):
        return {
            k: _checked(item, arguments[1], f"{name}[{short_repr(k)}]") for k, item in value.items()
        }
    if origin is list and isinstance(value, list):
        return [_checked(item, arguments[0], f"{name}[{i}]") for i, item in enumerate(value)]
    if origin is Literal and isinstance(value, str) and value in arguments:
        return value
    if kind is float and type(value) is int and abs(value) < 2**64:  # far from overflowing
        return float(value)
    if type(value) is not kind:  # not isinstance: True is an int
        wanted = kind.__name__ if origin is None else str(kind)
        wanted = f"one of {', '.join(arguments)}" if origin is Literal else f"of type {wanted}"
        raise ValueError(f"{name}={short_repr(value)} must be {wanted}")
    return value


def _fields(value: Any, kind: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name}={short_repr(value)} must be an object")
    hints = get_type_hints(kind)
    for field in sorted(value.keys() - hints.keys()):
        raise ValueError(f"{name} has a field {short_repr(field)} that is unknown")
    for field in sorted(kind.__required_keys__ - value.keys()):
        raise ValueError(f"{name} has no field {field}")
    return {field: _checked(value[field], hints[field], f"{name}.{field}") for field in value}
