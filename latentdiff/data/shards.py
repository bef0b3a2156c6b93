"""Data as shards that are read from beginning to end: nothing is indexed, nothing is decoded."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import datasets.config
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetsError
from datasets.utils.file_utils import xopen

from latentdiff.data.decode import SUFFIXES, BadSample
from latentdiff.data.metadata import metadata_tables, text_tables
from latentdiff.data.sources import (
    check_split,
    file_times,
    holds_files,
    is_inside,
    local_form,
    unreadable,
)
from latentdiff.data.tar import Tape, samples_of

ROWS = 64  # of a parquet file, with their images, in memory at a time


@dataclass(frozen=True)
class Place:
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


class Raw(NamedTuple):
    """A sample as its shard has it."""

    name: str
    """What it is called in messages and in bad_samples.jsonl, as by random access."""
    row: Mapping[str, Any]
    """Captions and other columns."""
    file: bytes | Place | None
    """The image's file, where it is, or None when it was not asked for."""
    fault: BadSample | None = None


class Shard(Protocol):
    """Samples in an order that never changes. A shard can go to another process."""

    places: bool
    """Whether an image that was not asked for has its place, to be read later."""

    def samples(self, images: Callable[[], bool]) -> Iterator[Raw]:
        """The samples in order. `images` is asked whether the next sample's image is wanted.

        A shard without places asks once, for all its images. Raises ValueError when the shard is
        broken.
        """
        ...


class Shards(NamedTuple):
    """A split of a data set."""

    shards: Sequence[Shard]
    columns: Sequence[str] | None
    """The columns, where they are known before the samples are read, and those with images."""
    images: Sequence[str]
    numbered: bool
    """Whether names are those that `latentdiff data check` writes."""
    fingerprint: str
    """Of all files, by their sizes and times or by the hub's version."""


def open_shards(data: str, split: str, *, image_column: str, columns: Sequence[str]) -> Shards:
    """The shards of a split: tars, row groups of parquet, metadata files, folders, or the hub's.

    Of tables nothing is read but the images' column and `columns`. Raises ValueError when there
    is no such data or split.
    """
    datasets.disable_progress_bars()
    try:
        if not Path(data).exists():
            return _hub_shards(data, split, image_column, columns)
        local = local_form(data)
        check_split(data, split, local.parts)
        files = local.parts[split]
        if local.kind == "parquet":
            return _parquet_shards(local.root, files, split, image_column, columns)
        inside = f"{split}/" if local.inner else ""
        shards: list[Shard]
        if local.kind == "tar":
            shards = [TarShard(local.root, file) for file in files]
        elif described := [name for name in files if name.startswith(inside)]:
            files = described
            shards = [MetadataShard(local.root, file) for file in files]
        else:
            files = _folders(local.root / inside, local.root)
            shards = [FolderShard(local.root, folder) for folder in files]
        fingerprint = _digest([local.kind, split, _looked_at(local.root, files)])
        return Shards(shards, None, ["image"], True, fingerprint)
    except (OSError, DatasetsError, pa.ArrowException) as error:
        raise unreadable(data, error) from error


@dataclass(frozen=True)
class TarShard:
    """A WebDataset tar."""

    root: Path
    file: str
    places = True

    def samples(self, images: Callable[[], bool]) -> Iterator[Raw]:
        """See Shard."""
        with (self.root / self.file).open("rb") as file:
            for row in samples_of(Tape(file, str(self.root / self.file)), images=images):
                data = row.pop("_file", None)
                if data is None:
                    data = Place(self.root, self.file, row["_offset"], row["_bytes"])
                yield Raw(f"{self.file}/{row['file_name']}", row, data, _fault(row))


@dataclass(frozen=True)
class MetadataShard:
    """The images that a metadata file names."""

    root: Path
    file: str
    places = True

    def samples(self, images: Callable[[], bool]) -> Iterator[Raw]:
        """See Shard; the images are files, which are read when they are decoded."""
        tables = metadata_tables(self.root / self.file, self.file.rpartition("/")[0])
        return _rows_of(tables, self.root)


@dataclass(frozen=True)
class FolderShard:
    """The images of one folder, without those of folders in it, and the texts beside them."""

    root: Path
    folder: str
    places = True

    def samples(self, images: Callable[[], bool]) -> Iterator[Raw]:
        """See Shard; the images are files, which are read when they are decoded."""
        inside = f"{self.folder}/" if self.folder else ""
        with os.scandir(self.root / self.folder) as entries:
            names = sorted(e.name for e in entries if _is_image(e.name) and not e.is_dir())
        return _rows_of(text_tables(self.root, (inside + name for name in names)), self.root)


@dataclass(frozen=True)
class ParquetShard:
    """One row group of a parquet file."""

    path: Path
    group: int
    split: str
    first: int
    """The number of the group's first row in the split."""
    image_column: str
    columns: Sequence[str]
    places = False

    def samples(self, images: Callable[[], bool]) -> Iterator[Raw]:
        """See Shard."""
        wanted = images()
        columns = list(dict.fromkeys((*self.columns, *([self.image_column] if wanted else ()))))
        try:
            with pq.ParquetFile(self.path, pre_buffer=False) as file:
                number = self.first
                if not columns:
                    for i in range(file.metadata.row_group(self.group).num_rows):
                        yield Raw(f"{self.split}:{number + i}", {}, None)
                    return
                for batch in file.iter_batches(
                    ROWS, row_groups=[self.group], columns=columns, use_threads=False
                ):
                    batch.validate(full=True)  # the texts are UTF-8
                    for row in batch.to_pylist():
                        data, fault = _embedded(row, self.image_column) if wanted else (None, None)
                        yield Raw(f"{self.split}:{number}", row, data, fault)
                        number += 1
        except pa.ArrowInvalid as error:
            message = " ".join(str(error).split())
            raise ValueError(f"{self.path} is no parquet file: {message}") from error


@dataclass(frozen=True)
class TableShard:
    """One of the files that a hub data set is made of, as `datasets` streams it."""

    rows: datasets.IterableDataset
    name: str
    home: str
    """How the addresses of the data set's own files begin."""
    image_column: str
    places = False

    def samples(self, images: Callable[[], bool]) -> Iterator[Raw]:
        """See Shard."""
        wanted = images()
        for number, row in enumerate(self.rows):
            data, fault = None, None
            if wanted:
                data, fault = _embedded(row, self.image_column, self.home)
            yield Raw(f"{self.name}/{number}", row, data, fault)


def _hub_shards(data: str, split: str, image_column: str, columns: Sequence[str]) -> Shards:
    """The shards of what `datasets` can stream."""
    try:
        builder = datasets.load_dataset_builder(data)
        loaded = builder.as_streaming_dataset()
    except ValueError as error:
        raise unreadable(data, error) from error
    assert isinstance(loaded, dict)
    check_split(data, split, loaded)
    rows = loaded[split]
    if rows.features is None:
        rows = rows._resolve_features()
    features = rows.features
    assert features is not None
    images = [name for name, kind in features.items() if holds_files(kind)]
    for name in images:
        rows = rows.cast_column(name, datasets.Image(decode=False))
    known = list(features)
    wanted = dict.fromkeys((image_column, *columns))
    rows = rows.select_columns([name for name in known if name in wanted])
    count = rows.num_shards
    files: Any = builder.config.data_files or {}
    key = [data, builder.hash, split, count]
    # The address of each file with its commit, or what its server says of its version.
    key += [[name, list(part), str(part.origin_metadata)] for name, part in files.items()]
    home = f"{datasets.config.HUB_DATASETS_HFFS_URL.partition('{')[0]}{data}@"
    shards = [
        TableShard(rows.shard(count, i), f"{split}:{i}", home, image_column) for i in range(count)
    ]
    return Shards(shards, known, images, False, _digest(key))


def _parquet_shards(
    root: Path, files: Sequence[str], split: str, image_column: str, columns: Sequence[str]
) -> Shards:
    """The row groups of all files, whose footers alone are read."""
    shards, first, schema = list[Shard](), 0, None
    for name in files:
        with pq.ParquetFile(root / name) as file:
            if schema is None:
                schema = file.schema_arrow
            elif missing := set(schema.names) - set(file.schema_arrow.names):
                raise ValueError(f"{root / name} has no column {min(missing)!r}, as other files do")
            for group in range(file.num_row_groups):
                shards.append(
                    ParquetShard(root / name, group, split, first, image_column, tuple(columns))
                )
                first += file.metadata.row_group(group).num_rows
    assert schema is not None
    features = datasets.Features.from_arrow_schema(schema)
    images = [name for name, kind in features.items() if holds_files(kind)]
    fingerprint = _digest(["parquet", split, _looked_at(root, files)])
    return Shards(shards, schema.names, images, True, fingerprint)


def _rows_of(tables: Iterator[pa.Table], root: Path) -> Iterator[Raw]:
    for table in tables:
        for batch in table.to_batches(max_chunksize=ROWS):
            for row in batch.to_pylist():
                name = row["file_name"]
                yield Raw(name, row, Place(root, name), _fault(row))


def _fault(row: Mapping[str, Any]) -> BadSample | None:
    """What the readers of metadata noted."""
    reason = row.get("_fault")
    return None if reason is None else BadSample(reason, row.get("_detail") or "")


def _embedded(
    row: dict[str, Any], column: str, home: str | None = None
) -> tuple[bytes | None, BadSample | None]:
    """The file in a cell, taken out of the row, or what is wrong with it.

    A row may name a file only of its own data set at the hub, loose or in a zip.
    """
    file = row.pop(column)
    if file is None or (file["bytes"] is None and file["path"] is None):
        return None, BadSample("missing image")
    if file["bytes"] is not None:
        return file["bytes"], None
    *archive, address = file["path"].split("::")
    if home is None or not address.startswith(home) or any(a[:6] != "zip://" for a in archive):
        return None, BadSample("leads outside", file["path"])
    try:
        with xopen(file["path"], "rb") as opened:
            return opened.read(), None
    except FileNotFoundError:
        return None, BadSample("missing image", file["path"])


def _folders(place: Path, root: Path) -> list[str]:
    """The folders that have images, relative to the root, sorted; "" is the root itself."""
    found = []
    for folder, inner, names in os.walk(place):
        inner[:] = [name for name in inner if not name.startswith(".")]
        if any(map(_is_image, names)):
            found.append(Path(folder).relative_to(root).as_posix().removeprefix("."))
    if not found:
        raise ValueError(f"data={str(root)!r} holds no images")
    return sorted(found)


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES


def _looked_at(root: Path, files: Sequence[str]) -> list[tuple[str, int, int]]:
    return [(name, *file_times(root / name)) for name in files]


def _digest(key: object) -> str:
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()
