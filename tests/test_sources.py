"""Where images come from: every kind gives the same examples, in the same order, every time."""

import csv
import json
import os
import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.broken_images import photograph, saved
from test_tar import pack

import latentdiff.data.forms.table
from latentdiff.data.captions import Captions
from latentdiff.data.config import DataConfig
from latentdiff.data.dataset import CaptionedImages

COUNT = 7
IMAGES = [saved(photograph((8, 8), seed=i)) for i in range(COUNT)]
TEXTS = [f"image {i} of 猫" for i in range(COUNT)]
NAMES = [f"{i}.png" for i in range(COUNT)]
ROWS = [{"file_name": n, "text": t} for n, t in zip(NAMES, TEXTS, strict=True)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def opened(data: Path, **fields: object) -> CaptionedImages:
    return CaptionedImages(replace(DataConfig(data=str(data), image_size=8), **fields))


def make_images(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, data in zip(NAMES, IMAGES, strict=True):
        (folder / name).write_bytes(data)
    return folder


def with_jsonl(folder: Path) -> None:
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    (make_images(folder) / "metadata.jsonl").write_text("\ufeff" + lines, encoding="utf-8")


def with_csv(folder: Path) -> None:
    path = make_images(folder) / "metadata.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "text"])
        writer.writeheader()
        writer.writerows(ROWS)


def with_parquet(folder: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), make_images(folder) / "metadata.parquet")


def with_texts(folder: Path) -> None:
    make_images(folder)
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.txt").write_text(text + "\n", encoding="utf-8-sig" if i % 2 else "utf-8")


def tars(folder: Path) -> None:
    folder.mkdir()
    for shard, ids in enumerate((range(3), range(3, COUNT))):
        files = {}
        for i in ids:
            files |= {f"{i}.png": IMAGES[i], f"{i}.txt": TEXTS[i].encode()}
        pack(folder / f"{shard:03}.tar", files)


def parquets(folder: Path) -> None:
    folder.mkdir()
    for shard, ids in enumerate((range(3), range(3, COUNT))):
        rows = [{"image": {"bytes": IMAGES[i], "path": None}, "text": TEXTS[i]} for i in ids]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"train-{shard}.parquet")


KINDS = (with_jsonl, with_csv, with_parquet, with_texts, tars, parquets)


@pytest.mark.parametrize("write", KINDS)
def test_every_kind_gives_the_same_examples(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / "set")
    with_jsonl(tmp_path / "reference")
    dataset, reference = opened(tmp_path / "set"), opened(tmp_path / "reference")
    assert list(dataset.captions) == [[text] for text in TEXTS]
    assert dataset.captions[:] == [[text] for text in TEXTS]
    for i in (6, 0, 3, 3):
        assert torch.equal(dataset[i]["image"], reference[i]["image"])
        assert dataset[i]["captions"] == [TEXTS[i]]
    assert not dataset.left_out


@pytest.mark.parametrize("write", KINDS)
def test_a_set_can_go_to_another_process(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / "set")
    copy = pickle.loads(pickle.dumps(opened(tmp_path / "set")))
    assert copy[3]["captions"] == [TEXTS[3]]


@pytest.mark.parametrize("write", KINDS)
def test_the_fingerprint_is_of_the_images_and_the_captions(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    def fingerprint(**fields: object) -> str:
        return opened(tmp_path / "set", **fields).fingerprint

    write(tmp_path / "set")
    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint(background="black") != first
    assert fingerprint(exclude={"text": TEXTS[:1]}) != first
    path = min((tmp_path / "set").glob("*.[ptj]*"))  # an image, a tar or a parquet file
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1_000_000_000))
    assert fingerprint() != first


@pytest.mark.parametrize("write", KINDS)
def test_what_is_written_later_is_seen(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / "set")
    before = len(opened(tmp_path / "set"))
    for path in (tmp_path / "set").iterdir():
        path.rename(tmp_path / path.name)
    (tmp_path / "set").rmdir()
    text, IMAGES[0] = TEXTS[0], IMAGES[0]
    try:
        TEXTS[0] = ROWS[0]["text"] = "something else"
        write(tmp_path / "set2")
        (tmp_path / "set2").rename(tmp_path / "set")
        dataset = opened(tmp_path / "set")
    finally:
        TEXTS[0] = ROWS[0]["text"] = text
    assert len(dataset) == before
    assert dataset.captions[0] == ["something else"]


def test_one_file_is_a_data_set(tmp_path: Path) -> None:
    parquets(tmp_path / "p")
    tars(tmp_path / "t")
    assert len(opened(tmp_path / "p" / "train-0.parquet")) == 3
    assert len(opened(tmp_path / "t" / "001.tar")) == 4


@pytest.mark.parametrize("write", KINDS)
def test_splits_are_folders(tmp_path: Path, write: Callable[[Path], None]) -> None:
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train")
    write(tmp_path / "set" / "test")
    if write is parquets:  # the file's own name says which split it is
        for path in (tmp_path / "set" / "test").iterdir():
            path.rename(path.with_name(path.name.replace("train", "test")))
    for split in ("train", "test"):
        assert len(opened(tmp_path / "set", split=split)) == COUNT
    with pytest.raises(ValueError, match=r"no split 'validation', only \['test', 'train'\]"):
        opened(tmp_path / "set", split="validation")


@pytest.mark.parametrize(
    "name", ["../x.png", "/etc/passwd", "a\\..\\x.png", "C:x.png", "", "a/../../x"]
)
def test_metadata_cannot_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    folder = make_images(tmp_path / "set")
    saved_row = json.dumps({"file_name": name, "text": "x"})
    (folder / "metadata.jsonl").write_text(saved_row)
    with pytest.raises(ValueError, match="must be a path inside the file's folder"):
        opened(folder)


def test_links_that_lead_out_are_bad_samples(tmp_path: Path) -> None:
    with_jsonl(tmp_path / "set")
    make_images(tmp_path / "elsewhere")
    (tmp_path / "set" / "1.png").unlink()
    (tmp_path / "set" / "1.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "set" / "2.png").unlink()
    (tmp_path / "set" / "2.png").symlink_to("3.png")
    dataset = opened(tmp_path / "set", max_bad=0.5)
    assert dataset.left_out == {"leads outside": 1}
    with_jsonl(tmp_path / "other" / "set")
    (tmp_path / "other" / "link").symlink_to(tmp_path / "elsewhere")
    row = json.dumps({"file_name": "link/1.png", "text": "x"})
    (tmp_path / "other" / "metadata.jsonl").write_text(row)
    (tmp_path / "other" / "set" / "metadata.jsonl").unlink()
    with (
        pytest.warns(UserWarning, match="a link that leads out of the data"),
        pytest.raises(ValueError, match=r"1 of 1 samples are bad, .*: 1 leads outside"),
    ):
        opened(tmp_path / "other")


def test_parquet_rows_cannot_name_files(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    outside = tmp_path / "1.png"
    outside.write_bytes(IMAGES[1])
    rows = [{"image": {"bytes": None, "path": str(outside)}, "text": "x"}]
    schema = pa.schema(
        [
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("text", pa.string()),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "set" / "a.parquet")
    with pytest.raises(ValueError, match="leads outside"):
        opened(tmp_path / "set").image(0)


def test_texts_that_are_not_utf8_are_counted_with_the_byte(tmp_path: Path) -> None:
    with_texts(tmp_path / "set")
    (tmp_path / "set" / "3.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"1 of 7 .* 1 text is not UTF-8; .*'3\.png' .*byte 3\)"):
        opened(tmp_path / "set")
    dataset = opened(tmp_path / "set", max_bad=0.2)
    assert list(dataset.captions) == [[text] for i, text in enumerate(TEXTS) if i != 3]
    assert dataset[3]["captions"] == [TEXTS[4]]


def test_a_csv_that_is_broken_is_refused(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "set")
    for text, message in (
        (b"file_name,text\n0.png,a\n1.png\n", r"metadata\.csv, line 3: expected 2 cells"),
        ("file_name,text\n".encode("utf-16"), r"metadata\.csv is not UTF-8: its first line"),
        (b"name,text\n0.png,a\n", r"metadata\.csv has no column 'file_name'"),
        (b'file_name,text\n0.png,"a\n', r"metadata\.csv is no CSV file: unexpected end"),
        (b"file_name,text\n", r"metadata\.csv has no rows"),
    ):
        (folder / "metadata.csv").write_bytes(text)
        with pytest.raises(ValueError, match=message):
            opened(folder)


def test_two_metadata_files_in_one_folder_are_refused(tmp_path: Path) -> None:
    with_jsonl(tmp_path / "set")
    (tmp_path / "set" / "metadata.csv").write_text("file_name,text\n0.png,a\n")
    with pytest.raises(ValueError, match="has two metadata files in one folder"):
        opened(tmp_path / "set")


def test_packed_tars_are_refused(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="compressed tars have no random access"):
        opened(tmp_path / "set")


def test_a_broken_tar_is_refused(tmp_path: Path) -> None:
    tars(tmp_path / "set")
    data = (tmp_path / "set" / "001.tar").read_bytes()
    (tmp_path / "set" / "001.tar").write_bytes(data[:1000])
    with pytest.raises(ValueError, match=r"001\.tar ends with"):
        opened(tmp_path / "set")


def test_columns_may_come_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metadata is read in parts, and what is empty in the first may be text or a list later."""
    monkeypatch.setattr(latentdiff.data.forms.table, "ROWS", 2)
    rows: list[dict[str, object]] = [dict(row) for row in ROWS]
    rows[2]["late"] = []
    rows[4]["late"] = ["a", "b"]
    rows[5]["later"] = 1
    rows[6]["later"] = 1.5
    folder = make_images(tmp_path / "set")
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = opened(folder, caption_columns=("text", "late"), exclude={"later": ()})
    assert dataset.captions[4] == [TEXTS[4], "a", "b"]
    assert dataset.rows[5]["later"] == 1.0
    assert dataset.rows[0]["later"] is None


def test_weights_say_how_often_a_caption_is_drawn(tmp_path: Path) -> None:
    rows = [
        {"text": "one", "aliases": ["a", "b"], "how": [3, 1]},
        {"text": "two", "aliases": None, "how": None},
        {"text": None, "aliases": ["", "c"], "how": [5, 0.5]},
        {"text": None, "aliases": ["d"], "how": [1.0, 2.0]},
        {"text": None, "aliases": ["e"], "how": [-1.0]},
    ]
    folder = make_images(tmp_path / "set")
    for row, name in zip(rows, NAMES, strict=False):
        row["file_name"] = name
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = opened(
        folder,
        caption_columns=("text", "aliases"),
        caption_templates={"aliases": ("{}", "the {}")},
        caption_weights={"aliases": "how"},
        max_bad=0.5,
    )
    counts = {"one": 2, "a": 3, "the a": 3, "b": 1, "the b": 1}
    assert Counter(dataset[0]["captions"]) == counts  # 1 to 3 to 1, the forms sharing
    assert dataset[1]["captions"] == ["two"]
    assert dataset[2]["captions"] == ["c", "the c"]
    with pytest.warns(UserWarning, match="weights do not fit: 2 for 1 captions"):
        assert dataset[3]["captions"] == dataset[0]["captions"]
    assert {e.reason for e in dataset.replaced.values()} == {"weights do not fit"}
    assert dataset[4]["captions"] == dataset[0]["captions"]
    with pytest.raises(ValueError, match="the column 'text' must hold numbers"):
        opened(folder, caption_columns=("aliases",), caption_weights={"aliases": "text"})


@pytest.mark.parametrize(
    "weights", [[1 / 3, 2 / 3], [0.37, 0.63], [999, 1], [1e-9, 1, 7], [2, 0], [1] * 300]
)
def test_weights_are_kept_to_about_a_per_cent(tmp_path: Path, weights: list[float]) -> None:
    folder = make_images(tmp_path / "set")
    texts = [str(i) for i in range(len(weights))]
    row = {"file_name": "0.png", "text": texts, "how": weights}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    captions = opened(folder, caption_weights={"text": "how"}).captions[0]
    assert len(captions) <= max(102, len(weights))
    assert set(captions) == {text for text, weight in zip(texts, weights, strict=True) if weight}
    for text, weight in zip(texts, weights, strict=True):
        share = captions.count(text) / len(captions)
        assert share == pytest.approx(weight / sum(weights), abs=0.011)


def test_images_without_captions_may_be_kept(tmp_path: Path) -> None:
    with_texts(tmp_path / "set")
    (tmp_path / "set" / "3.txt").unlink()
    (tmp_path / "set" / "4.txt").write_text(" \n")
    dataset = opened(tmp_path / "set", allow_empty_caption=True)
    assert len(dataset) == COUNT
    assert dataset[3]["captions"] == dataset[4]["captions"] == [""]
    left = opened(tmp_path / "set", max_bad=0.5)
    assert left.left_out == {"no caption": 2}
    assert len(left) == COUNT - 2


def test_captions_stay_on_disk(tmp_path: Path) -> None:
    with_jsonl(tmp_path / "set")
    dataset = opened(tmp_path / "set")
    assert isinstance(dataset.captions, Captions)
    assert dataset.captions[1:3] == [[TEXTS[1]], [TEXTS[2]]]
    assert dataset.captions[-1] == [TEXTS[-1]]
    assert dataset.rows.cache_files or list((tmp_path / "cache" / "latentdiff").glob("*.arrow"))
