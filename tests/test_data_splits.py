"""Which files are of which split: none is trained on by the form of its name."""

import json
from pathlib import Path

import datasets
import pytest
from support.data_files import IMAGE, captioned, captions, config, opened, table, write
from test_tar import pack

from latentdiff.data.opening import open_images


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("train", "other", "split"),
    [
        ("train.parquet", "test.parquet", "test"),
        ("a-0.parquet", "val-0.parquet", "validation"),
        ("data/train.0.parquet", "data/Valid.0.parquet", "validation"),
        ("latest.parquet", "eval/a.parquet", "test"),
        ("test_of_mine/train-0.parquet", "train/test-0.parquet", "test"),
    ],
)
def test_no_split_is_trained_on_by_the_form_of_its_name(
    tmp_path: Path, train: str, other: str, split: str
) -> None:
    """test.parquet and val-0.parquet were taken for more of the training data."""
    for name, text in ((train, "train"), (other, "other")):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        table(tmp_path / "set", name, text=[text, text])
    assert set(captions(opened(tmp_path / "set"))) == {"train"}
    assert set(captions(opened(tmp_path / "set", split=split))) == {"other"}


def test_a_folder_called_val_is_the_validation_split(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", captioned("1.png", start="train/"))
    write(folder, captioned("2.png", start="val/"))
    assert captions(opened(folder, split="validation")) == ["2.png"]
    assert list(opened(folder).index.names()) == ["train/1.png"]
    write(folder, captioned("3.png", start="validation/"))
    with pytest.raises(ValueError, match=r"two folders of one split: \['validation', 'val'\]"):
        opened(folder)


@pytest.mark.parametrize("stream", [False, True])
def test_metadata_above_the_splits_lists_the_images_of_each(tmp_path: Path, stream: bool) -> None:
    """It was ignored, and the images had no captions."""
    folder = write(tmp_path / "set", {"train/1.png": IMAGE, "test/2.png": IMAGE})
    rows = [{"file_name": name, "text": name} for name in ("train/1.png", "test/2.png")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for split, name in (("train", "train/1.png"), ("test", "test/2.png")):
        assert captions(open_images(config(folder, split=split, stream=stream))) == [name]


def test_images_of_no_split_are_told(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", captioned("1.png", start="train/"))
    write(folder, captioned("2.png", start="more/"))
    with pytest.warns(UserWarning, match=r"the splits train, so that others .* 'more/2\.png'"):
        assert captions(opened(folder)) == ["1.png"]
    pack(tmp_path / "set" / "a.tar", captioned("3.png"))
    with pytest.warns(UserWarning, match=r"images in tars, so that others .* 'more/2\.png'"):
        assert captions(opened(folder)) == ["3.png"]
    (folder / "metadata.csv").write_text("file_name,text\nmore/2.png,listed\n")
    (folder / "train").rename(tmp_path / "train")
    (folder / "more/2.txt").unlink()
    with pytest.warns(UserWarning, match=r"images that 'metadata\.csv' lists, .* 'a\.tar'"):
        assert captions(opened(folder)) == ["listed"]


def test_what_datasets_saved_to_disk_is_told(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a"]})
    rows.save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match=r"holds no images; .*save_to_disk: .* to_parquet"):
        opened(tmp_path / "set")
