"""Streamed data sets of every kind, and what their batches hold."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from test_sources import (
    COUNT,
    IMAGES,
    parquets,
    tars,
    with_csv,
    with_jsonl,
    with_parquet,
    with_texts,
)
from test_tar import pack

from latentdiff.data.config import DataConfig
from latentdiff.data.stream import StreamedImages

Write = Callable[[Path], None]


def hub(folder: Path) -> None:
    """Files of a hub data set; `opened` puts them where its id would lead."""
    parquets(folder)
    (folder / "hub").touch()


def opened(data: Path, **fields: object) -> StreamedImages:
    config = DataConfig(data=str(data), image_size=8, stream=True, shuffle_buffer=3)
    if not (data / "hub").exists():
        return StreamedImages(replace(config, **fields))
    files = {"train": [str(path) for path in sorted(data.glob("*.parquet"))]}
    builder = datasets.load_dataset_builder("parquet", data_files=files)
    with pytest.MonkeyPatch.context() as patch:  # the way to the hub alone is not the real one
        patch.setattr(datasets, "load_dataset_builder", lambda name: builder)
        return StreamedImages(replace(config, data="somebody/images", **fields))


def together(folder: Path) -> None:
    """Samples of many sizes in four tars, with captions that tell them apart."""
    folder.mkdir()
    for number in range(4):
        files: dict[str, bytes] = {}
        for i in range(number, 23, 4):
            files |= {f"{i}.png": IMAGES[i % COUNT], f"{i}.txt": str(i).encode()}
        pack(folder / f"{number}.tar", files)


KINDS = (with_jsonl, with_csv, with_parquet, with_texts, tars, parquets, hub)


def steps(stream: StreamedImages, start: int = 0, **options: int) -> list[dict[str, Any]]:
    settings = {"batch_size": 4, "seed": 3, "stop": 12} | options
    return list(stream.batches(start, **settings))


def captions(batches: list[dict[str, Any]]) -> list[str]:
    return [text for batch in batches for (text,) in batch["captions"]]


def same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    equal = (torch.equal(x["images"], y["images"]) for x, y in zip(a, b, strict=True))
    return captions(a) == captions(b) and all(equal)


def bad_tar(path: Path, name: str = "bad") -> None:
    pack(path, {f"{name}.png": IMAGES[0][:40], f"{name}.txt": name.encode()})
