"""What the forms of data have in common: shards that are read in order, and stamps of files."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from latentdiff.data.decode import BadSample


@dataclass(frozen=True)
class FileRange:
    """Where the bytes of an image are on disk: `size` of them from `offset` on, all if None."""

    root: Path
    name: str
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """The bytes. Raises BadSample when there is no such file, or not inside `root`."""
        path = self.root / self.name
        # A tar may be a link to where there is room; what metadata names must not lead out.
        if self.size is None and not is_inside(path, self.root):
            raise BadSample("leads outside")
        try:
            with path.open("rb") as file:
                file.seek(self.offset)
                return file.read(-1 if self.size is None else self.size)
        except OSError as error:
            raise BadSample("missing image", str(error.strerror)) from error


class Record(NamedTuple):
    """A sample as its shard has it."""

    name: str
    """What it is called in messages and in bad_samples.jsonl, as in an index."""
    row: Mapping[str, Any]
    """Captions and other columns."""
    file: bytes | FileRange | None
    """The image's file, where it is, or None when it was not asked for."""
    fault: BadSample | None = None


class Shard(Protocol):
    """Samples in an order that never changes. A shard can go to another process."""

    seekable: bool
    """Whether an image that was not asked for can be read later, from its FileRange."""

    def records(self, images: Callable[[], bool]) -> Iterator[Record]:
        """The samples in order. `images` is asked whether the next sample's image is wanted.

        A shard that is not seekable asks once, for all its images. Raises ValueError when the
        shard is broken.
        """
        ...


class Shards(NamedTuple):
    """A split as shards."""

    shards: Sequence[Shard]
    columns: Sequence[str] | None
    """The columns, where they are known before the samples are read."""
    image_columns: Sequence[str]
    fingerprint: str
    """Of all files, by their sizes and times or by the hub's version."""
    named_as_in_index: bool = True
    """Whether names are those that `latentdiff data check` writes."""


def check_split(data: str, split: str, splits: Iterable[str]) -> None:
    """Raise ValueError when the data has no such split."""
    if split not in splits:
        raise ValueError(f"data={data!r} has no split {split!r}, only {sorted(splits)}")


def unreadable(data: str, error: Exception) -> ValueError:
    """The error for data that cannot be read."""
    what = "" if Path(data).exists() else " as a folder or from the hub"
    return ValueError(f"data={data!r} cannot be read{what}: {' '.join(str(error).split())}")


def is_inside(path: Path, root: Path) -> bool:
    """Whether a path stays below the root, links resolved."""
    return path.resolve().is_relative_to(root.resolve())


def is_public(column: str) -> bool:
    """Whether a configuration may name a column of a table of files."""
    return column != "file_name" and not column.startswith("_")


def noted_fault(row: Mapping[str, Any]) -> BadSample | None:
    """The fault that a reader of captions noted in a row."""
    reason = row.get("_fault")
    return None if reason is None else BadSample(reason, row.get("_detail") or "")


def file_stamp(path: Path) -> tuple[int, int]:
    """Size and time of the last change in nanoseconds, which differ after a change."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def file_stamps(root: Path, names: Iterable[str]) -> list[tuple[str, int, int]]:
    """The names and stamps of files below a root."""
    return [(name, *file_stamp(root / name)) for name in names]


def digest(key: object) -> str:
    """SHA-256 of something that is serializable as JSON."""
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()
