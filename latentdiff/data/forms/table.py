"""Memory-mapped tables of samples on disk, which are written once and then opened at once."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets.config
import pyarrow as pa
from datasets.table import MemoryMappedTable

VERSION = 2  # version of the readers of metadata; tables of other versions are written anew
ROWS = 20_000  # rows in memory at a time


def cached_table(
    data: str, key: object, tables: Callable[[], Iterable[pa.Table]]
) -> datasets.Dataset:
    """Return the rows of all tables, memory-mapped from a file in `datasets`' cache folder.

    `data` is the name in error messages. `key`, serializable as JSON, identifies the content of the
    tables (files with sizes and times); the same key opens the file that was written before.
    `tables` may be called more than once.

    Raises ValueError when a column holds values of different kinds, or there are no rows.
    """
    digest = hashlib.sha256(json.dumps([VERSION, data, key]).encode()).hexdigest()
    path = Path(datasets.config.HF_DATASETS_CACHE) / "latentdiff" / f"{digest[:32]}.arrow"
    if not path.is_file():
        try:
            _write(path, tables)
        except _Kinds as error:
            raise ValueError(f"data={data!r}: {error}") from error
    return datasets.Dataset(MemoryMappedTable.from_file(str(path)), fingerprint=digest[:16])


def batched(rows: Iterable[dict[str, Any]], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Yield rows as tables of up to ROWS rows, with a column for each key that any row has.

    Only `file_name`, `columns` and a reader's own columns, whose names begin with `_`, have values.
    The others are empty and tell their names alone: whatever they hold does no harm.
    """
    rows = iter(rows)
    while batch := list(islice(rows, ROWS)):
        names = dict.fromkeys(name for row in batch for name in row)
        table = {}
        for name in names:
            if is_kept(name, columns):
                table[name] = _column(batch, name)
            else:
                table[name.encode("utf-8", "replace").decode("utf-8")] = pa.nulls(len(batch))
        yield pa.table(table)


def is_kept(name: str, columns: Sequence[str]) -> bool:
    """Whether a table has the values of a column, and not only its name."""
    return name == "file_name" or name in columns or name.startswith("_")


def _column(batch: Sequence[Mapping[str, Any]], name: str) -> pa.Array:
    try:
        return pa.array([row.get(name) for row in batch])
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        kinds = dict[str, str]()
        for row in batch:
            if row.get(name) is not None:
                kinds.setdefault(type(row[name]).__name__, row["file_name"])
        if len(kinds) > 1:
            found = ", ".join(f"a {kind} in {file!r}" for kind, file in kinds.items())
            raise _Kinds(f"the column {name!r} holds different kinds of values: {found}") from error
        message = " ".join(str(error).split())
        raise _Kinds(f"the column {name!r} cannot be read: {message}") from error


class _Kinds(ValueError):
    """Rows that do not form a table."""


def _write(path: Path, tables: Callable[[], Iterable[pa.Table]]) -> None:
    """Write a file atomically; of several processes that write at once, the last one's stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=".index-", dir=path.parent)
    os.close(descriptor)
    try:
        schema = None
        while (wider := _attempt(Path(name), tables, schema)) is not None:
            schema = wider  # a column that was empty so far has text further down: start again
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _attempt(
    path: Path, tables: Callable[[], Iterable[pa.Table]], schema: pa.Schema | None
) -> pa.Schema | None:
    """Write all rows with the schema; return None, or the wider schema that the rows need."""
    writer = None
    try:
        for table in tables():
            wider = _wider(schema, table.schema)
            if schema is not None and wider != schema:
                return wider
            schema = wider
            if writer is None:
                writer = pa.ipc.new_stream(str(path), schema)
            writer.write_table(_fitted(table, schema))
    finally:
        if writer is not None:
            writer.close()
    if writer is None:
        raise _Kinds("it has no samples")
    return None


def _wider(schema: pa.Schema | None, other: pa.Schema) -> pa.Schema:
    other = other.remove_metadata()
    if schema is None:
        return other
    try:
        return pa.unify_schemas([schema, other], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        changed = [
            f"{name!r} from {schema.field(name).type} to {other.field(name).type}"
            for name in other.names
            if name in schema.names and schema.field(name).type != other.field(name).type
        ]
        raise _Kinds(f"a column holds different kinds of values: {', '.join(changed)}") from error


def _fitted(table: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = [
        table[field.name].cast(field.type)
        if field.name in table.column_names
        else pa.nulls(len(table), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)
