"""Streams with what is bad, short, hostile or not there: told, counted, replaced or refused."""

import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.streams import KINDS, Write, bad_tar, captions, hub, opened, steps, together
from test_sources import (
    COUNT,
    IMAGES,
    TEXTS,
    parquets,
    tars,
    with_jsonl,
    with_texts,
)
from test_tar import add, pack

from latentdiff.data.decode import BadSample


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_a_bad_image_is_replaced_by_the_next_of_the_stream(tmp_path: Path) -> None:
    together(tmp_path / "set")
    clean = captions(steps(opened(tmp_path / "set", shuffle_buffer=1), batch_size=23, stop=1))
    bad = clean[5:7] + clean[22:]  # two in a row, and the epoch's last, which the next one follows
    for path in (tmp_path / "set").iterdir():
        files = {}
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                data = file.read()
                spoilt = member.name.endswith(".png") and member.name[:-4] in bad
                files[member.name] = data[:40] if spoilt else data
        pack(path, files)
    stream = opened(tmp_path / "set", shuffle_buffer=1, max_bad=3 / 23)
    with pytest.warns(UserWarning, match="a sample is replaced by the next"):
        drawn = captions(steps(stream, batch_size=23, stop=2))
    assert drawn[:22] == [*clean[:5], clean[7], clean[7], *clean[7:22]]
    assert drawn[22] == next(text for text in drawn[23:] if text not in bad)
    assert {Path(name).stem for name in stream.replaced} == set(bad)
    reasons = Counter(error.reason for error in stream.replaced.values())
    assert reasons == {"cannot be decoded": 3}
    stream = opened(tmp_path / "set", shuffle_buffer=1, max_bad=2.9 / 23)
    with (
        pytest.raises(ValueError, match=r"3 of 23 samples are bad, .*: 3 cannot be decoded; the"),
        pytest.warns(UserWarning, match="a sample is replaced"),
    ):
        steps(stream, batch_size=23, stop=2)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_more_bad_images_in_a_row_than_a_batch_has_are_passed_over(
    tmp_path: Path, batch_size: int
) -> None:
    together(tmp_path / "set")
    clean = captions(steps(opened(tmp_path / "set", shuffle_buffer=1), batch_size=23, stop=1))
    bad = clean[6:10]
    for path in (tmp_path / "set").iterdir():
        files = {}
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                spoilt = member.name.endswith(".png") and member.name[:-4] in bad
                files[member.name] = file.read()[:40] if spoilt else file.read()
        pack(path, files)
    stream = opened(tmp_path / "set", shuffle_buffer=1, max_bad=0.5)
    with pytest.warns(UserWarning, match="a sample is replaced by the next"):
        drawn = captions(steps(stream, batch_size=batch_size, stop=18 // batch_size))
    # Each stands for the next good one, which comes at its own place as well.
    wanted = [clean[10] if text in bad else text for text in clean]
    assert drawn == wanted[: len(drawn)]


def test_too_much_that_is_bad_ends_the_stream_early(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for number in range(30):
        bad_tar(tmp_path / "set" / f"{number:02}.tar", str(number))
    for max_bad, message in (
        (0.01, r"20 of \d+ samples are bad, more than max_bad=0\.01: 20 cannot be decoded; the"),
        (0.0, r"1 of \d+ samples are bad"),
        (1.0, r"30 of 30 samples are bad, more than max_bad=1\.0"),
    ):
        with (
            pytest.raises(ValueError, match=message),
            pytest.warns(UserWarning, match="a sample is replaced"),
        ):
            steps(opened(tmp_path / "set", max_bad=max_bad))


def test_what_captions_tell_is_left_out_and_counted(tmp_path: Path) -> None:
    with_texts(tmp_path / "set")
    (tmp_path / "set" / "1.txt").write_bytes(b"caf\xe9")
    (tmp_path / "set" / "2.txt").write_text(" ")
    (tmp_path / "set" / "4.txt").unlink()
    found = [{"path": "5.png", "reason": "too large"}, {"path": "gone.png", "reason": "x"}]
    listed = tmp_path / "bad.jsonl"
    listed.write_text("\n".join(map(json.dumps, found)))
    options: dict[str, Any] = {"bad_samples": listed, "exclude": {"text": [TEXTS[6]]}}
    stream = opened(tmp_path / "set", max_bad=0.9, **options)
    assert list(stream.some_captions(10)) == [TEXTS[0], TEXTS[3]]
    assert stream.left_out == {"text is not UTF-8": 1, "no caption": 2, "too large": 1}
    assert stream.num_samples == 2
    with pytest.raises(ValueError, match=r"4 of 6 samples are bad, more than max_bad=0\.1: 2 no"):
        list(opened(tmp_path / "set", max_bad=0.1, **options).some_captions(99))
    kept = opened(tmp_path / "set", max_bad=0.9, allow_empty_caption=True)
    assert sorted(kept.some_captions(10)).count("") == 2


def test_images_that_are_not_there_are_replaced(tmp_path: Path) -> None:
    with_jsonl(tmp_path / "set")
    (tmp_path / "1.png").write_bytes(IMAGES[1])
    (tmp_path / "set" / "1.png").unlink()
    (tmp_path / "set" / "1.png").symlink_to(tmp_path / "1.png")
    (tmp_path / "set" / "2.png").unlink()
    stream = opened(tmp_path / "set", max_bad=0.5)
    with pytest.warns(UserWarning, match="a sample is replaced"):
        drawn = captions(steps(stream, batch_size=7, stop=1))
    assert set(drawn) == {text for i, text in enumerate(TEXTS) if i not in (1, 2)}
    reasons = {name: error.reason for name, error in stream.replaced.items()}
    assert reasons == {"1.png": "leads outside", "2.png": "missing image"}


@pytest.mark.parametrize("write", [parquets, hub])
def test_rows_cannot_name_files(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "set")
    (tmp_path / "1.png").write_bytes(IMAGES[1])
    rows = [
        {"image": {"bytes": None, "path": path}, "text": "x"}
        for path in (str(tmp_path / "1.png"), f"file://{tmp_path}/1.png", None)
    ]
    kinds = {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "text": pa.string()}
    table = pa.Table.from_pylist(rows, pa.schema(kinds))
    pq.write_table(table, tmp_path / "set" / "train-0.parquet")
    stream = opened(tmp_path / "set", max_bad=0.5)
    assert len(list(stream.some_captions(99))) == 7
    with pytest.raises(
        ValueError, match=r"3 of \d samples are bad, .*: 2 leads outside, 1 missing"
    ):
        steps(opened(tmp_path / "set", max_bad=0.2))


def test_a_chunk_tells_what_is_bad(tmp_path: Path) -> None:
    tars(tmp_path / "set")
    bad_tar(tmp_path / "set" / "002.tar")
    _, part = next(opened(tmp_path / "set").chunks(100, lambda number: True))
    *good, bad = part
    assert len(good) == COUNT
    assert isinstance(bad, BadSample)
    assert (bad.reason, bad.detail.split()[0]) == ("cannot be decoded", "'002.tar/bad.png'")


@pytest.mark.parametrize("write", KINDS)
def test_a_stream_shorter_than_a_batch_is_refused_with_numbers(
    tmp_path: Path, write: Write
) -> None:
    write(tmp_path / "set")
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"^batch_size=8 must be at most 7, the number of"):
            steps(opened(tmp_path / "set", num_workers=workers), batch_size=8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split": "test"}, r"no split 'test', only \['train'\]"),
        ({"caption_columns": ("title",)}, r"no column 'title'.*, only \['image', 'text'\]"),
        ({"exclude": {"group": ["x"]}}, "no column 'group'"),
        ({"image_column": "text"}, "column 'text' holds no images"),
    ],
)
@pytest.mark.parametrize("write", [with_texts, tars, parquets, hub])
def test_what_a_stream_does_not_have_is_named(
    tmp_path: Path, write: Write, fields: dict[str, object], message: str
) -> None:
    write(tmp_path / "set")
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / "set", **fields)


def test_rows_of_the_hub_have_no_numbers(tmp_path: Path) -> None:
    hub(tmp_path / "set")
    (tmp_path / "bad.jsonl").write_text(json.dumps({"path": "train:1", "reason": "too small"}))
    with pytest.raises(ValueError, match=r"bad_samples=.* cannot be used: rows of the hub's files"):
        opened(tmp_path / "set", bad_samples=tmp_path / "bad.jsonl")


def test_captions_of_another_kind_are_refused(tmp_path: Path) -> None:
    fields = json.dumps({"text": 3}).encode()
    pack(tmp_path / "a.tar", {"a.png": IMAGES[0], "a.json": fields})
    stream = opened(tmp_path / "a.tar")
    with pytest.raises(
        ValueError, match="the column 'text' must hold texts or lists of them, not 3"
    ):
        list(stream.some_captions(99))


def test_hostile_and_broken_tars_are_refused_as_by_random_access(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "a.tar", "w") as tar:
        add(tar, "link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        for name in ("/absolute.png", "../up.png", "a.pkl", "pipe:touch canary.png"):
            add(tar, name, IMAGES[0])
        add(tar, "pipe:touch canary.txt", b"only a name")
    stream = opened(tmp_path / "set", max_bad=0.7)
    assert list(stream.some_captions(9)) == ["only a name"]
    assert stream.left_out == {"unsafe name": 2}
    whole = (tmp_path / "set" / "a.tar").read_bytes()
    (tmp_path / "set" / "b.tar").write_bytes(whole[:2000])
    with pytest.raises(ValueError, match=r"b\.tar ends with"):
        list(opened(tmp_path / "set").some_captions(99))
    (tmp_path / "set" / "b.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(ValueError, match=r"b\.tar is no tar file: bad header at byte 0"):
        steps(opened(tmp_path / "set"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no such folder", "is no file or folder here"),
        ("nobody/nothing", "cannot be read as a folder or from the"),
        ("shape", "is no file or folder here"),
    ],
)
def test_unknown_data_is_named(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"data='{name}' {reason}"):
        opened(Path(name))
