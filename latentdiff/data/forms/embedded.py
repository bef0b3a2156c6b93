"""Tables whose cells hold image files, as `datasets` writes them: `{"bytes": …, "path": …}`."""

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
    """Random access to a table whose rows hold the image files; its interface is FileIndex's."""

    def __init__(self, rows: datasets.Dataset, split: str) -> None:
        self.image_columns = image_columns(rows.features)
        self.rows, self.split = undecoded(rows), split
        self.columns = list(rows.column_names)
        self.faults: dict[int, BadSample] = {}
        self._files = {name: self.rows.select_columns([name]) for name in self.image_columns}

    def name(self, index: int) -> str:
        """Return a row's name: the split and its number."""
        return f"{self.split}:{index}"

    def names(self) -> Iterator[str]:
        """Yield all names, in order."""
        return map(self.name, range(len(self.rows)))

    def read(self, index: int, column: str) -> bytes:
        """Return the bytes of a row's image file. Raises BadSample when there is none."""
        return _file_of(self._files[column][index][column], _read_cached)

    def unlisted(self) -> list[str]:
        """Return no files: every image belongs to a row."""
        return []


def image_columns(features: Mapping[str, Any]) -> list[str]:
    """List the columns that hold images, in the form in which `datasets` writes them to parquet."""
    return [
        name
        for name, kind in features.items()
        if isinstance(kind, datasets.Image)
        or (isinstance(kind, Mapping) and set(kind) == {"bytes", "path"})
    ]


def undecoded(rows: Rows) -> Rows:
    """Return the same rows with `{"bytes", "path"}` in place of decoded images."""
    assert rows.features is not None
    for name in image_columns(rows.features):
        rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows


def embedded_record(
    name: str, row: dict[str, Any], column: str, *, wanted: bool, read: Callable[[str], bytes]
) -> Record:
    """Return the record of a row, with its image file if that is `wanted`.

    `read(path)` returns the bytes of a file that the row names by its path, or raises BadSample.
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
    """Read a file that a row names. Raises BadSample unless it lies in the hub's cache.

    Image folders of the hub name such files; any other path would disclose a local file.
    """
    path = Path(name).resolve()
    caches = (datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE)
    if not any(is_inside(path, Path(cache)) for cache in caches):
        raise BadSample("leads outside", name)
    return FileRange(path.parent, path.name).read()
