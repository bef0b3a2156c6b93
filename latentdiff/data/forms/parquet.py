"""Parquet files whose rows hold the image files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from latentdiff.data.decode import BadSample
from latentdiff.data.forms.embedded import EmbeddedIndex, embedded_record, image_columns
from latentdiff.data.forms.form import Record, Shard, Shards, digest, file_stamps

ROWS = 64  # rows, with their images, in memory at a time


@dataclass(frozen=True)
class Parquet:
    """A split of parquet files below `root`."""

    root: Path
    split: str
    splits: Mapping[str, Sequence[str]]
    """The files of every split."""

    def index(self, columns: Sequence[str]) -> EmbeddedIndex:
        """Open the split for random access; `datasets` copies all splits into its cache, once.

        Columns that not all files have, or not in one form, are left out. Raises ValueError when
        one of `columns` is among them.
        """
        files = {split: [str(self.root / f) for f in fs] for split, fs in self.splits.items()}
        schemas = {path: pq.read_schema(path) for paths in files.values() for path in paths}
        schema = _common(schemas, columns)
        first = next(iter(schemas.values()))
        alike = {} if schema.equals(first) else {"columns": schema.names}
        if alike:  # what agrees has no options, and so keeps its copy in the cache
            alike["features"] = datasets.Features.from_arrow_schema(schema)
        loaded = datasets.load_dataset("parquet", data_files=files, **alike)
        return EmbeddedIndex(loaded[self.split], self.split)

    def shards(self, image_column: str, columns: Sequence[str]) -> Shards:
        """Open the split as shards: the row groups of all files, of which the footers are read."""
        files = self.splits[self.split]
        shards, first, schemas = list[Shard](), 0, dict[str, pa.Schema]()
        for path in (self.root / name for name in files):
            with pq.ParquetFile(path) as file:
                schemas[str(path)] = file.schema_arrow
                for group in range(file.num_row_groups):
                    shards.append(
                        RowGroup(path, group, self.split, first, image_column, tuple(columns))
                    )
                    first += file.metadata.row_group(group).num_rows
        schema = _common(schemas, [image_column, *columns])
        features = datasets.Features.from_arrow_schema(schema)
        fingerprint = digest(["parquet", self.split, file_stamps(self.root, files)])
        return Shards(shards, schema.names, image_columns(features), fingerprint)


def _common(schemas: Mapping[str, pa.Schema], columns: Sequence[str]) -> pa.Schema:
    """Return the columns that all files have, in a form that holds what each has.

    `schemas` are those of the files by their paths. Raises ValueError, with the file, for one of
    `columns` that a file lacks or has in another form; others of this kind are left out.
    """
    (first, common), *others = schemas.items()
    for path, schema in others:
        for name in dict.fromkeys((*common.names, *schema.names)):
            without = [p for p, s in ((first, common), (path, schema)) if name not in s.names]
            if without:
                fault = f"{without[0]} has no column {name!r}, as other files do"
            else:
                kinds = [pa.schema([s.field(name)]).remove_metadata() for s in (common, schema)]
                at = common.get_field_index(name)
                try:
                    wider = pa.unify_schemas(kinds, promote_options="permissive")
                    common = common.set(at, wider.field(name))
                    continue
                except (pa.ArrowInvalid, pa.ArrowTypeError):
                    types = [kind.field(name).type for kind in kinds]
                    fault = f"{path} has {types[1]} in the column {name!r}, {first} {types[0]}"
            if name in columns:
                raise ValueError(fault)
            if name in common.names:
                common = common.remove(common.get_field_index(name))
    return common


@dataclass(frozen=True)
class RowGroup:
    """One row group of a parquet file."""

    path: Path
    group: int
    split: str
    first: int
    """The number of the group's first row in the split."""
    image_column: str
    columns: Sequence[str]
    seekable = False

    def records(self, images: Callable[[], bool]) -> Iterator[Record]:
        """Yield the samples in order, see Shard."""
        wanted = images()
        columns = list(dict.fromkeys((*self.columns, *([self.image_column] if wanted else ()))))
        try:
            with pq.ParquetFile(self.path, pre_buffer=False) as file:
                number = self.first
                if not columns:
                    for i in range(file.metadata.row_group(self.group).num_rows):
                        yield Record(f"{self.split}:{number + i}", {}, None)
                    return
                for batch in file.iter_batches(
                    ROWS, row_groups=[self.group], columns=columns, use_threads=False
                ):
                    batch.validate(full=True)  # the texts are UTF-8
                    for row in batch.to_pylist():
                        yield embedded_record(
                            f"{self.split}:{number}",
                            row,
                            self.image_column,
                            wanted=wanted,
                            read=_refuse,
                        )
                        number += 1
        except pa.ArrowInvalid as error:
            message = " ".join(str(error).split())
            raise ValueError(f"{self.path} is no parquet file: {message}") from error


def _refuse(path: str) -> bytes:
    """Raise BadSample: no row of a parquet file may name another file."""
    raise BadSample("leads outside", path)
