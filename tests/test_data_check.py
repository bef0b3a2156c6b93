"""`latentdiff data check`: everything decoded once, every fault counted and left out."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from support.broken_images import BAD, GOOD, photograph, saved
from torch.utils.data import DataLoader

from latentdiff.cli import main
from latentdiff.data.check import check_data
from latentdiff.data.config import DataConfig
from latentdiff.data.dataset import CaptionedImages
from latentdiff.data.samples import collate


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def faults(tmp_path: Path) -> Path:
    """A folder with a file for each row of the table of data faults."""
    folder = tmp_path / "set"
    folder.mkdir()
    lines = []
    for name, (make, _) in (GOOD | BAD).items():
        (folder / name).write_bytes(make())
        lines.append(json.dumps({"file_name": name, "text": f"this is {name}"}).encode())
    for name in ("silent.png", "empty_caption.png", "latin.png", "unnamed.png", "copy.png"):
        (folder / name).write_bytes(saved(photograph(seed=1)))
    lines += [
        b'{"file_name": "silent.png"}',
        b'{"file_name": "empty_caption.png", "text": " "}',
        b'{"file_name": "latin.png", "text": "caf\xe9"}',
        b'{"file_name": "copy.png", "text": "the bytes of plain.png"}',
        b'{"file_name": "copy.png", "text": "named before"}',
        b'{"file_name": "missing.png", "text": "nowhere"}',
    ]
    (folder / "metadata.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder


def test_a_list_of_another_size_is_not_believed(tmp_path: Path) -> None:
    """After a check for 128 pixels all images of 96 were too small for a training at 64."""
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(saved(photograph(seed=i)))
        (folder / f"{i}.txt").write_text("a photo")
    (folder / "3.png").write_bytes(b"no image")
    (folder / "3.txt").write_text("a photo")
    small = DataConfig(data=str(folder), image_size=8, max_bad=0.5)
    large = replace(small, image_size=1024, max_bad=1)
    assert check_data(large, folder).reasons == {"too small": 3, "cannot be decoded": 1}
    with pytest.warns(UserWarning, match="lists 3 too small by other options than these"):
        dataset = CaptionedImages(small)
    assert (len(dataset), dataset.left_out) == (3, {"cannot be decoded": 1})
    with pytest.raises(ValueError, match="no image is left"):
        CaptionedImages(large)
    check_data(small, folder)
    assert len(CaptionedImages(small)) == 3
    advice = r"max_bad=0.01: 1 cannot be decoded; .*; mend or remove them, or .* --max_bad 0.25"
    with pytest.raises(ValueError, match=advice):
        CaptionedImages(replace(small, max_bad=0.01))


def test_a_folder_that_is_not_there_is_no_question_for_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slip of the finger asked the hub for 25 seconds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mypics").mkdir()
    (tmp_path / "data" / "cats").mkdir(parents=True)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: pytest.fail(f"asked for {name}"))
    for data, meant in (
        ("mypic", "; did you mean 'mypics'?"),
        ("./mypicz", "; did you mean 'mypics'?"),
        ("data/cat", "; did you mean 'data/cats'?"),
        (str(tmp_path / "mypic"), f"; did you mean '{tmp_path}/mypics'?"),
        ("zebra", ". A data set of the hub is named owner/name"),
    ):
        expected = re.escape(f"data={data!r} is no file or folder here{meant}")
        for split in (None, "train"):
            with pytest.raises(ValueError, match=expected):
                check_data(DataConfig(data=data), tmp_path / "out", split=split)
    with pytest.raises(pytest.fail.Exception, match="asked for owner/name"):
        DataConfig(data="owner/name").splits()


REASONS = {
    "cannot be decoded": 4,
    "too large": 2,
    "animated": 2,
    "unknown range of values": 1,
    "too small": 1,
    "no caption": 2,
    "text is not UTF-8": 1,
    "duplicate name": 1,
    "missing image": 1,
}


def config(folder: Path, **fields: object) -> DataConfig:
    return replace(DataConfig(data=str(folder), image_size=32), **fields)


def bad_samples(folder: Path) -> dict[str, str]:
    with (folder / "bad_samples.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return {row["path"]: row["reason"] for row in rows}


@pytest.mark.parametrize("num_workers", [0, 3])
def test_every_fault_is_found_and_counted_once(faults: Path, num_workers: int) -> None:
    summary = check_data(config(faults, num_workers=num_workers), faults)
    assert summary.reasons == REASONS
    assert summary.samples == len(GOOD) + len(BAD) + 6
    assert summary.bad == sum(REASONS.values())
    assert summary.notes == Counter(note for _, note in GOOD.values() if note is not None)
    assert summary.duplicates == {"files": 1}
    assert summary.extra_files == {"count": 1, "first": ["unnamed.png"]}
    assert summary.sizes == {"32x32": len(GOOD), "32x48": 1}
    assert summary.aspect_ratios == {"1:1": len(GOOD), "2:3": 1}
    found = bad_samples(faults)
    assert {name: found[name] for name in BAD} == {
        name: reason for name, (_, reason) in BAD.items()
    }
    assert found["silent.png"] == "no caption"
    assert json.loads((faults / "summary.json").read_text())["reasons"] == REASONS


def test_the_place_of_a_wrong_byte_is_told(faults: Path) -> None:
    check_data(config(faults), faults)
    place = (faults / "metadata.jsonl").read_bytes().index(b"\xe9")
    assert f"metadata.jsonl, byte {place}" in (faults / "bad_samples.jsonl").read_text()


def test_options_decide_what_is_bad(faults: Path) -> None:
    options = {"first_frame": True, "allow_empty_caption": True, "upscale_limit": 1.1}
    summary = check_data(config(faults, **options), faults)
    forgiven = ("animated", "no caption", "too small")
    assert summary.reasons == {k: v for k, v in REASONS.items() if k not in forgiven}


def test_as_many_may_be_bad_as_the_digits_say(tmp_path: Path) -> None:
    """0.29 * 100 is 28.999999999999996, so that 29 bad samples of 100 were too many."""
    for i in range(100):
        (tmp_path / f"{i:02}.png").write_bytes(b"no image" if i < 29 else saved(photograph()))
    command = ["data", "check", str(tmp_path), "--caption_columns", "", "--max_bad"]
    assert main([*command, "0.29"]) == 0
    assert main([*command, "0.28"]) == 2
    data = config(tmp_path, caption_columns=(), bad_samples=tmp_path / "bad_samples.jsonl")
    assert len(CaptionedImages(replace(data, max_bad=0.29))) == 71


def test_training_leaves_out_what_the_check_found(faults: Path) -> None:
    check_data(config(faults), faults)
    with pytest.raises(ValueError, match=r"15 of 24 samples are bad, more than max_bad=0\.01: 4 "):
        CaptionedImages(config(faults))
    dataset = CaptionedImages(config(faults, max_bad=0.7))
    assert dataset.left_out == REASONS
    assert len(dataset) == len(GOOD) + 1
    assert dataset.captions[len(GOOD)] == ["the bytes of plain.png"]
    for i, name in enumerate(GOOD):
        assert dataset.captions[i] == [f"this is {name}"]
        assert dataset[i]["image"].shape == (3, 32, 32)
    assert not dataset.replaced


def test_a_second_check_finds_the_same(faults: Path) -> None:
    check_data(config(faults), faults)
    first = (faults / "bad_samples.jsonl").read_bytes(), (faults / "summary.json").read_bytes()
    check_data(config(faults), faults)
    second = (faults / "bad_samples.jsonl").read_bytes(), (faults / "summary.json").read_bytes()
    assert first == second


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """200 images, of which 7, 8 and 199 were damaged after the check."""
    folder = tmp_path / "spoilt"
    folder.mkdir()
    lines = [json.dumps({"file_name": f"{i:03}.png", "text": str(i)}) + "\n" for i in range(200)]
    (folder / "metadata.jsonl").write_text("".join(lines))
    for i in range(200):
        data = b"damaged" if i in (7, 8, 199) else saved(photograph((8, 8), seed=i))
        (folder / f"{i:03}.png").write_bytes(data)
    return folder


def test_a_sample_that_turns_bad_is_replaced_by_the_next_with_its_caption(spoilt: Path) -> None:
    dataset = CaptionedImages(config(spoilt, image_size=8, max_bad=0.02))
    with pytest.warns(UserWarning, match=r"replaced by the next: cannot be decoded: .*007\.png"):
        assert dataset[7]["captions"] == ["9"]
    assert [dataset[i]["captions"] for i in (6, 7, 8, 199)] == [["6"], ["9"], ["9"], ["0"]]
    assert (dataset[7]["image"] == dataset.image(9)).all()
    assert {i: error.reason for i, error in dataset.replaced.items()} == dict.fromkeys(
        (7, 8, 199), "cannot be decoded"
    )


@pytest.mark.filterwarnings("ignore:a sample is replaced")
def test_too_many_bad_samples_end_the_run(spoilt: Path) -> None:
    dataset = CaptionedImages(config(spoilt, image_size=8))
    assert dataset[7]["captions"] == ["9"]
    with pytest.raises(ValueError, match=r"3 of 200 samples turned out .*: 3 cannot be decoded"):
        dataset[199]


@pytest.mark.filterwarnings("ignore:a sample is replaced")
def test_a_set_without_a_good_sample_ends_the_run_whatever_is_allowed(spoilt: Path) -> None:
    for path in spoilt.glob("*.png"):
        path.write_bytes(b"damaged")
    dataset = CaptionedImages(config(spoilt, image_size=8, max_bad=1.0))
    with pytest.raises(ValueError, match="200 of 200 samples turned out to be bad"):
        dataset[0]


def test_the_command_writes_files_and_a_table(
    faults: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["data", "check", str(faults), "--image_size", "32", "--out", str(out)]
    assert main([*command, "--max_bad", "0.7"]) == 0
    table = capsys.readouterr().out
    assert "samples         24 train" in table
    assert "bad             15: 4 cannot be decoded, 2 animated" in table
    assert {path.name for path in out.iterdir()} == {"bad_samples.jsonl", "summary.json"}
    assert not (faults / "summary.json").exists()
    dataset = CaptionedImages(
        config(faults, bad_samples=out / "bad_samples.jsonl", max_bad=0.7),
    )
    assert len(dataset) == len(GOOD) + 1


def test_more_than_the_limit_is_exit_code_2(
    faults: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", str(faults), "--image_size", "32"]) == 2
    error = capsys.readouterr().err
    assert "data check: 15 of 24 samples are bad, more than max_bad=0.01: 4 cannot be" in error
    assert len(bad_samples(faults)) == 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/at/all"], "cannot be read as a folder or from the hub|--out is needed"),
        (["{set}", "--background", "whyte"], "background='whyte' must be a colour"),
        (["{set}", "--caption_columns", "title"], "no column 'title'"),
        (["{set}", "--split", "test"], r"no split 'test', only \['train'\]"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    faults: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", *(a.format(set=faults) for a in arguments)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "latentdiff" in line]
    assert len(lines) == 1
    assert re.search(message, lines[0])


@pytest.mark.filterwarnings("ignore:a sample is replaced")
def test_workers_replace_the_same_samples(spoilt: Path) -> None:
    """Whoever reads a sample, the same one stands in for it."""
    dataset = CaptionedImages(config(spoilt, image_size=8, max_bad=0.02))
    ids = [[6, 7, 8], [199, 0, 7]]
    loader = DataLoader(dataset, batch_sampler=ids, num_workers=2, collate_fn=collate)
    assert [batch["captions"] for batch in loader] == [
        [["6"], ["9"], ["9"]],
        [["0"], ["0"], ["9"]],
    ]


def test_the_sizes_of_buckets_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`data check` could not be told of bucket_step, as its page asks for."""
    shapes = [(16, 16)] * 3 + [(16, 32)]
    folder = tmp_path / "set"
    folder.mkdir()
    for i, shape in enumerate(shapes):
        (folder / f"{i}.png").write_bytes(saved(photograph(shape)))
    command = ["data", "check", str(folder), "--image_size", "16", "--bucket_step", "4"]
    command += ["--caption_columns", "", "--batch_size", "2"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "sizes           1 12x20, 3 16x16 train" in out
    assert "train: 1 of 2 sizes have fewer images than batch_size=2, so that each" in out
    assert "12x20 has 1;" in out
    assert json.loads((folder / "summary.json").read_text())["buckets"] == {
        "train": {"12x20": 1, "16x16": 3}
    }
    command[command.index("--bucket_step") + 1] = "0"
    assert main(command) == 2
    assert "--batch_size has no effect without --bucket_step" in capsys.readouterr().err
