"""Streams: the samples of random access, in an order that nothing but seed and step decides."""

import json
import os
import pickle
import tarfile
import warnings
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.broken_images import photograph, saved
from support.streams import KINDS, Write, bad_tar, captions, hub, opened, same, steps, together
from test_sources import (
    COUNT,
    IMAGES,
    NAMES,
    TEXTS,
    parquets,
    tars,
    with_csv,
    with_jsonl,
    with_parquet,
    with_texts,
)
from test_tar import add

from latentdiff.data.config import DataConfig
from latentdiff.data.dataset import CaptionedImages
from latentdiff.data.forms.form import FileRange
from latentdiff.data.forms.parquet import RowGroup
from latentdiff.data.opening import open_images
from latentdiff.data.samples import Sample
from latentdiff.training.randomness import micro_batches


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("write", KINDS)
def test_an_epoch_has_the_samples_of_random_access(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "set")
    with_jsonl(tmp_path / "reference")
    reference = CaptionedImages(DataConfig(data=str(tmp_path / "reference"), image_size=8))
    expected = {text: reference.image(i) for i, text in enumerate(TEXTS)}
    batches = steps(opened(tmp_path / "set"), batch_size=1, stop=2 * COUNT)
    drawn = captions(batches)
    for epoch in (drawn[:COUNT], drawn[COUNT:]):
        assert sorted(epoch) == sorted(TEXTS)
    for text, batch in zip(drawn, batches, strict=True):
        assert torch.equal(batch["images"][0], expected[text])


@pytest.mark.parametrize("write", [with_jsonl, tars, parquets, hub])
def test_a_stream_can_go_to_another_process(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "set")
    stream = opened(tmp_path / "set")
    assert same(steps(pickle.loads(pickle.dumps(stream))), steps(stream))


def test_epochs_and_seeds_have_orders_of_their_own(tmp_path: Path) -> None:
    together(tmp_path / "set")
    stream = opened(tmp_path / "set")
    orders = [captions(steps(stream, batch_size=23, stop=2, seed=seed)) for seed in (0, 1)]
    epochs = [tuple(order[at : at + 23]) for order in orders for at in (0, 23)]
    assert len(set(epochs)) == 4
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    again = [captions(steps(stream, batch_size=23, stop=2, seed=seed)) for seed in (0, 1)]
    assert again == orders


@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (4, 0), (1, 2), (2, 2)])
def test_neither_processes_nor_workers_change_the_order(
    tmp_path: Path, world_size: int, workers: int
) -> None:
    together(tmp_path / "set")
    bad_tar(tmp_path / "set" / "4.tar")

    def of_rank(rank: int, world_size: int, workers: int) -> list[dict[str, Any]]:
        stream = opened(tmp_path / "set", max_bad=0.2, num_workers=workers)
        return steps(stream, rank=rank, world_size=world_size)

    with warnings.catch_warnings():  # also in workers, which begin as copies of this process
        warnings.simplefilter("ignore")
        whole = of_rank(0, 1, 0)
        ranks = [of_rank(rank, world_size, workers) for rank in range(world_size)]
    assert "bad" not in captions(whole)
    joined = [
        {
            "images": torch.cat([share["images"] for share in shares]),
            "captions": [texts for share in shares for texts in share["captions"]],
        }
        for shares in zip(*ranks, strict=True)
    ]
    assert same(joined, whole)
    count = 1 if world_size == 4 else 2
    slices = [one for batch in ranks[0] for one in micro_batches(batch, count)]
    assert captions(slices) == captions(ranks[0])


@pytest.mark.parametrize("write", [with_jsonl, with_texts, tars, parquets, hub])
def test_batches_do_not_depend_on_where_a_run_starts(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "set")
    stream = opened(tmp_path / "set")
    whole = steps(stream)
    for start in range(1, 12):  # within the first epoch, at its end, and in the seventh
        assert same(steps(opened(tmp_path / "set"), start), whole[start:])


@pytest.mark.parametrize("write", KINDS)
def test_chunks_are_those_of_random_access(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "set")
    if write is not hub:
        whole = CaptionedImages(DataConfig(data=str(tmp_path / "set"), image_size=8))
        names = [sample.name for _, part in whole.chunks(3, lambda number: True) for sample in part]
    asked: list[int] = []

    def wanted(number: int) -> bool:
        asked.append(number)
        return number != 1

    stream = opened(tmp_path / "set")
    found = {number: list(part) for number, part in stream.chunks(3, wanted)}
    assert asked == [0, 1, 2]
    assert list(found) == [0, 2]
    everything = [*found[0], *found[2]]
    assert all(isinstance(sample, Sample) for sample in everything)
    assert [sample.captions for sample in everything] == [[TEXTS[i]] for i in (0, 1, 2, 6)]
    if write is not hub:
        assert [sample.name for sample in everything] == [names[i] for i in (0, 1, 2, 6)]
    assert all(sample.image.size == (8, 8) for sample in everything)
    parallel = opened(tmp_path / "set", num_workers=2).chunks(3, lambda number: number == 2)
    assert [[sample.captions for sample in part] for _, part in parallel] == [[[TEXTS[6]]]]


def test_images_that_are_not_wanted_are_not_read(tmp_path: Path) -> None:
    """Captions, unwanted chunks and the way to a resumed step go past them."""
    tars(tmp_path / "set")
    for name in ("000.tar", "001.tar"):  # links to where there is room are followed
        (tmp_path / "set" / name).rename(tmp_path / name)
        (tmp_path / "set" / name).symlink_to(tmp_path / name)
    stream = opened(tmp_path / "set")
    early = next(stream.shuffled(0, seed=0))
    assert isinstance(early.file, bytes)
    later = next(stream.shuffled(3, seed=0))
    assert isinstance(later.file, FileRange)
    assert later.file.read() in IMAGES
    parquets(tmp_path / "tables")
    tables = opened(tmp_path / "tables")
    assert next(tables.encoded(tables.shards, None)).file is None


def test_the_first_examples_and_captions_stand_for_a_stream(tmp_path: Path) -> None:
    tars(tmp_path / "set")
    bad_tar(tmp_path / "set" / "00.tar")
    stream = opened(tmp_path / "set", max_bad=0.5)
    with pytest.warns(UserWarning, match="a sample is replaced"):
        found = list(stream.some_examples(3))
    assert [example["captions"] for example in found] == [[text] for text in TEXTS[:3]]
    assert list(stream.some_captions(2)) == ["bad", TEXTS[0]]
    tars(tmp_path / "whole")
    whole = open_images(DataConfig(data=str(tmp_path / "whole"), image_size=8))
    assert [e["captions"] for e in whole.some_examples(2)] == [[TEXTS[0]], [TEXTS[3]]]
    assert len(list(whole.some_examples(100))) == len(list(whole.some_captions(1))) == COUNT


def test_both_kinds_give_batches_of_one_form(tmp_path: Path) -> None:
    tars(tmp_path / "set")
    config = DataConfig(data=str(tmp_path / "set"), image_size=8)
    for stream in (False, True):
        dataset = open_images(replace(config, stream=stream))
        (batch,) = dataset.batches(1, batch_size=6, seed=0, stop=2, rank=1, world_size=2)
        assert batch["images"].shape == (3, 3, 8, 8)
        assert batch["images"].dtype == torch.uint8
        assert len(batch["captions"]) == 3


@pytest.mark.parametrize("write", KINDS)
def test_the_fingerprint_is_of_files_and_options(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "set")
    first = opened(tmp_path / "set").fingerprint
    assert opened(tmp_path / "set", num_workers=1, shuffle_buffer=9).fingerprint == first
    assert opened(tmp_path / "set", background="black").fingerprint != first
    assert opened(tmp_path / "set", exclude={"text": TEXTS[:1]}).fingerprint != first
    places = sorted((tmp_path / "set").glob("metadata*")) or [tmp_path / "set"]
    if write not in (with_texts, with_jsonl, with_csv, with_parquet):
        places = sorted((tmp_path / "set").glob("*.[pt]*"))
    found = places[0].stat()
    os.utime(places[0], ns=(found.st_atime_ns, found.st_mtime_ns + 1_000_000_000))
    assert opened(tmp_path / "set").fingerprint != first


def test_captions_follow_the_same_rules(tmp_path: Path) -> None:
    rows = [
        {"text": "one", "aliases": ["a", "b"], "how": [3, 1]},
        {"text": None, "aliases": ["d"], "how": [1.0, 2.0]},
        {"text": "two", "aliases": None, "how": None},
    ]
    (tmp_path / "set").mkdir()
    for name, data, row in zip(NAMES, IMAGES, rows, strict=False):
        (tmp_path / "set" / name).write_bytes(data)
        row["file_name"] = name
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options: dict[str, Any] = {
        "caption_columns": ("text", "aliases"),
        "caption_templates": {"aliases": ("{}", "the {}")},
        "caption_weights": {"aliases": "how"},
        "max_bad": 0.5,
    }
    stream = opened(tmp_path / "set", **options)
    whole = CaptionedImages(replace(stream.config, stream=False))
    samples = chain.from_iterable(part for _, part in stream.chunks(9, lambda number: True))
    captions = [sample.captions for sample in samples if isinstance(sample, Sample)]
    assert captions == [whole.captions[0], whole.captions[2]]
    assert stream.left_out == {"weights do not fit": 1}


@pytest.mark.exhaustive
def test_a_large_tar_takes_little_memory(tmp_path: Path) -> None:
    data = saved(photograph((8, 8)))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(25_000):
            add(tar, f"{i}.png", data)
            add(tar, f"{i}.txt", str(i).encode())

    def own() -> int:
        """MiB of this process's own memory (Linux)."""
        text = Path("/proc/self/status").read_text()
        return int(text.partition("RssAnon:")[2].split()[0]) // 1024

    stream = opened(tmp_path / "a.tar", shuffle_buffer=1000)
    samples = stream.shuffled(0, seed=0)
    next(samples)
    before, most, count = own(), 0, 1
    for count in range(2, 25_001):
        next(samples)
        if count % 1000 == 0:
            most = max(most, own())
    assert count == 25_000
    assert most - before < 8


def test_rows_without_a_column_that_is_asked_for_come_once_each(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", "b", "c"]}), path)
    shard = RowGroup(path, 0, "train", 0, "image", ())
    assert [record.name for record in shard.records(lambda: False)] == [
        "train:0",
        "train:1",
        "train:2",
    ]
