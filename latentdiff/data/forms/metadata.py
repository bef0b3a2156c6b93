"""Reads captions beside images: metadata.jsonl, .csv or .parquet, or a .txt for each image."""

import codecs
import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from latentdiff.data.decode import SUFFIXES, BadSample
from latentdiff.data.forms.table import ROWS, batched

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
TEXT_LIMIT = 1 << 20  # bytes of a caption's file


def metadata_tables(path: Path, folder: str) -> Iterator[pa.Table]:
    """Read the rows of a metadata file as tables; `file_name` becomes relative to the data's root.

    `folder` is the file's folder relative to that root. A row whose text is not UTF-8 has the
    reason in `_fault` and `_detail`. Raises ValueError, with file and line, for malformed metadata
    and for names that lead out of the folder.
    """
    readers = {".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}
    empty = True
    for table in readers[path.suffix](path):
        empty = False
        if "file_name" not in table.column_names:
            raise ValueError(f"{path} has no column 'file_name', only {table.column_names}")
        names = table["file_name"].to_pylist()
        for name in names:
            if not _inside(name):
                raise ValueError(
                    f"{path}: file_name={name!r} must be a path inside the file's folder"
                )
        if folder:
            names = [f"{folder}/{name}" for name in names]
        column = table.column_names.index("file_name")
        yield table.set_column(column, "file_name", pa.array(names, pa.string()))
    if empty:
        raise ValueError(f"{path} has no rows")


def text_tables(root: Path, names: Iterable[str]) -> Iterator[pa.Table]:
    """Make a row for each image, with the text of the .txt file beside it if there is one."""

    def rows() -> Iterator[dict[str, Any]]:
        for name in names:
            row = {"file_name": name}
            path = (root / name).with_suffix(".txt")
            if path.is_file():
                try:
                    if path.stat().st_size > TEXT_LIMIT:
                        raise BadSample("text is too long", path.name)
                    row["text"] = strict_text(path.read_bytes(), path.name).strip()
                except BadSample as error:
                    row |= {"_fault": error.reason, "_detail": error.detail}
            yield row

    return batched(rows())


def strict_text(data: bytes, name: str) -> str:
    """Decode UTF-8, with or without a byte order mark. Raises BadSample for an invalid byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start + (3 if data.startswith(codecs.BOM_UTF8) else 0)
        raise BadSample("text is not UTF-8", f"{name}, byte {at}") from error


def images_in(folder: Path, root: Path) -> list[str]:
    """List the image files below a folder, relative to the root, sorted by name."""
    inside = "" if folder == root else folder.relative_to(root).as_posix() + "/"
    return [inside + name for name in find_files(folder, is_image)]


def is_image(name: str) -> bool:
    """Whether a base name has an image's suffix and is not hidden."""
    return name[0] != "." and os.path.splitext(name)[1].lower() in SUFFIXES


def find_files(folder: Path, wanted: Callable[[str], bool]) -> list[str]:
    """List the files below a folder whose base name is `wanted`, as sorted relative paths."""
    files = []
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(path).relative_to(folder).as_posix() + "/"
        inside = "" if inside == "./" else inside
        files += [inside + name for name in names if name[0] != "." and wanted(name)]
    return sorted(files)


def _inside(name: object) -> bool:
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name:
        return False
    if name[0] != "/" and ".." not in name and name[1:2] != ":":
        return True  # a shortcut for nearly all names, since the code below is slower
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and name[1:2] != ":"


def _json_lines(path: Path) -> Iterator[pa.Table]:
    return batched(_json_rows(path))


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
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
                    "_fault": "text is not UTF-8",
                    "_detail": f"{path.name}, byte {start + error.start}",
                }
                continue
            try:
                row = json.loads(text)
                row["file_name"] = str(row["file_name"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected a JSON object with file_name, "
                    f"got {text.strip()[:200]!r}"
                ) from error
            yield row


def _name_in(line: bytes) -> str | None:
    """Return the file name in a damaged line, or None if the name itself is damaged."""
    try:
        name = json.loads(line.decode("utf-8", "replace"))["file_name"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return name if isinstance(name, str) and "\ufffd" not in name else None


def _csv(path: Path) -> Iterator[pa.Table]:
    """Read a CSV file: every value is text, and an empty cell is a missing value."""

    def rows() -> Iterator[dict[str, Any]]:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path}, line {reader.line_num}: expected {len(reader.fieldnames or ())} "
                        "cells, as in the first line"
                    )
                yield {name: value or None for name, value in row.items()}

    try:
        yield from batched(rows())
    except UnicodeDecodeError as error:  # its offset is relative to the last block read
        offset = _first_wrong_byte(path)
        raise ValueError(f"{path} is not UTF-8: byte {offset}") from error
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV file: {error}") from error


def _first_wrong_byte(path: Path) -> int:
    offset = 0
    with path.open("rb") as file:
        for line in file:
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return offset + error.start
            offset += len(line)
    return offset


def _parquet(path: Path) -> Iterator[pa.Table]:
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS):
                batch.validate(full=True)  # the texts are UTF-8
                yield pa.Table.from_batches([batch])
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no parquet file: {' '.join(str(error).split())}") from error
