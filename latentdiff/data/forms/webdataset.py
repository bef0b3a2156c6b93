"""WebDataset tars: consecutive members that share a name up to its first dot are a sample.

The `webdataset` library unpickles members and runs `pipe:` addresses; this module reads only
images, `.txt` and `.json`.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from latentdiff.data.decode import BadSample
from latentdiff.data.forms.file_index import FileIndex
from latentdiff.data.forms.form import FileRange, Record, Shards, digest, file_stamps, noted_fault
from latentdiff.data.forms.metadata import TEXT_LIMIT, strict_text
from latentdiff.data.forms.table import batched, cached_table
from latentdiff.data.tar import Member, members

IMAGES = frozenset((".jpg", ".jpeg", ".png", ".webp"))


@dataclass(frozen=True)
class Tars:
    """A split of tar files below `root`, in the order of their names."""

    root: Path
    split: str
    files: Sequence[str]

    def index(self) -> FileIndex:
        """Open the split for random access: scan the tars for the offsets of their members."""

        def rows() -> Iterator[dict[str, Any]]:
            for number, file in enumerate(self.files):
                for row in samples(self.root / file):
                    yield {**row, "file_name": f"{file}/{row['file_name']}", "_shard": number}

        key = file_stamps(self.root, self.files)
        table = cached_table(str(self.root.resolve()), key, lambda: batched(rows()))
        return FileIndex(table, self.root, tars=self.files)

    def shards(self, image_column: str, columns: Sequence[str]) -> Shards:
        """Open the split as shards, one for each tar."""
        fingerprint = digest(["tar", self.split, file_stamps(self.root, self.files)])
        shards = [TarShard(self.root, file) for file in self.files]
        return Shards(shards, None, ["image"], fingerprint)


@dataclass(frozen=True)
class TarShard:
    """The samples of one tar."""

    root: Path
    file: str
    seekable = True

    def records(self, images: Callable[[], bool]) -> Iterator[Record]:
        """Yield the samples in order, see Shard."""
        for row in samples(self.root / self.file, images=images):
            data = row.pop("_file", None)
            if data is None:
                data = FileRange(self.root, self.file, row["_offset"], row["_bytes"])
            yield Record(f"{self.file}/{row['file_name']}", row, data, noted_fault(row))


def samples(path: Path, *, images: Callable[[], bool] = lambda: False) -> Iterator[dict[str, Any]]:
    """Yield a row for each sample with an image: `file_name`, `_offset`, `_bytes` and its columns.

    The column `text` is the `.txt` member; the keys of the `.json` member's object are further
    columns. `_fault` and `_detail` tell what is wrong with a bad sample. `images()` is called
    before each image, after all earlier samples have been yielded, and decides whether its file is
    read into `_file`. Raises ValueError as `members` does.
    """
    key, row = None, dict[str, Any]()
    with path.open("rb") as file:
        for member in members(file, str(path)):
            if _is_read(member.name):
                if _key(member.name) != key:
                    if "_offset" in row:
                        yield row
                    key, row = _key(member.name), {}
                _add(row, member, file, images)
    if "_offset" in row:
        yield row


def _add(row: dict[str, Any], member: Member, file: BinaryIO, images: Callable[[], bool]) -> None:
    suffix = PurePosixPath(member.name).suffix.lower()
    if suffix in IMAGES:
        if "_offset" in row:
            row |= {"_fault": "two images of one name", "_detail": member.name}
            return
        row |= {"file_name": member.name, "_offset": member.offset}
        row["_bytes"] = member.size
        if images():
            row["_file"] = file.read(member.size)
        return
    try:
        if member.size > TEXT_LIMIT:
            raise BadSample("text is too long", f"{member.name}: {member.size} bytes")
        text = strict_text(file.read(member.size), member.name)
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
        added = {name: value for name, value in fields.items() if name not in row}
        row |= {name: value for name, value in added.items() if not name.startswith("_")}


def _is_read(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in IMAGES | {".txt", ".json"}


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.split(".", 1)[0]
