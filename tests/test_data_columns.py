"""What columns hold: one that is not used never matters, a wrong text is one bad sample."""

from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from support.data_files import IMAGE, Write, captions, config, jsonl, opened, table, tar, write

from latentdiff.data.opening import open_images


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("write_rows", [jsonl, tar])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        [2**63, 1],
        [["a"], "b"],
        [["a", 1], ["b"]],
        [{"x": 1}, [{}]],
        ["half \ud83d", "b"],
        [[{"deep": "\udce9"}], None],
    ],
)
def test_columns_that_are_not_used_do_no_harm(
    tmp_path: Path, write_rows: Write, stream: bool, values: list[object]
) -> None:
    """A whole number above 2**63, or a list and a text, in any column refused the whole set."""
    rows = [{"text": str(i), "other": value, "\ud83d": 1} for i, value in enumerate(values)]
    write_rows(tmp_path / "set", rows)
    dataset = open_images(config(tmp_path / "set", stream=stream))
    assert captions(dataset) == ["0", "1"]
    if not stream:
        assert "other" in dataset.index.columns  # which a message may have to list


def test_a_column_that_is_used_and_mixed_is_told_with_its_rows(tmp_path: Path) -> None:
    jsonl(tmp_path / "set", [{"text": "a"}, {"text": ["b"]}])
    with pytest.raises(ValueError, match=r"'text' holds .*: a str in '0\.png', a list in '1\.png'"):
        opened(tmp_path / "set")
    jsonl(tmp_path / "large", [{"text": "a", "how": 2**63}])
    with pytest.raises(ValueError, match=r"the column 'how' cannot be read: .*too large"):
        opened(tmp_path / "large", caption_weights={"text": "how"})


@pytest.mark.parametrize("write_rows", [jsonl, tar])
@pytest.mark.parametrize("stream", [False, True])
def test_half_a_character_is_one_bad_sample(
    tmp_path: Path, write_rows: Write, stream: bool
) -> None:
    """An emoji cut in two by another program refused the whole set, without file or line."""
    texts = ["a \U0001f431", "b \ud83d", ["c", "\udc31"], "d"]
    if write_rows is jsonl:
        texts[2] = "\udc31"
    write_rows(tmp_path / "set", [{"text": text} for text in texts])
    dataset = open_images(config(tmp_path / "set", stream=stream, max_bad=0.5))
    assert captions(dataset) == ["a \U0001f431", "d"]
    assert dataset.left_out == {"text is not UTF-8": 2}
    where = r"metadata\.jsonl, line 2" if write_rows is jsonl else r"1\.json"
    with pytest.raises(ValueError, match=rf"'text' holds .*{where}|{where}: 'text' holds"):
        opened(tmp_path / "set")


def test_a_wrong_byte_in_csv_is_one_bad_sample(tmp_path: Path) -> None:
    rows = b"file_name,text,other\n0.png,a,caf\xe9\n1.png,caf\xe9,b\n"
    folder = write(tmp_path / "set", {"0.png": IMAGE, "1.png": IMAGE, "metadata.csv": rows})
    dataset = opened(folder, max_bad=0.5)
    assert captions(dataset) == ["a"]
    assert dataset.left_out == {"text is not UTF-8": 1}
    with pytest.raises(ValueError, match=r"'1\.png' \(text is not UTF-8: metadata\.csv, line 3"):
        opened(folder)


def test_utf16_without_a_mark_is_no_caption(tmp_path: Path) -> None:
    files = {"0.png": IMAGE, "0.txt": "a cat".encode("utf-16-le")}
    with pytest.raises(ValueError, match=r"text is not UTF-8: 0\.txt, byte 1 is 0"):
        opened(write(tmp_path / "set", files))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("values", "excluded"),
    [
        ([["cat", "nsfw"], ["cat"], None], "nsfw"),
        ([3, 4, None], "3"),
        ([True, False, None], "true"),
    ],
)
def test_lists_numbers_and_truths_are_excluded(
    tmp_path: Path, stream: bool, values: list[object], excluded: str
) -> None:
    """A value never was equal to a list of tags or to a number, so that nothing was left out."""
    rows = [{"text": str(i), "tags": value} for i, value in enumerate(values)]
    jsonl(tmp_path / "set", rows)
    options = {"stream": stream, "exclude": {"tags": [excluded]}}
    assert captions(open_images(config(tmp_path / "set", **options))) == ["1", "2"]


def test_a_value_that_excludes_nothing_is_told(tmp_path: Path) -> None:
    jsonl(tmp_path / "set", [{"text": "a", "tags": ["cat"]}])
    with pytest.warns(UserWarning, match="nothing by 'nswf', which no row has in"):
        assert captions(opened(tmp_path / "set", exclude={"tags": ["nswf"]})) == ["a"]


@pytest.mark.parametrize("stream", [False, True])
def test_parquet_files_may_disagree_on_columns_that_are_not_used(
    tmp_path: Path, stream: bool
) -> None:
    table(tmp_path / "set", "0.parquet", text=["a", "b"], id=["x", "y"], more=[1, 2])
    table(tmp_path / "set", "1.parquet", text=["c", "d"], id=[1, 2])
    assert captions(open_images(config(tmp_path / "set", stream=stream))) == [*"abcd"]
    with pytest.raises(ValueError, match=r"1\.parquet has int64 in the column 'id', .*string"):
        open_images(config(tmp_path / "set", stream=stream, caption_columns=("id",)))


@pytest.mark.parametrize("stream", [False, True])
def test_a_column_of_parquet_may_be_empty_in_the_first_file(tmp_path: Path, stream: bool) -> None:
    """The first file decided the type, so that texts could not be read after an empty column."""
    table(tmp_path / "set", "0.parquet", text=[None, None], more=[None, None], n=[1, 2])
    table(tmp_path / "set", "1.parquet", text=["a", "b"], more=["x", "y"], n=[0.5, 1.5])
    dataset = open_images(config(tmp_path / "set", stream=stream, max_bad=0.5))
    assert captions(dataset) == ["a", "b"]
    assert dataset.left_out == {"no caption": 2}


def test_text_of_parquet_that_is_not_utf8_is_told_with_its_place(tmp_path: Path) -> None:
    """Random access said "Invalid UTF8 sequence in input", of no column and no file."""
    content = pa.array([b"a", b"caf\xe9"])
    text = pa.Array.from_buffers(pa.string(), 2, content.buffers())
    table(tmp_path / "set", "0.parquet", text=text)
    with pytest.raises(ValueError, match="'text' holds text that is not UTF-8, in one of the rows"):
        opened(tmp_path / "set")
    with pytest.raises(ValueError, match=r"0\.parquet is no parquet file: .*Invalid UTF8"):
        captions(open_images(config(tmp_path / "set", stream=True)))
