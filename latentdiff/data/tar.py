"""WebDataset tars by offsets: one pass over the headers, nothing extracted, nothing unpickled.

A reader of its own, since `tarfile` follows links and extracts, and `webdataset` unpickles members
and runs `pipe:` addresses. Formats: POSIX.1-2001 (pax), ustar and GNU's long names; samples are
members that share a name up to its first dot, one after the other (the WebDataset convention).
"""

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from latentdiff.data.decode import BadSample

BLOCK = 512
PICTURES = frozenset((".jpg", ".jpeg", ".png", ".webp"))
TEXT_LIMIT = 1 << 20  # bytes of a caption, a JSON object or a name; beyond it is no caption


class Member(NamedTuple):
    """A regular file in a tar: where its bytes are."""

    name: str
    offset: int
    size: int


def members(path: Path) -> Iterator[Member]:
    """Every regular file with a safe name and a wanted suffix, in order.

    Links, devices, folders, absolute names, `..` and backslashes are passed over, and so is
    everything but pictures, `.txt` and `.json`. Raises ValueError for what is no tar, or a tar
    that ends early.
    """
    end = path.stat().st_size
    with path.open("rb") as file:
        position, override = 0, dict[str, str]()
        while position < end:
            file.seek(position)
            header = file.read(BLOCK)
            if len(header) == BLOCK and not header.strip(b"\0"):
                return  # the end mark
            kind, name, size = _header(path, header, position)
            size = int(override.get("size", size)) if override.get("size", "0").isdigit() else size
            start = position + BLOCK
            if start + size > end:
                raise ValueError(f"{path} ends within the member {name!r} at byte {position}")
            position = start + -(-size // BLOCK) * BLOCK
            if kind in (b"x", b"L"):  # about the next member
                file.seek(start)
                override |= _override(path, kind, file, size)
                continue
            name = override.get("path", name)
            override = {}
            if kind in (b"0", b"\0", b"7") and _wanted(name):
                yield Member(name, start, size)
    raise ValueError(f"{path} ends without an end mark: it is not whole")


def samples(path: Path) -> Iterator[dict[str, Any]]:
    """A row for each sample with a picture: `file_name`, `_offset`, `_bytes`, captions and fields.

    `text` is the `.txt` member; the keys of the `.json` member's object are columns. What is wrong
    with a sample is in `_fault` and `_detail`. Raises ValueError as `members` does.
    """
    with path.open("rb") as file:
        key, row = None, dict[str, Any]()
        for member in members(path):
            if _key(member.name) != key:
                if "_offset" in row:
                    yield row
                key, row = _key(member.name), {}
            _add(row, member, file)
        if "_offset" in row:
            yield row


def _add(row: dict[str, Any], member: Member, file: BinaryIO) -> None:
    suffix = PurePosixPath(member.name).suffix.lower()
    if suffix in PICTURES:
        if "_offset" in row:
            row |= {"_fault": "two pictures of one name", "_detail": member.name}
            return
        row |= {"file_name": member.name, "_offset": member.offset}
        row["_bytes"] = member.size
        return
    try:
        text = _text(member, file)
        if suffix == ".txt":
            row["text"] = text.strip()
            return
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError("no JSON object")
    except BadSample as error:
        row |= {"_fault": error.reason, "_detail": error.detail}
    except (ValueError, RecursionError) as error:
        row |= {"_fault": "damaged JSON", "_detail": f"{member.name}: {error}"}
    else:
        own = {name: value for name, value in fields.items() if name not in row}
        row |= {name: value for name, value in own.items() if not name.startswith("_")}


def _text(member: Member, file: BinaryIO) -> str:
    if member.size > TEXT_LIMIT:
        raise BadSample("text is too long", f"{member.name}: {member.size} bytes")
    file.seek(member.offset)
    return strict_text(file.read(member.size), member.name)


def strict_text(data: bytes, name: str) -> str:
    """UTF-8, with or without a byte order mark. Raises BadSample with the place of a wrong byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        raise BadSample("text is not UTF-8", f"{name}, byte {at}") from error


def _header(path: Path, header: bytes, position: int) -> tuple[bytes, str, int]:
    """Type, name and size. The sum of all bytes, with blanks for the sum itself, guards them."""
    if len(header) < BLOCK:
        raise ValueError(f"{path} ends within a header at byte {position}")
    total = sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
    try:
        if int(header[148:156].strip(b"\0 ") or b"0", 8) != total:
            raise ValueError
        field = header[124:136]
        # GNU writes sizes of 8 GiB and more in binary, with the top bit set.
        size = (
            int.from_bytes(field[1:], "big")
            if field[0] == 0x80
            else int(field.strip(b"\0 ") or b"0", 8)
        )
        if size < 0:
            raise ValueError
    except ValueError as error:
        raise ValueError(f"{path} is no tar file: bad header at byte {position}") from error
    name = header[:100].split(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0")[0] + b"/" + name
    # A name that is not UTF-8 gets backslashes, and such names are passed over.
    return header[156:157], name.decode("utf-8", "backslashreplace"), size


def _override(path: Path, kind: bytes, file: BinaryIO, size: int) -> dict[str, str]:
    """The name and size of the next member, from a pax header or GNU's long name."""
    if size > TEXT_LIMIT:
        raise ValueError(f"{path} has a name of {size} bytes")
    data = file.read(size)
    if kind == b"L":
        return {"path": data.split(b"\0")[0].decode("utf-8", "backslashreplace")}
    found = {}
    while data:  # records "<length> <key>=<value>\n"
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(data):
            raise ValueError(f"{path} has a damaged pax header")
        key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        if key in (b"path", b"size"):
            found[key.decode()] = value.decode("utf-8", "backslashreplace")
        data = data[int(length) :]
    return found


def _wanted(name: str) -> bool:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        return False
    return path.suffix.lower() in PICTURES | {".txt", ".json"}


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.split(".", 1)[0]
