"""Reads captions beside images: metadata.jsonl, .csv or .parquet, or a .txt for each image."""

import codecs
import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentdiff.data.decode import BadSample
from latentdiff.data.forms.files import caption_beside, is_utf8, printable
from latentdiff.data.forms.table import ROWS, batched, is_kept

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
TEXT_LIMIT = 1 << 20  # bytes of a caption's file
BAD_NAME = "file name is not UTF-8"
BAD_TEXT = "text is not UTF-8"


def metadata_tables(
    path: Path, folder: str, columns: Sequence[str], *, within: str = ""
) -> Iterator[pa.Table]:
    """Read the rows of a metadata file as tables; `file_name` becomes relative to the data's root.

    `folder` is the file's folder relative to that root, and `within` the start of the names of the
    rows that are read. Of the columns only `columns` have values, see `batched`. A row whose name
    or text is no Unicode has the reason in `_fault` and `_detail`. Raises ValueError, with file and
    line, for malformed metadata and for names that lead out of the folder.
    """
    readers = {".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}
    empty = True
    for table in readers[path.suffix](path, columns):
        empty = False
        if "file_name" not in table.column_names:
            raise ValueError(f"{path} has no column 'file_name', only {table.column_names}")
        names = table["file_name"].to_pylist()
        for name in names:
            _check_inside(name, path)
        if folder:
            names = [f"{printable(folder)}/{name}" for name in names]
        if not is_utf8(folder):
            table = _all_bad(table)
        column = table.column_names.index("file_name")
        table = table.set_column(column, "file_name", pa.array(names, pa.string()))
        if within:
            start = pc.MatchSubstringOptions(within)
            table = table.filter(pc.call_function("starts_with", [table["file_name"]], start))
        yield table
    if empty:
        raise ValueError(f"{path} has no rows")


def text_tables(root: Path, names: Iterable[str]) -> Iterator[pa.Table]:
    """Make a row for each image, with the text of the .txt file beside it if there is one."""

    def rows() -> Iterator[dict[str, Any]]:
        for name in names:
            row = {"file_name": printable(name)}
            if not is_utf8(name):
                yield row | {"_fault": BAD_NAME, "_detail": "rename the file"}
                continue
            path = caption_beside(root, name)
            if path is not None:
                try:
                    if path.stat().st_size > TEXT_LIMIT:
                        raise BadSample("text is too long", path.name)
                    row["text"] = strict_text(path.read_bytes(), path.name).strip()
                except BadSample as error:
                    row |= {"text": None, "_fault": error.reason, "_detail": error.detail}
            yield row

    return batched(rows(), ("text",))


def strict_text(data: bytes, name: str) -> str:
    """Decode UTF-8, with or without a byte order mark. Raises BadSample for an invalid byte."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start + (3 if data.startswith(codecs.BOM_UTF8) else 0)
        raise BadSample(BAD_TEXT, f"{name}, byte {at}") from error
    if "\0" in text:  # UTF-16 without its mark, of which UTF-8 makes every other character NUL
        raise BadSample(BAD_TEXT, f"{name}, byte {data.index(0)} is 0")
    return text


def check_text(row: dict[str, Any], columns: Sequence[str], where: str) -> None:
    """Mark a row as bad if the text in one of the columns has a lone surrogate.

    That is half of a character, such as of an emoji that was cut in two, which JSON can hold and
    UTF-8 cannot, or a byte that is not UTF-8.
    """
    for name in columns:
        text = json.dumps(row.get(name), ensure_ascii=False)
        if not is_utf8(text):
            row |= {name: None, "_fault": BAD_TEXT}
            row["_detail"] = f"{where}: {name!r} holds {printable(text)[:200]}"


def _check_inside(name: object, path: Path) -> None:
    """Raise ValueError unless a name in the metadata file `path` is a path below its folder."""
    if isinstance(name, str) and name and "\\" not in name and "\0" not in name:
        if name[0] != "/" and ".." not in name and name[1:2] != ":":
            return  # a shortcut for nearly all names, since the code below is slower
        parts = PurePosixPath(name)
        if not parts.is_absolute() and ".." not in parts.parts and name[1:2] != ":":
            return
    hint = "; write / in place of \\" if isinstance(name, str) and "\\" in name else ""
    raise ValueError(
        f"{path}: file_name={name!r} must be a path inside the file's folder, relative to it{hint}"
    )


def _all_bad(table: pa.Table) -> pa.Table:
    """Return the rows of a metadata file in a folder whose name is not UTF-8."""
    for name, text in (("_fault", BAD_NAME), ("_detail", "rename the folder")):
        if name in table.column_names:
            table = table.drop_columns(name)
        table = table.append_column(name, pa.array([text] * len(table)))
    return table


def _json_lines(path: Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    return batched(_json_rows(path, columns), columns)


def _json_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            start, offset = offset, offset + len(line)
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
                start = offset - len(line)
            if not line.strip():
                continue
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                yield {
                    "file_name": _name_in(line) or f"{path.name}, line {number}",
                    "_fault": BAD_TEXT,
                    "_detail": f"{path.name}, byte {start + error.start}",
                }
                continue
            try:
                row = json.loads(text)
                row["file_name"] = str(row["file_name"])
                row = {name: value for name, value in row.items() if not name.startswith("_")}
                if "\\u" in text:
                    _check_escapes(row, columns, f"{path.name}, line {number}")
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected a JSON object with file_name, "
                    f"got {text.strip()[:200]!r}"
                ) from error
            yield row


def _check_escapes(row: dict[str, Any], columns: Sequence[str], where: str) -> None:
    """Mark a row of JSON as bad if its name or a text in the columns has half of a character."""
    check_text(row, columns, where)
    name = row["file_name"]
    if not is_utf8(name):
        row |= {"file_name": where, "_fault": BAD_NAME, "_detail": f"{where}: {printable(name)}"}


def _name_in(line: bytes) -> str | None:
    """Return the file name in a damaged line, or None if the name itself is damaged."""
    try:
        name = json.loads(line.decode("utf-8", "replace"))["file_name"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return name if isinstance(name, str) and "\ufffd" not in name else None


def _csv(path: Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Read a CSV file: every value is text, and an empty cell is a missing value."""

    def rows() -> Iterator[dict[str, Any]]:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if not is_utf8(header := ",".join(reader.fieldnames or ())):
                raise ValueError(f"{path} is not UTF-8: its first line is {printable(header)!r}")
            for row in reader:
                where = f"{path.name}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path}, line {reader.line_num}: expected {len(reader.fieldnames or ())} "
                        "cells, as in the first line"
                    )
                row = {name: value or None for name, value in row.items() if name[:1] != "_"}
                check_text(row, ("file_name", *columns), where)
                yield {**row, "file_name": row["file_name"] or where} if "_fault" in row else row

    try:
        yield from batched(rows(), columns)
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV file: {error}") from error


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    try:
        with pq.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if name[:1] != "_"]
            kept = [name for name in names if is_kept(name, columns)]
            for batch in file.iter_batches(ROWS, columns=kept):
                batch.validate(full=True)  # the texts are UTF-8
                table = pa.Table.from_batches([batch])
                for name in names:
                    if name not in kept:
                        table = table.append_column(name, pa.nulls(len(table)))
                yield table
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no parquet file: {' '.join(str(error).split())}") from error
