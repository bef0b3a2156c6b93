"""Detects the form of a data set by its files, and opens its splits."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetsError

from latentdiff.data.forms.embedded import EmbeddedIndex
from latentdiff.data.forms.file_index import FileIndex
from latentdiff.data.forms.files import find_files
from latentdiff.data.forms.folder import Folder
from latentdiff.data.forms.form import Shards, check_split, unreadable
from latentdiff.data.forms.hub import Hub
from latentdiff.data.forms.metadata import METADATA
from latentdiff.data.forms.parquet import Parquet
from latentdiff.data.forms.webdataset import Tars

Form = Folder | Tars | Parquet | Hub
"""One split of a data set, with `index(columns)` for random access and `shards()` for reading in
order. Both raise ValueError when the split's metadata is broken."""
Index = FileIndex | EmbeddedIndex
SPLITS = ("train", "validation", "test")  # names of folders, or words in file names
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
SUFFIXES = (".tar", ".parquet", *COMPRESSED)


def splits(data: str) -> list[str]:
    """List the names of a data set's splits. Raises ValueError when it cannot be read."""
    with _readable(data):
        return sorted(_local_splits(data) if Path(data).exists() else Hub.load(data))


def open_index(data: str, split: str, *, columns: Sequence[str]) -> Index:
    """Open a split of a folder, of tar or parquet files, or of a hub data set for random access.

    Of metadata beside images only `columns` are read; the others have their names alone. Raises
    ValueError when there is no such data or split, or its metadata is broken.
    """
    with _readable(data):
        return _form(data, split).index(columns)


def open_shards(data: str, split: str, *, image_column: str, columns: Sequence[str]) -> Shards:
    """Open a split as shards: tars, row groups, metadata files, folders, or the hub's files.

    Of tables only `image_column` and `columns` are read. Raises ValueError when there is no such
    data or split.
    """
    with _readable(data):
        return _form(data, split).shards(image_column, columns)


def _form(data: str, split: str) -> Form:
    if not Path(data).exists():
        return Hub(data, split)
    local = _local_splits(data)
    check_split(data, split, local)
    return local[split]


@contextmanager
def _readable(data: str) -> Iterator[None]:
    datasets.disable_progress_bars()
    try:
        yield
    except (OSError, DatasetsError, pa.ArrowException) as error:
        raise unreadable(data, error) from error


def _local_splits(data: str) -> dict[str, Form]:
    """Find the splits of a file or folder on disk. Raises ValueError for unsupported files."""
    root = Path(data)
    if root.is_file():
        files = [root.name] if root.name.endswith(SUFFIXES) else []
        root = root.parent
    else:
        files = find_files(root, root, lambda name: name in METADATA or name.endswith(SUFFIXES))
    metadata = [name for name in files if name.rpartition("/")[2] in METADATA]
    if not metadata:
        if tars := _by_split(files, ".tar"):
            return {split: Tars(root, split, names) for split, names in tars.items()}
        if tables := _by_split(files, ".parquet"):
            return {split: Parquet(root, split, tables) for split in tables}
    if Path(data).is_file() or any(name.endswith(COMPRESSED) for name in files):
        raise ValueError(
            f"data={data!r} must be a folder, .tar or .parquet files, or a hub data set; "
            "compressed tars have no random access: unpack them to .tar"
        )
    folders = {split: f"{split}/" for split in SPLITS if (root / split).is_dir()}
    return {
        split: Folder(root, split, folder, [name for name in metadata if name.startswith(folder)])
        for split, folder in (folders or {"train": ""}).items()
    }


def _by_split(files: Sequence[str], suffix: str) -> dict[str, list[str]]:
    """Group the files with the suffix by the split whose name is a word of their path.

    Files whose path names no split are `train`.
    """
    groups: dict[str, list[str]] = {}
    for name in files:
        if name.endswith(suffix):
            words = name.replace("/", " ").replace("-", " ").replace("_", " ").split()
            split = next((split for split in SPLITS if split in words), "train")
            groups.setdefault(split, []).append(name)
    return groups
