"""Folders, tars and parquet files of small captioned images, and what is read of them."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from test_tar import pack

from latentdiff.data.config import DataConfig
from latentdiff.data.dataset import CaptionedImages
from latentdiff.data.opening import ImageDataset
from support.broken_images import photograph, saved

IMAGE = saved(photograph((8, 8)))
Rows = list[dict[str, object]]
Write = Callable[[Path, Rows], None]


def config(data: Path, **fields: object) -> DataConfig:
    return replace(DataConfig(data=str(data), image_size=8), **fields)


def opened(data: Path, **fields: object) -> CaptionedImages:
    return CaptionedImages(config(data, **fields))


def captions(dataset: ImageDataset) -> list[str]:
    return list(dataset.some_captions(1000))


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def captioned(*names: str, start: str = "") -> dict[str, bytes]:
    """Images with a text file each, which says the image's name."""
    texts = {
        f"{os.path.splitext(start + name)[0]}.txt": name.encode("utf-8", "replace")
        for name in names
    }
    return {start + name: IMAGE for name in names} | texts


def jsonl(folder: Path, rows: Rows) -> None:
    lines = "\n".join(json.dumps({"file_name": f"{i}.png", **r}) for i, r in enumerate(rows))
    write(folder, {f"{i}.png": IMAGE for i in range(len(rows))})
    (folder / "metadata.jsonl").write_text(lines)


def tar(folder: Path, rows: Rows) -> None:
    folder.mkdir()
    files = {f"{i}.json": json.dumps(row).encode() for i, row in enumerate(rows)}
    images = {f"{i}.png": IMAGE for i in range(len(rows))}
    pack(folder / "a.tar", dict(sorted((files | images).items())))


def table(folder: Path, name: str, **columns: list[object] | pa.Array) -> None:
    folder.mkdir(exist_ok=True)
    images = [{"bytes": IMAGE, "path": None} for _ in range(2)]
    pq.write_table(pa.table({"image": images, **columns}), folder / name)
