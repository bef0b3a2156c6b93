"""Types and functions that the forms of data share: shards, records, byte ranges, fingerprints."""

import hashlib
import json
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from latentdiff.data.decode import BadSample


@dataclass(frozen=True)
class FileRange:
    """The bytes of an image on disk: `size` bytes of a file from `offset` on, all if None."""

    root: Path
    name: str
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """Return the bytes. Raises BadSample when the file is missing or outside `root`."""
        path = self.root / on_disk(self.root, self.name)
        # A tar may be a link to another disk; a file that metadata names must be inside.
        if self.size is None and not is_inside(path, self.root):
            raise BadSample("leads outside")
        try:
            with path.open("rb") as file:
                file.seek(self.offset)
                return file.read(-1 if self.size is None else self.size)
        except OSError as error:
            raise BadSample("missing image", str(error.strerror)) from error


class Record(NamedTuple):
    """A sample of a shard, before its captions are formatted and its image is decoded."""

    name: str
    """The sample's name in messages and in bad_samples.jsonl, as in an index."""
    row: Mapping[str, Any]
    """Captions and other columns."""
    file: bytes | FileRange | None
    """The image file, or where to read it; None when it was not asked for."""
    fault: BadSample | None = None


class Shard(Protocol):
    """Samples in an order that never changes. A shard can be pickled for another process."""

    seekable: bool
    """Whether an image that was not asked for can be read later, from its FileRange."""

    def records(self, images: Callable[[], bool]) -> Iterator[Record]:
        """Yield the samples in order; `images()` tells whether the next image must be read.

        A shard that is not seekable calls `images` once, for all its images. Raises ValueError when
        the shard is broken.
        """
        ...


class Shards(NamedTuple):
    """A split of a data set as shards."""

    shards: Sequence[Shard]
    columns: Sequence[str] | None
    """The columns, or None where they are only known once samples are read."""
    image_columns: Sequence[str]
    fingerprint: str
    """SHA-256 of all files' sizes and times, or of the hub's version of them."""
    named_as_in_index: bool = True
    """Whether the samples have the names that `latentdiff data check` writes."""


def check_split(data: str, split: str, splits: Iterable[str]) -> None:
    """Raise ValueError when the data has no such split."""
    if split not in splits:
        raise ValueError(f"data={data!r} has no split {split!r}, only {sorted(splits)}")


def unreadable(data: str, error: Exception) -> ValueError:
    """Return the error for data that cannot be read."""
    what = "" if Path(data).exists() else " as a folder or from the hub"
    return ValueError(f"data={data!r} cannot be read{what}: {' '.join(str(error).split())}")


def is_inside(path: Path, root: Path) -> bool:
    """Whether a path, with its links resolved, is below the root."""
    return path.resolve().is_relative_to(root.resolve())


def on_disk(root: Path, name: str) -> str:
    """Return a file's name as the disk has it: macOS may have written é as e and an accent (NFD).

    A name without a file stays as it is.
    """
    if not name.isascii() and not os.path.lexists(root / name):
        for form in ("NFC", "NFD"):
            other = unicodedata.normalize(form, name)
            if os.path.lexists(root / other):
                return other
    return name


def is_public(column: str) -> bool:
    """Whether a configuration may name this column of a table of files."""
    return column != "file_name" and not column.startswith("_")


def noted_fault(row: Mapping[str, Any]) -> BadSample | None:
    """Return the fault that a reader of metadata stored in a row, or None."""
    reason = row.get("_fault")
    return None if reason is None else BadSample(reason, row.get("_detail") or "")


def file_stamp(path: Path) -> tuple[int, int]:
    """Return a file's size in bytes and modification time in nanoseconds."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def file_stamps(root: Path, names: Iterable[str]) -> list[tuple[str, int, int]]:
    """Return the names and stamps of files below a root."""
    return [(name, *file_stamp(root / name)) for name in names]


def digest(key: object) -> str:
    """Return the SHA-256 of a value that is serializable as JSON."""
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()
