"""Where samples come from, by random access in a stable order: folders, tars, parquet, the hub."""

import hashlib
import os
import stat
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import datasets.config
import pyarrow as pa
from datasets.exceptions import DatasetsError
from huggingface_hub.constants import HF_HUB_CACHE

from latentdiff.data.decode import BadSample
from latentdiff.data.index import batched, open_index
from latentdiff.data.metadata import NAMES, images_in, metadata_tables, text_tables, walk
from latentdiff.data.tar import samples

SPLITS = ("train", "validation", "test")  # folders, or beginnings of file names
KINDS = (".tar", ".parquet")
PACKED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
T = TypeVar("T")


class Source(Protocol):
    """Samples 0 … len(rows) - 1: a memory-mapped table, and images read one at a time."""

    rows: datasets.Dataset
    """Captions and other columns; `_fingerprint` is of the images as well."""
    columns: list[str]
    """Those of the columns that are a user's business."""
    images: list[str]
    """Those that hold images."""
    faults: dict[int, BadSample]
    """Samples that are bad without a look at their images, by number."""

    def name(self, index: int) -> str:
        """What a sample is called in messages and in bad_samples.jsonl."""
        ...

    def names(self) -> Iterable[str]:
        """All of them, in order."""
        ...

    def read(self, index: int, column: str) -> bytes:
        """The file of an image. Raises BadSample when there is none."""
        ...

    def extra(self) -> list[str]:
        """Image files that no row names."""
        ...


def splits(data: str) -> list[str]:
    """The names of the parts of a data set. Raises ValueError when it cannot be read."""
    try:
        return sorted(_parts(data))
    except (OSError, DatasetsError, pa.ArrowException) as error:
        raise unreadable(data, error) from error


def open_source(data: str, split: str) -> Source:
    """Open a split of a folder, of tar or parquet files, or of a hub data set.

    Raises ValueError when there is no such data or split, or its metadata is broken.
    """
    datasets.disable_progress_bars()
    try:
        parts = _parts(data)
        check_split(data, split, parts)
        return parts[split]()
    except (OSError, DatasetsError, pa.ArrowException) as error:
        raise unreadable(data, error) from error


def check_split(data: str, split: str, parts: Iterable[str]) -> None:
    """Raise ValueError when the data has no such part."""
    if split not in parts:
        raise ValueError(f"data={data!r} has no split {split!r}, only {sorted(parts)}")


def check_columns(data: str, asked: Iterable[str], columns: Sequence[str], where: str = "") -> None:
    """Raise ValueError when one of the columns that are asked for is not there."""
    for name in asked:
        if name not in columns:
            raise ValueError(
                f"data={data!r} has no column {name!r}{where}, only {list(columns)}; captions are "
                "in metadata.jsonl beside the images, with rows such as "
                '{"file_name": "1.png", "text": "a cat"}, or in a .txt file for each'
            )


def unreadable(data: str, error: Exception) -> ValueError:
    """What is told of data that cannot be read."""
    what = "" if Path(data).exists() else " as a folder or from the hub"
    return ValueError(f"data={data!r} cannot be read{what}: {' '.join(str(error).split())}")


def _parts(data: str) -> dict[str, Any]:
    """Split: what opens it."""
    place = Path(data)
    if not place.exists():
        try:
            loaded = datasets.load_dataset(data)
        except ValueError as error:
            raise unreadable(data, error) from error
        return _tables(loaded)
    local = local_form(data)
    root = local.root
    if local.kind == "tar":
        return {split: partial(_TarSource, root, files) for split, files in local.parts.items()}
    if local.kind == "parquet":
        groups = {split: [str(root / f) for f in files] for split, files in local.parts.items()}
        return _tables(datasets.load_dataset("parquet", data_files=groups))
    return {
        split: partial(_FolderSource, root, split if local.inner else "", files)
        for split, files in local.parts.items()
    }


class LocalForm(NamedTuple):
    """What is at a place on disk: `kind` is "tar", "parquet" or "folder" (of images)."""

    kind: str
    root: Path
    parts: dict[str, list[str]]
    """Split: its files relative to `root`, which are tars, parquet files, or all metadata files."""
    inner: bool
    """Whether the splits are folders."""


def local_form(data: str) -> LocalForm:
    """What is at a place that exists. Raises ValueError when it is nothing that can be read."""
    place = Path(data)
    files = walk(place, lambda name: name in NAMES or name.endswith((*KINDS, *PACKED)))
    if place.is_file():
        files = [place.name] if place.name.endswith((*KINDS, *PACKED)) else []
        place = place.parent
    if not any(name.rpartition("/")[2] in NAMES for name in files):
        for suffix in KINDS:
            found = [name for name in files if name.endswith(suffix)]
            if found:
                return LocalForm(suffix[1:], place, _by_split(found), inner=False)
    if Path(data).is_file() or any(name.endswith(PACKED) for name in files):
        raise ValueError(
            f"data={data!r} must be a folder, .tar or .parquet files, or a hub data set; "
            "compressed tars have no random access: unpack them to .tar"
        )
    inner = [split for split in SPLITS if (place / split).is_dir()]
    parts = dict.fromkeys(inner or ("train",), files)
    return LocalForm("folder", place, parts, inner=bool(inner))


def _by_split(files: list[str]) -> dict[str, list[str]]:
    """Files whose folder or name begins with a split's name are its."""
    groups: dict[str, list[str]] = {}
    for name in files:
        words = name.replace("/", " ").replace("-", " ").replace("_", " ").split()
        split = next((split for split in SPLITS if split in words), "train")
        groups.setdefault(split, []).append(name)
    return groups


def _tables(loaded: Any) -> dict[str, Any]:
    return {str(split): partial(_TableSource, rows, str(split)) for split, rows in loaded.items()}


class _TableSource:
    """Rows that hold the images' files themselves: parquet, and what the hub has."""

    def __init__(self, rows: datasets.Dataset, split: str) -> None:
        self.images = [name for name, kind in rows.features.items() if holds_files(kind)]
        for name in self.images:
            rows = rows.cast_column(name, datasets.Image(decode=False))
        self.rows, self.split = rows, split
        self.columns = list(rows.column_names)
        self.faults: dict[int, BadSample] = {}
        self._files = {name: rows.select_columns([name]) for name in self.images}

    def name(self, index: int) -> str:
        return f"{self.split}:{index}"

    def names(self) -> Iterator[str]:
        return map(self.name, range(len(self.rows)))

    def read(self, index: int, column: str) -> bytes:
        file = self._files[column][index][column]
        if file is None or (file["bytes"] is None and file["path"] is None):
            raise BadSample("missing image")
        if file["bytes"] is not None:
            return file["bytes"]
        # The hub's image folders name files of the cache; a row that names another one is a trap.
        path = Path(file["path"]).resolve()
        caches = (datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE)
        if not any(path.is_relative_to(Path(cache).resolve()) for cache in caches):
            raise BadSample("leads outside", file["path"])
        return _bytes(path)

    def extra(self) -> list[str]:
        return []


def holds_files(kind: Any) -> bool:
    """Whether a feature is of images, as `datasets` writes them to parquet."""
    if isinstance(kind, datasets.Image):
        return True
    return isinstance(kind, Mapping) and set(kind) == {"bytes", "path"}


class _FolderSource:
    """Images beside metadata files or .txt files, or alone."""

    def __init__(self, root: Path, split: str, files: list[str]) -> None:
        self.root, self.split = root, split
        inside = f"{split}/" if split else ""
        metadata = [n for n in files if n.startswith(inside) and n.rpartition("/")[2] in NAMES]
        if metadata:
            folders = [name.rpartition("/")[0] for name in metadata]
            if len(set(folders)) < len(folders):
                raise ValueError(
                    f"data={str(root)!r} has two metadata files in one folder: {metadata}"
                )
            key = [(name, *file_times(root / name)) for name in metadata]

            def tables() -> Iterator[pa.Table]:
                for name in metadata:
                    yield from metadata_tables(root / name, name.rpartition("/")[0])

        else:
            images = images_in(root / split, root)
            key = hashlib.sha256()
            for name in images:
                text = (root / name).with_suffix(".txt")
                key.update(f"{name}/{file_times(text) if text.is_file() else None}".encode())
            key = key.hexdigest()
            if not images:
                raise ValueError(f"data={str(root)!r} holds no images")

            def tables() -> Iterator[pa.Table]:
                return text_tables(root, images)

        self.described = bool(metadata)
        index = open_index(str(root.resolve()), [split, key], tables)
        self.images = ["image"]
        self.columns = ["image", *(name for name in index.column_names if visible(name))]
        self.faults = _written_faults(index)
        digest = self._look(index)
        self.rows = datasets.Dataset(index.data, fingerprint=digest)
        self._files = self.rows.select_columns(["file_name"])

    def _look(self, index: datasets.Dataset) -> str:
        """Note images that are missing; a hash of the index and all images' sizes and times."""
        digest = hashlib.sha256(index._fingerprint.encode())
        root, number = f"{self.root}/", 0
        inside = {"": True}  # folders, which may be links
        for chunk in index.data.column("file_name").chunks:
            seen = array("q")
            for name in chunk.to_pylist():
                folder = name.rpartition("/")[0] if "/" in name else ""
                if folder not in inside:
                    inside[folder] = is_inside(self.root / folder, self.root)
                try:
                    found = os.lstat(root + name)
                    within = inside[folder]
                    if stat.S_ISLNK(found.st_mode):
                        found = os.stat(root + name)
                        within = is_inside(self.root / name, self.root)
                    if not within or not stat.S_ISREG(found.st_mode):
                        reason = "missing image" if within else "leads outside"
                        self.faults.setdefault(number, BadSample(reason))
                    seen.extend((found.st_size, found.st_mtime_ns))
                except OSError:
                    self.faults.setdefault(number, BadSample("missing image"))
                number += 1
            digest.update(seen.tobytes())
        return digest.hexdigest()[:16]

    def name(self, index: int) -> str:
        return self._files[index]["file_name"]

    def names(self) -> Iterator[str]:
        for chunk in self.rows.data.column("file_name").chunks:
            yield from chunk.to_pylist()

    def read(self, index: int, column: str) -> bytes:
        return _bytes(self.root / self.name(index))

    def extra(self) -> list[str]:
        if not self.described:
            return []
        return sorted(set(images_in(self.root / self.split, self.root)) - set(self.names()))


class _TarSource:
    """WebDataset tars: members by offset, in the order of the shards' names."""

    def __init__(self, root: Path, shards: list[str]) -> None:
        self.root, self.shards = root, shards

        def rows() -> Iterator[dict[str, Any]]:
            for number, shard in enumerate(shards):
                for row in samples(root / shard):
                    yield {**row, "file_name": f"{shard}/{row['file_name']}", "_shard": number}

        key = [(shard, *file_times(root / shard)) for shard in shards]
        self.rows = open_index(str(root.resolve()), key, lambda: batched(rows()))
        self.images = ["image"]
        self.columns = ["image", *(name for name in self.rows.column_names if visible(name))]
        self.faults = _written_faults(self.rows)
        self._files = self.rows.select_columns(["file_name", "_shard", "_offset", "_bytes"])

    def name(self, index: int) -> str:
        return self._files[index]["file_name"]

    def names(self) -> Iterator[str]:
        for chunk in self.rows.data.column("file_name").chunks:
            yield from chunk.to_pylist()

    def read(self, index: int, column: str) -> bytes:
        place = self._files[index]
        with (self.root / self.shards[place["_shard"]]).open("rb") as file:
            file.seek(place["_offset"])
            return file.read(place["_bytes"])

    def extra(self) -> list[str]:
        return []


def is_inside(path: Path, root: Path) -> bool:
    """Whether a path stays below the root, links resolved."""
    return path.resolve().is_relative_to(root.resolve())


def visible(name: str) -> bool:
    """Whether a column is a user's business."""
    return name != "file_name" and not name.startswith("_")


def _written_faults(index: datasets.Dataset) -> dict[int, BadSample]:
    """What the readers of metadata noted in the index."""
    if "_fault" not in index.column_names:
        return {}
    faults, start = {}, 0
    reasons, details = index.data.column("_fault"), index.data.column("_detail")
    for reason, detail in zip(reasons.chunks, details.chunks, strict=True):
        if reason.null_count < len(reason):
            pairs = zip(reason.to_pylist(), detail.to_pylist(), strict=True)
            for i, (what, more) in enumerate(pairs, start=start):
                if what is not None:
                    faults[i] = BadSample(what, more or "")
        start += len(reason)
    return faults


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadSample("missing image", str(error.strerror)) from error


def file_times(path: Path) -> tuple[int, int]:
    """Size, and time of the last change in nanoseconds: others after a change."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns
