"""Images in the cells of a table, as `datasets` writes them: `{"bytes": …, "path": …}`."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import datasets
import datasets.config
from huggingface_hub.constants import HF_HUB_CACHE

from latentdiff.data.decode import BadSample
from latentdiff.data.forms.form import FileRange, Record, is_inside

Rows = TypeVar("Rows", datasets.Dataset, datasets.IterableDataset)


class EmbeddedIndex:
    """An Index of a table whose rows hold the images' files themselves."""

    def __init__(self, rows: datasets.Dataset, split: str) -> None:
        self.image_columns = image_columns(rows.features)
        self.rows, self.split = undecoded(rows), split
        self.columns = list(rows.column_names)
        self.faults: dict[int, BadSample] = {}
        self._files = {name: self.rows.select_columns([name]) for name in self.image_columns}

    def name(self, index: int) -> str:
        """See FileIndex."""
        return f"{self.split}:{index}"

    def names(self) -> Iterator[str]:
        """See FileIndex."""
        return map(self.name, range(len(self.rows)))

    def read(self, index: int, column: str) -> bytes:
        """See FileIndex."""
        return _file_of(self._files[column][index][column], _read_cached)

    def unlisted(self) -> list[str]:
        """See FileIndex."""
        return []


def image_columns(features: Mapping[str, Any]) -> list[str]:
    """The columns of images, as `datasets` writes them to parquet."""
    return [
        name
        for name, kind in features.items()
        if isinstance(kind, datasets.Image)
        or (isinstance(kind, Mapping) and set(kind) == {"bytes", "path"})
    ]


def undecoded(rows: Rows) -> Rows:
    """The same rows, with the bytes of images instead of images."""
    assert rows.features is not None
    for name in image_columns(rows.features):
        rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def embedded_record(
    name: str, row: dict[str, Any], column: str, *, wanted: bool, read: Callable[[str], bytes]
) -> Record:
    """The record of a row, whose image is taken out of it if it is wanted.

    `read` gives the file at a path, where a row names one, or raises BadSample.
    """
    if not wanted:
        return Record(name, row, None)
    try:
        return Record(name, row, _file_of(row.pop(column), read))
    except BadSample as fault:
        return Record(name, row, None, fault)


def _file_of(cell: Mapping[str, Any] | None, read: Callable[[str], bytes]) -> bytes:
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise BadSample("missing image")
    return read(cell["path"]) if cell["bytes"] is None else cell["bytes"]


def _read_cached(name: str) -> bytes:
    """Read a file of the hub's cache, which its image folders name; another one would be a trap."""
    path = Path(name).resolve()
    caches = (datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE)
    if not any(is_inside(path, Path(cache)) for cache in caches):
        raise BadSample("leads outside", name)
    return FileRange(path.parent, path.name).read()
