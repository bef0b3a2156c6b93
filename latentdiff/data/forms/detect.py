"""Detects the form of a data set by its files, and opens its splits."""

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetsError

from latentdiff.data.forms.embedded import EmbeddedIndex
from latentdiff.data.forms.file_index import FileIndex
from latentdiff.data.forms.files import find_files, images_in, is_image
from latentdiff.data.forms.folder import Folder
from latentdiff.data.forms.form import Shards, check_split, unreadable
from latentdiff.data.forms.hub import Hub, check_id
from latentdiff.data.forms.metadata import METADATA
from latentdiff.data.forms.parquet import Parquet
from latentdiff.data.forms.webdataset import Tars

Form = Folder | Tars | Parquet | Hub
"""One split of a data set, with `index(columns)` for random access and `shards()` for reading in
order. Both raise ValueError when the split's metadata is broken."""
Index = FileIndex | EmbeddedIndex
# Words by which folders, or else files, belong to a split, as the datasets library has them.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
SUFFIXES = (".tar", ".parquet", *COMPRESSED)


def splits(data: str) -> list[str]:
    """List the names of a data set's splits. Raises ValueError when it cannot be read."""
    with _readable(data):
        if Path(data).exists():
            return sorted(_local_splits(data))
        check_id(data)
        return sorted(Hub.load(data))


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
        check_id(data)
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
    tars, tables = _by_split(files, ".tar"), _by_split(files, ".parquet")
    if metadata:
        _warn_of_unused(root, f"images that {metadata[0]!r} lists", chain(*tars.values()))
    elif tars or tables:
        loose = images_in(root, root) if Path(data).is_dir() else ()
        _warn_of_unused(root, f"images in {'tars' if tars else 'parquet files'}", loose)
        if tars:
            return {split: Tars(root, split, names) for split, names in tars.items()}
        return {split: Parquet(root, split, tables) for split in tables}
    if Path(data).is_file() or any(name.endswith(COMPRESSED) for name in files):
        raise ValueError(
            f"data={data!r} must be a folder, .tar or .parquet files, or a hub data set; "
            "compressed tars have no random access: unpack them to .tar"
        )
    folders = _split_folders(root)
    if not folders:
        return {"train": Folder(root, "train", "", metadata)}
    named = list(folders.values())
    _warn_of_unused(root, f"the splits {', '.join(named)}", _images_beside(root, named))
    return {
        split: Folder(
            root,
            split,
            f"{folder}/",
            # A file of the root may list the images of several splits.
            [name for name in metadata if "/" not in name]
            + find_files(root / folder, root, METADATA.__contains__),
        )
        for split, folder in folders.items()
    }


def _split_folders(root: Path) -> dict[str, str]:
    """Map each split to its folder. Raises ValueError for a split with two of them."""
    folders = dict[str, str]()
    for split, words in SPLITS.items():
        found = [word for word in words if (root / word).is_dir()]
        if len(found) > 1:
            raise ValueError(f"data={str(root)!r} has two folders of one split: {found}")
        if found:
            folders[split] = found[0]
    return folders


def _images_beside(root: Path, folders: Sequence[str]) -> Iterator[str]:
    """Yield the images that are in none of the folders below the root; links are not followed."""
    for entry in sorted(root.iterdir()):
        if entry.name[0] != "." and entry.name not in folders and not entry.is_symlink():
            if entry.is_dir():
                yield from images_in(entry, root)
            elif is_image(entry.name):
                yield entry.name


def _warn_of_unused(root: Path, reason: str, names: Iterable[str]) -> None:
    """Warn of files that hold images and are of no split, if there are any."""
    first = next(iter(names), None)
    if first is not None:
        warnings.warn(
            f"data={str(root)!r} has {reason}, so that others are not used, such as {first!r}",
            stacklevel=1,  # of one place, so that opening the data again does not repeat it
        )


def _by_split(files: Sequence[str], suffix: str) -> dict[str, list[str]]:
    """Group the files with the suffix by the split of which a word is in their name.

    Where the name has none, the words of its folders count, the nearest first; files whose path
    names no split are `train`.
    """
    groups: dict[str, list[str]] = {}
    for name in files:
        if name.endswith(suffix):
            parts = (set(re.findall("[a-z]+", part.lower())) for part in name.split("/")[::-1])
            named = (s for words in parts for s, known in SPLITS.items() if words & set(known))
            groups.setdefault(next(named, "train"), []).append(name)
    return groups
