"""Folders of images, with captions in metadata files, in a .txt file beside each image, or none."""

import hashlib
import os
import stat
import warnings
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import datasets
import pyarrow as pa

from latentdiff.data.decode import FORMATS, BadSample
from latentdiff.data.forms.file_index import FileIndex
from latentdiff.data.forms.files import (
    CAPTION,
    caption_beside,
    captions_of_images,
    captions_without_image,
    images_in,
    is_image,
    walk,
)
from latentdiff.data.forms.form import (
    FileRange,
    Record,
    Shards,
    digest,
    file_stamp,
    file_stamps,
    is_inside,
    noted_fault,
    on_disk,
)
from latentdiff.data.forms.metadata import metadata_tables, text_tables
from latentdiff.data.forms.table import cached_table

ROWS = 64  # rows of a metadata file that are converted at a time while it is streamed
SHOWN = 3  # names of files in a warning


@dataclass(frozen=True)
class Folder:
    """The images below `root / folder`: those that metadata files list or, without any, all."""

    root: Path
    split: str
    folder: str
    """The split's folder with a `/` at the end; empty if the root has no split folders."""
    metadata: Sequence[str]
    """The metadata files in the folder, and one of the root that lists images of several splits."""

    def index(self, columns: Sequence[str]) -> FileIndex:
        """Open the folder for random access; the size and time of every image file are read."""
        metadata = self.metadata
        folders = {name.rpartition("/")[0] for name in metadata}
        if len(folders) < len(metadata):
            raise ValueError(
                f"data={str(self.root)!r} has two metadata files in one folder: {metadata}"
            )
        self._warn_of_unused()
        if metadata:
            names, key = [], [file_stamps(self.root, metadata), sorted(columns)]
        else:
            names = images_in(self.root / self.folder, self.root)
            key = _texts_digest(self.root, names)
            if not names:
                raise ValueError(_no_images(self.root))

        def tables() -> Iterator[pa.Table]:
            if not metadata:
                return text_tables(self.root, names)
            return chain.from_iterable(self._tables_of(columns, name) for name in metadata)

        resolved = str(self.root.resolve())
        rows = cached_table(resolved, [self.folder.removesuffix("/"), key], tables)
        missing, fingerprint = _stat_images(self.root, rows)
        index = FileIndex(
            datasets.Dataset(rows.data, fingerprint=fingerprint),
            self.root,
            folder=self.root / self.folder,
            listed=bool(metadata),
        )
        index.faults = missing | index.faults
        return index

    def shards(self, image_column: str, columns: Sequence[str]) -> Shards:
        """Open the folder as shards: one for each metadata file, or for each folder with images."""
        self._warn_of_unused()
        if self.metadata:
            files, tables_of = self.metadata, partial(self._tables_of, columns)
        else:
            files = _folders_with_images(self.root / self.folder, self.root)
            tables_of = partial(_tables_of_folder, self.root)
        shards = [FolderShard(self.root, partial(tables_of, file)) for file in files]
        fingerprint = digest(["folder", self.split, file_stamps(self.root, files)])
        return Shards(shards, None, ["image"], fingerprint)

    def _tables_of(self, columns: Sequence[str], metadata: str) -> Iterator[pa.Table]:
        inside = metadata.rpartition("/")[0]
        return metadata_tables(self.root / metadata, inside, columns, within=self.folder)

    def _warn_of_unused(self) -> None:
        """Warn of captions that metadata go before, else of captioned files that are no images."""
        folder = self.root / self.folder
        if self.metadata:
            unused = captions_of_images(folder, self.root)
            what = "text files beside images"
            why = f"the captions are those of {self.metadata[0]}; take that away to use the files"
        else:
            lonely = captions_without_image(folder, self.root)
            unused = [name for name in lonely if not name.lower().endswith(CAPTION)]
            what = "files with a caption"
            formats = ", ".join(FORMATS)
            why = f"their names are no image's; convert them to {formats}, or rename them"
        if unused:
            more = ", …" if len(unused) > SHOWN else ""
            warnings.warn(
                f"data={str(self.root)!r}: {len(unused)} {what} are not used "
                f"({', '.join(map(repr, unused[:SHOWN]))}{more}): {why}",
                stacklevel=2,
            )


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


def _tables_of_folder(root: Path, folder: str) -> Iterator[pa.Table]:
    inside = f"{folder}/" if folder else ""
    with os.scandir(root / folder) as entries:
        names = sorted(e.name for e in entries if is_image(e.name) and not e.is_dir())
    return text_tables(root, (inside + name for name in names))


def _texts_digest(root: Path, names: Sequence[str]) -> str:
    """SHA-256 of the images' names and the stamps of the text files beside them."""
    key = hashlib.sha256()
    for name in names:
        text = caption_beside(root, name)
        stamp = None if text is None else file_stamp(text)
        key.update(f"{name}/{stamp}".encode("utf-8", "surrogateescape"))
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
            name = on_disk(root, name)
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
    above = "" if folder == root else folder.relative_to(root).as_posix()
    folders = [
        f"{above}/{inside}".strip("/")
        for inside, names in walk(folder, root)
        if any(map(is_image, names))
    ]
    if not folders:
        raise ValueError(_no_images(root))
    return sorted(folders)


def _no_images(root: Path) -> str:
    saved = any((root / name).is_file() for name in ("state.json", "dataset_dict.json"))
    hint = (
        "; it was written by datasets' save_to_disk: write it with to_parquet instead"
        if saved
        else ""
    )
    return f"data={str(root)!r} holds no images{hint}"
