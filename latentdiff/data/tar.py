"""Lists the members of a tar file with their byte ranges in one pass; nothing is extracted.

`tarfile` silently takes a tar that is truncated or damaged for one that ends there, and needs twice
the time (docs/data.md has the figures). Formats: POSIX.1-2001 (pax), ustar and GNU's long names;
sparse files are passed over.
"""

import io
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import BinaryIO, NamedTuple

BLOCK = 512
MAX_DIGITS = 18  # digits of a size in bytes
NAME_LIMIT = 1 << 20  # bytes of a pax or long-name header


class Member(NamedTuple):
    """A regular file in a tar, with the offset and number of its bytes."""

    name: str
    offset: int
    size: int


def members(file: BinaryIO, tar: str) -> Iterator[Member]:
    """Yield the regular files of a tar in order; `file` is then at the start of their bytes.

    Links, devices and folders are passed over. A name may lead out of the tar's folder, see
    `is_safe`: it is no path to open. Raises ValueError for a file that is no tar or is truncated;
    the message calls it `tar`.
    """
    end, position = file.seek(0, io.SEEK_END), 0
    override = dict[str, str]()
    while True:
        file.seek(position)
        header = file.read(BLOCK)
        if not header:
            raise ValueError(f"{tar} ends without an end mark: it is not whole")
        if len(header) == BLOCK and not header.strip(b"\0"):
            return  # the end mark
        kind, name, size = _header(tar, header, position)
        size = int(override.get("size", size))
        start = position + BLOCK
        if start + size > end:
            raise ValueError(f"{tar} ends within the member {name!r} at byte {position}")
        if kind in (b"x", b"L"):  # name and size of the next member
            if size > NAME_LIMIT:
                raise ValueError(f"{tar} has a name of {size} bytes")
            data = file.read(size)
            override |= _pax_records(tar, data) if kind == b"x" else {"path": _text(data)}
        else:
            name = override.get("path", name)
            override = {}
            if kind in (b"0", b"\0", b"7"):
                yield Member(name, start, size)
        position = start + -(-size // BLOCK) * BLOCK


def is_safe(name: str) -> bool:
    """Whether a member's name is UTF-8 and a path below the tar's folder, with `/`."""
    path = PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name)


def _header(tar: str, header: bytes, position: int) -> tuple[bytes, str, int]:
    """Parse a header into the member's type, name and size.

    Raises ValueError unless the checksum is right: the sum of the header's bytes, in which the
    checksum itself counts as spaces.
    """
    if len(header) < BLOCK:
        raise ValueError(f"{tar} ends within a header at byte {position}")
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
        raise ValueError(f"{tar} is no tar file: bad header at byte {position}") from error
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:
        name = f"{_text(header[345:500])}/{name}"
    return header[156:157], name, size


def _pax_records(tar: str, data: bytes) -> dict[str, str]:
    """Parse the records "<length> <key>=<value>\\n" of a pax header; keep `path` and `size`."""
    records = {}
    while data:
        length, _, rest = data.partition(b" ")
        if not _is_number(length) or not 0 < int(length) <= len(data):
            raise ValueError(f"{tar} has a damaged pax header")
        key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        if key == b"size" and not _is_number(value):
            raise ValueError(f"{tar} has a damaged pax header")
        if key in (b"path", b"size"):
            records[key.decode()] = value.decode("utf-8", "backslashreplace")
        data = data[int(length) :]
    return records


def _text(field: bytes) -> str:
    """Decode a field up to its first NUL; bytes that are not UTF-8 become unsafe backslashes."""
    return field.split(b"\0")[0].decode("utf-8", "backslashreplace")


def _is_number(digits: bytes) -> bool:
    return digits.isdigit() and len(digits) <= MAX_DIGITS
