"""WebDataset tars: consecutive members that share a name up to its first dot are a sample.

The `webdataset` library unpickles members and runs `pipe:` addresses; this module reads only
images, `.txt` and `.json`. Hidden members, such as the `._1.jpg` that macOS adds, are passed over.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from latentdiff.data.decode import SUFFIXES, BadSample
from latentdiff.data.forms.file_index import FileIndex
from latentdiff.data.forms.files import printable
from latentdiff.data.forms.form import FileRange, Record, Shards, digest, file_stamps, noted_fault
from latentdiff.data.forms.metadata import TEXT_LIMIT, check_text, strict_text
from latentdiff.data.forms.table import batched, cached_table
from latentdiff.data.tar import Member, is_safe, members

TEXTS = (".txt", ".json")


@dataclass(frozen=True)
class Tars:
    """A split of tar files below `root`, in the order of their names."""

    root: Path
    split: str
    files: Sequence[str]

    def index(self, columns: Sequence[str]) -> FileIndex:
        """Open the split for random access: scan the tars for the offsets of their members."""

        def rows() -> Iterator[dict[str, Any]]:
            for number, file in enumerate(self.files):
                for row in samples(self.root / file, columns):
                    name = f"{printable(file)}/{row['file_name']}"
                    yield {**row, "file_name": name, "_shard": number}

        key = [file_stamps(self.root, self.files), sorted(columns)]
        table = cached_table(str(self.root.resolve()), key, lambda: batched(rows(), columns))
        return FileIndex(table, self.root, tars=self.files)

    def shards(self, image_column: str, columns: Sequence[str]) -> Shards:
        """Open the split as shards, one for each tar."""
        fingerprint = digest(["tar", self.split, file_stamps(self.root, self.files)])
        shards = [TarShard(self.root, file, columns) for file in self.files]
        return Shards(shards, None, ["image"], fingerprint)


@dataclass(frozen=True)
class TarShard:
    """The samples of one tar."""

    root: Path
    file: str
    columns: Sequence[str]
    seekable = True

    def records(self, images: Callable[[], bool]) -> Iterator[Record]:
        """Yield the samples in order, see Shard."""
        for row in samples(self.root / self.file, self.columns, images=images):
            data = row.pop("_file", None)
            if data is None:
                data = FileRange(self.root, self.file, row["_offset"], row["_bytes"])
            name = f"{printable(self.file)}/{row['file_name']}"
            yield Record(name, row, data, noted_fault(row))


def samples(
    path: Path, columns: Sequence[str], *, images: Callable[[], bool] = lambda: False
) -> Iterator[dict[str, Any]]:
    """Yield a row for each sample: `file_name`, `_offset`, `_bytes` and its columns.

    The column `text` is the `.txt` member; the keys of the `.json` member's object are further
    columns, whose text is checked if they are in `columns`. `_fault` and `_detail` tell what is
    wrong with a bad sample, such as a caption without an image beside it. `images()` is called
    before each image, after all earlier samples have been yielded, and decides whether its file is
    read into `_file`. Raises ValueError as `members` does.
    """
    key, row, unread = None, dict[str, Any](), ("", "")
    with path.open("rb") as file:
        for member in members(file, str(path)):
            suffix = PurePosixPath(member.name).suffix.lower()
            base = member.name.rpartition("/")[2]
            if base[:1] == "." != base[1:2]:  # hidden; a name such as `..\\1.png` is unsafe
                continue
            if suffix not in SUFFIXES and suffix not in TEXTS:
                unread = _key(member.name), member.name
                if unread[0] == key:
                    row["_unread"] = member.name
                continue
            if _key(member.name) != key:
                if row:
                    yield _whole(row)
                key, row = _key(member.name), {"_first": member.name, "_unread": None}
                if unread[0] == key:
                    row["_unread"] = unread[1]
            _add(row, member, file, columns, images)
    if row:
        yield _whole(row)


def _whole(row: dict[str, Any]) -> dict[str, Any]:
    """Return a sample's row when its last member is read: a bad sample if it has no image."""
    first, other = row.pop("_first"), row.pop("_unread")
    if "_offset" in row:
        return row
    row |= {"file_name": printable(first), "_offset": 0, "_bytes": 0, "_fault": "missing image"}
    row["_detail"] = (
        f"no image stands beside {first!r} in the tar"
        if other is None
        else f"{other!r} is no image by its name; convert or rename it"
    )
    return row


def _add(
    row: dict[str, Any],
    member: Member,
    file: BinaryIO,
    columns: Sequence[str],
    images: Callable[[], bool],
) -> None:
    suffix = PurePosixPath(member.name).suffix.lower()
    if suffix in SUFFIXES:
        if "_offset" in row:
            row |= {"_fault": "two images of one name", "_detail": member.name}
            return
        row |= {"file_name": member.name, "_offset": member.offset}
        row["_bytes"] = member.size
        if not is_safe(member.name):
            detail = "a name in a tar must be UTF-8, relative, with / and without .."
            row |= {"_fault": "unsafe name", "_detail": detail}
        elif images():
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
        added = {name: value for name, value in fields.items() if name not in row}
        row |= {name: value for name, value in added.items() if not name.startswith("_")}
        check_text(row, columns, member.name)
    except BadSample as error:
        row |= {"_fault": error.reason, "_detail": error.detail}
    except (ValueError, RecursionError) as error:
        row |= {"_fault": "damaged JSON", "_detail": f"{member.name}: {error}"}


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.split(".", 1)[0]
