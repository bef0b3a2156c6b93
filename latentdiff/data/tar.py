"""WebDataset tars in one pass, by offsets or as a stream: nothing extracted, nothing unpickled.

A reader of its own, since `tarfile` follows links and extracts, and `webdataset` unpickles members
and runs `pipe:` addresses. Formats: POSIX.1-2001 (pax), ustar and GNU's long names; samples are
members that share a name up to its first dot, one after the other (the WebDataset convention).
"""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from latentdiff.data.decode import BadSample

BLOCK = 512
PIECE = 1 << 20  # bytes of what is passed over, in memory at a time
IMAGES = frozenset((".jpg", ".jpeg", ".png", ".webp"))
MOST_DIGITS = 18  # of a size in bytes
TEXT_LIMIT = 1 << 20  # bytes of a caption, a JSON object or a name; beyond it is no caption


class Member(NamedTuple):
    """A regular file in a tar: where its bytes are."""

    name: str
    offset: int
    size: int


class Tape:
    """A tar that is read from beginning to end; a file that cannot seek will do, such as a pipe."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        """`name` is for messages."""
        self.file, self.name = file, name
        self.position = 0
        self.end = file.seek(0, io.SEEK_END) if file.seekable() else None
        if self.end is not None:
            file.seek(0)

    def read(self, size: int) -> bytes:
        """The next bytes, fewer only where the tar ends."""
        data = self.file.read(size)
        self.position += len(data)
        return data

    def take(self, size: int) -> bytes:
        """The next bytes, all of them. Raises ValueError where the tar ends before."""
        data = self.read(size)
        if len(data) < size:
            raise ValueError(f"{self.name} ends within a member at byte {self.position}")
        return data

    def skip_to(self, position: int) -> None:
        """Go on at a later byte, or at the end if that comes before."""
        if self.end is not None:
            self.position = self.file.seek(position)
        while self.position < position and self.read(min(PIECE, position - self.position)):
            pass


def members(path: Path) -> Iterator[Member]:
    """The members of a tar on disk, see `members_of`."""
    with path.open("rb") as file:
        yield from members_of(Tape(file, str(path)))


def members_of(tape: Tape) -> Iterator[Member]:
    """Every regular file with a safe name and a wanted suffix, in order; the tape is at its bytes.

    Links, devices, folders, absolute names, `..` and backslashes are passed over, and so is
    everything but images, `.txt` and `.json`. Raises ValueError for what is no tar, or a tar
    that ends early.
    """
    override = dict[str, str]()
    while True:
        position = tape.position
        header = tape.read(BLOCK)
        if not header:
            raise ValueError(f"{tape.name} ends without an end mark: it is not whole")
        if len(header) == BLOCK and not header.strip(b"\0"):
            return  # the end mark
        kind, name, size = _header(tape.name, header, position)
        size = int(override.get("size", size))
        start = position + BLOCK
        if tape.end is not None and start + size > tape.end:
            raise ValueError(f"{tape.name} ends within the member {name!r} at byte {position}")
        if kind in (b"x", b"L"):  # about the next member
            override |= _override(tape, kind, size)
        else:
            name = override.get("path", name)
            override = {}
            if kind in (b"0", b"\0", b"7") and _wanted(name):
                yield Member(name, start, size)
        tape.skip_to(start + -(-size // BLOCK) * BLOCK)


def samples(path: Path) -> Iterator[dict[str, Any]]:
    """The samples of a tar on disk, see `samples_of`."""
    with path.open("rb") as file:
        yield from samples_of(Tape(file, str(path)))


def samples_of(
    tape: Tape, *, images: Callable[[], bool] = lambda: False
) -> Iterator[dict[str, Any]]:
    """A row for each sample with an image: `file_name`, `_offset`, `_bytes`, captions and fields.

    `text` is the `.txt` member; the keys of the `.json` member's object are columns. What is wrong
    with a sample is in `_fault` and `_detail`. `images` is asked before each image, after all
    samples before it were handed out, whether to read it into `_file`. Raises ValueError as
    `members_of` does.
    """
    key, row = None, dict[str, Any]()
    for member in members_of(tape):
        if _key(member.name) != key:
            if "_offset" in row:
                yield row
            key, row = _key(member.name), {}
        _add(row, member, tape, images)
    if "_offset" in row:
        yield row


def _add(row: dict[str, Any], member: Member, tape: Tape, images: Callable[[], bool]) -> None:
    suffix = PurePosixPath(member.name).suffix.lower()
    if suffix in IMAGES:
        if "_offset" in row:
            row |= {"_fault": "two images of one name", "_detail": member.name}
            return
        row |= {"file_name": member.name, "_offset": member.offset}
        row["_bytes"] = member.size
        if images():
            row["_file"] = tape.take(member.size)
        return
    try:
        text = _text(member, tape)
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


def _text(member: Member, tape: Tape) -> str:
    if member.size > TEXT_LIMIT:
        raise BadSample("text is too long", f"{member.name}: {member.size} bytes")
    return strict_text(tape.take(member.size), member.name)


def strict_text(data: bytes, name: str) -> str:
    """UTF-8, with or without a byte order mark. Raises BadSample with the place of a wrong byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        raise BadSample("text is not UTF-8", f"{name}, byte {at}") from error


def _header(tar: str, header: bytes, position: int) -> tuple[bytes, str, int]:
    """Type, name and size. The sum of all bytes, with blanks for the sum itself, guards them."""
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
    name = header[:100].split(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0")[0] + b"/" + name
    # A name that is not UTF-8 gets backslashes, and such names are passed over.
    return header[156:157], name.decode("utf-8", "backslashreplace"), size


def _override(tape: Tape, kind: bytes, size: int) -> dict[str, str]:
    """The name and size of the next member, from a pax header or GNU's long name."""
    if size > TEXT_LIMIT:
        raise ValueError(f"{tape.name} has a name of {size} bytes")
    data = tape.take(size)
    if kind == b"L":
        return {"path": data.split(b"\0")[0].decode("utf-8", "backslashreplace")}
    found = {}
    while data:  # records "<length> <key>=<value>\n"
        length, _, rest = data.partition(b" ")
        if not _is_number(length) or not 0 < int(length) <= len(data):
            raise ValueError(f"{tape.name} has a damaged pax header")
        key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        if key == b"size" and not _is_number(value):
            raise ValueError(f"{tape.name} has a damaged pax header")
        if key in (b"path", b"size"):
            found[key.decode()] = value.decode("utf-8", "backslashreplace")
        data = data[int(length) :]
    return found


def _is_number(digits: bytes) -> bool:
    return digits.isdigit() and len(digits) <= MOST_DIGITS


def _wanted(name: str) -> bool:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        return False
    return path.suffix.lower() in IMAGES | {".txt", ".json"}


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.split(".", 1)[0]
