"""Data sets of the Hugging Face Hub."""

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import datasets.config
from datasets.utils.file_utils import xopen

from latentdiff.data.decode import BadSample
from latentdiff.data.forms.embedded import (
    EmbeddedIndex,
    embedded_record,
    image_columns,
    undecoded,
)
from latentdiff.data.forms.form import Record, Shard, Shards, check_split, digest, unreadable


def check_id(data: str) -> None:
    """Raise ValueError, before the hub is asked, for what is no id of it: a path that is not there.

    An id is owner/name, with no folder called like its owner here, in which a name was mistyped.
    """
    path = Path(data)
    owner, _, name = data.partition("/")
    plain = all(re.fullmatch(r"[A-Za-z0-9][\w.-]*", part) for part in (owner, name))
    if plain and not Path(owner).is_dir():
        return
    beside = path.parent if path.parent.is_dir() else Path()
    here = [entry.name for entry in beside.iterdir() if entry.name[0] != "."]
    near = difflib.get_close_matches(path.name, here, n=1)
    meant = f"; did you mean {str(path.parent / near[0])!r}?" if near else "."
    raise ValueError(
        f"data={data!r} is no file or folder here{meant} A data set of the hub is named owner/name"
    )


@dataclass(frozen=True)
class Hub:
    """A split of the hub's data set with the id `data`."""

    data: str
    split: str

    @staticmethod
    def load(data: str) -> Any:
        """Download and load all splits. Raises ValueError when there is no such data set."""
        try:
            return datasets.load_dataset(data)
        except ValueError as error:
            raise unreadable(data, error) from error

    def index(self, columns: Sequence[str]) -> EmbeddedIndex:
        """Open the split for random access, with all columns; it is downloaded once."""
        loaded = self.load(self.data)
        check_split(self.data, self.split, loaded)
        return EmbeddedIndex(loaded[self.split], self.split)

    def shards(self, image_column: str, columns: Sequence[str]) -> Shards:
        """Open the split as shards: the files that `datasets` can stream."""
        try:
            builder = datasets.load_dataset_builder(self.data)
            loaded = builder.as_streaming_dataset()
        except ValueError as error:
            raise unreadable(self.data, error) from error
        assert isinstance(loaded, dict)
        check_split(self.data, self.split, loaded)
        rows = loaded[self.split]
        if rows.features is None:
            rows = rows._resolve_features()
        features = rows.features
        assert features is not None
        rows = undecoded(rows)
        wanted = (image_column, *columns)
        rows = rows.select_columns([name for name in features if name in wanted])
        count = rows.num_shards
        files: Any = builder.config.data_files or {}
        key = [self.data, builder.hash, self.split, count]
        # Each file's address with its commit, or the version that its server reports.
        key += [[name, list(paths), str(paths.origin_metadata)] for name, paths in files.items()]
        address = f"{datasets.config.HUB_DATASETS_HFFS_URL.partition('{')[0]}{self.data}@"
        shards: list[Shard] = [
            HubShard(rows.shard(count, i), f"{self.split}:{i}", address, image_column)
            for i in range(count)
        ]
        return Shards(
            shards, list(features), image_columns(features), digest(key), named_as_in_index=False
        )


@dataclass(frozen=True)
class HubShard:
    """One file of a hub data set, as `datasets` streams it."""

    rows: datasets.IterableDataset
    name: str
    address: str
    """The prefix of the addresses of this data set's files."""
    image_column: str
    seekable = False

    def records(self, images: Callable[[], bool]) -> Iterator[Record]:
        """Yield the samples in order, see Shard."""
        wanted = images()
        for number, row in enumerate(self.rows):
            name = f"{self.name}/{number}"
            yield embedded_record(name, row, self.image_column, wanted=wanted, read=self._read)

    def _read(self, path: str) -> bytes:
        """Read a file of this data set from the hub, also out of a zip; BadSample for any other."""
        *archive, address = path.split("::")
        if not address.startswith(self.address) or any(a[:6] != "zip://" for a in archive):
            raise BadSample("leads outside", path)
        try:
            with xopen(path, "rb") as file:
                return file.read()
        except FileNotFoundError as error:
            raise BadSample("missing image", path) from error
