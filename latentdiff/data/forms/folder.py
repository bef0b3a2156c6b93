"""Folders of images, with captions in metadata files, in a .txt file beside each image, or none."""

import hashlib
import os
import stat
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import datasets
import pyarrow as pa

from latentdiff.data.decode import BadSample
from latentdiff.data.forms.file_index import FileIndex
from latentdiff.data.forms.form import (
    FileRange,
    Record,
    Shards,
    digest,
    file_stamp,
    file_stamps,
    is_inside,
    noted_fault,
)
from latentdiff.data.forms.metadata import images_in, is_image, metadata_tables, text_tables
from latentdiff.data.forms.table import cached_table

ROWS = 64  # rows of a metadata file that are converted at a time while it is streamed


@dataclass(frozen=True)
class Folder:
    """The images below `root / folder`: those that metadata files list or, without any, all."""

    root: Path
    split: str
    folder: str
    """The split's folder with a `/` at the end; empty if the root has no split folders."""
    metadata: Sequence[str]

    def index(self) -> FileIndex:
        """Open the folder for random access; the size and time of every image file are read."""
        data, metadata = str(self.root), self.metadata
        folders = {name.rpartition("/")[0] for name in metadata}
        if len(folders) < len(metadata):
            raise ValueError(f"data={data!r} has two metadata files in one folder: {metadata}")
        if metadata:
            names, key = [], file_stamps(self.root, metadata)
        else:
            names = images_in(self.root / self.folder, self.root)
            key = _texts_digest(self.root, names)
            if not names:
                raise ValueError(f"data={data!r} holds no images")

        def tables() -> Iterator[pa.Table]:
            if not metadata:
                return text_tables(self.root, names)
            return chain.from_iterable(_tables_of(self.root, name) for name in metadata)

        resolved = str(self.root.resolve())
        rows = cached_table(resolved, [self.folder.removesuffix("/"), key], tables)
        missing, fingerprint = _stat_images(self.root, rows)
        index = FileIndex(
            datasets.Dataset(rows.data, fingerprint=fingerprint),
            self.root,
            described=self.root / self.folder if metadata else None,
        )
        index.faults = missing | index.faults
        return index

    def shards(self, image_column: str, columns: Sequence[str]) -> Shards:
        """Open the folder as shards: one for each metadata file, or for each folder with images."""
        files = self.metadata or _folders_with_images(self.root / self.folder, self.root)
        tables_of = _tables_of if self.metadata else _tables_of_folder
        shards = [FolderShard(self.root, partial(tables_of, self.root, file)) for file in files]
        fingerprint = digest(["folder", self.split, file_stamps(self.root, files)])
        return Shards(shards, None, ["image"], fingerprint)


@dataclass(frozen=True)
class FolderShard:
    """The images that a metadata file lists, or those of one folder without its subfolders."""

    root: Path
    tables: Callable[[], Iterator[pa.Table]]
    seekable = True

    def records(self, images: Callable[[], bool]) -> Iterator[Record]:
        """Yield the samples, see Shard; image files are read when they are decoded."""
        for table in self.tables():
            for batch in table.to_batches(max_chunksize=ROWS):
                for row in batch.to_pylist():
                    name = row["file_name"]
                    yield Record(name, row, FileRange(self.root, name), noted_fault(row))


def _tables_of(root: Path, metadata: str) -> Iterator[pa.Table]:
    return metadata_tables(root / metadata, metadata.rpartition("/")[0])


def _tables_of_folder(root: Path, folder: str) -> Iterator[pa.Table]:
    inside = f"{folder}/" if folder else ""
    with os.scandir(root / folder) as entries:
        names = sorted(e.name for e in entries if is_image(e.name) and not e.is_dir())
    return text_tables(root, (inside + name for name in names))


def _texts_digest(root: Path, names: Sequence[str]) -> str:
    """SHA-256 of the images' names and the stamps of the text files beside them."""
    key = hashlib.sha256()
    for name in names:
        text = (root / name).with_suffix(".txt")
        key.update(f"{name}/{file_stamp(text) if text.is_file() else None}".encode())
    return key.hexdigest()


def _stat_images(root: Path, rows: datasets.Dataset) -> tuple[dict[int, BadSample], str]:
    """Find missing images, by row, and hash the rows with all images' sizes and times."""
    faults: dict[int, BadSample] = {}
    key = hashlib.sha256(rows._fingerprint.encode())
    prefix, number = f"{root}/", 0
    inside = {"": True}  # whether a folder, which may be a link, is inside the root
    for chunk in rows.data.column("file_name").chunks:
        stamps = array("q")
        for name in chunk.to_pylist():
            folder = name.rpartition("/")[0] if "/" in name else ""
            if folder not in inside:
                inside[folder] = is_inside(root / folder, root)
            try:
                status = os.lstat(prefix + name)
                within = inside[folder]
                if stat.S_ISLNK(status.st_mode):
                    status = os.stat(prefix + name)
                    within = is_inside(root / name, root)
                if not within or not stat.S_ISREG(status.st_mode):
                    faults[number] = BadSample("missing image" if within else "leads outside")
                stamps.extend((status.st_size, status.st_mtime_ns))
            except OSError:
                faults[number] = BadSample("missing image")
            number += 1
        key.update(stamps.tobytes())
    return faults, key.hexdigest()[:16]


def _folders_with_images(folder: Path, root: Path) -> list[str]:
    """List the folders that have images, relative to the root, sorted; "" is the root itself."""
    folders = []
    for path, inner, names in os.walk(folder):
        inner[:] = [name for name in inner if not name.startswith(".")]
        if any(map(is_image, names)):
            folders.append(Path(path).relative_to(root).as_posix().removeprefix("."))
    if not folders:
        raise ValueError(f"data={str(root)!r} holds no images")
    return sorted(folders)
