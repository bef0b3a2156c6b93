"""Rows of the table of data faults that test_data_check.py, test_decode.py and others leave open.

docs/faults.md lists the rows with the tests that hold them.
"""

import ast
import io
import json
from collections import Counter
from pathlib import Path

import pytest
from datasets import config as datasets_config
from PIL import Image
from support.broken_images import photograph, saved, truncated
from support.scripts import ROOT, script

from latentdiff.data.check import check_data
from latentdiff.data.config import DataConfig
from latentdiff.data.dataset import CaptionedImages
from latentdiff.data.decode import BadSample, Decoding, decode


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def make_images(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    rows = [json.dumps({"file_name": name, "text": name}) + "\n" for name in files]
    (folder / "metadata.jsonl").write_text("".join(rows))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def good(count: int) -> dict[str, bytes]:
    return {f"{i:03}.png": saved(photograph((8, 8), seed=i)) for i in range(count)}


def config(folder: Path) -> DataConfig:
    return DataConfig(data=str(folder), image_size=8)


def test_half_a_photograph_passes_pillows_check_and_not_ours() -> None:
    with Image.open(io.BytesIO(truncated())) as image:
        image.verify()
    with pytest.raises(BadSample, match=r"cannot be decoded: .*truncated"):
        decode(truncated(), Decoding())


def test_nothing_asks_pillow_to_fill_up_what_is_truncated() -> None:
    for path in [*(ROOT / "latentdiff").rglob("*.py"), *(ROOT / "train").glob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert "LOAD_TRUNCATED_IMAGES" not in names, path


def test_the_limit_of_pixels_is_64_million() -> None:
    """By the header alone: the rest of these files is missing."""
    for side, reason in ((8_000, "cannot be decoded"), (8_001, "too large: 8001 x 8001")):
        whole = saved(Image.new("1", (side, side)), compress_level=1)
        with pytest.raises(BadSample, match=reason):
            decode(whole[:200], Decoding())


@pytest.mark.parametrize("ink", range(4))
def test_the_turned_inks_of_photoshops_jpegs_come_out_right(tmp_path: Path, ink: int) -> None:
    """Adobe's CMYK JPEGs hold 255 for no ink, which their APP14 segment says."""
    inks = [0, 0, 0, 0]
    inks[ink] = 255
    content = saved(Image.new("CMYK", (32, 32), tuple(inks)), "JPEG", quality=95)
    assert b"Adobe" in content[:100]
    image, notes = decode(content, Decoding())
    assert notes == ("CMYK without a profile",)
    expected = [(0, 255, 255), (255, 0, 255), (255, 255, 0), (0, 0, 0)][ink]
    found = image.getpixel((5, 5))
    assert isinstance(found, tuple)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 4
    summary = check_data(config(make_images(tmp_path / "set", {"adobe.jpg": content})), tmp_path)
    assert summary.notes == {"CMYK without a profile": 1}
    assert summary.bad == 0


@pytest.mark.parametrize(("bad", "refused"), [(1, False), (2, True)])
def test_one_bad_sample_in_a_hundred_is_the_most(tmp_path: Path, bad: int, refused: bool) -> None:
    files = good(100)
    for name in list(files)[10 : 10 + bad]:
        files[name] = truncated()
    folder = make_images(tmp_path / "set", files)
    summary = check_data(config(folder), folder)
    assert summary.reasons == {"cannot be decoded": bad}
    assert (summary.samples, summary.bad) == (100, bad)
    if not refused:
        dataset = CaptionedImages(config(folder))
        assert len(dataset) == 99
        assert dataset.left_out == Counter({"cannot be decoded": 1})
        return
    with pytest.raises(ValueError, match=r"2 of 100 samples are bad, .*: 2 cannot be decoded"):
        CaptionedImages(config(folder))


def test_a_caption_file_that_is_missing_or_empty_is_no_caption(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for i, content in enumerate(good(6).values()):
        (folder / f"{i}.png").write_bytes(content)
    for i, text in enumerate(("a cat", "", " \n", "\ufeff")):  # of the last two there is no file
        (folder / f"{i}.txt").write_text(text, encoding="utf-8")
    summary = check_data(config(folder), folder)
    assert summary.reasons == {"no caption": 5}
    found = [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]
    assert [row["path"] for row in found] == [f"{i}.png" for i in range(1, 6)]


@pytest.mark.parametrize("name", ["train_clip", "train_vae", "train_unet"])
def test_less_data_than_a_batch_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = make_images(tmp_path / "set", good(7))
    options = {"data": folder, "image_size": 8, "output_dir": tmp_path / "run", "batch_size": 8}
    if name == "train_unet":
        options |= {"vae": "nowhere", "text_encoder": "nowhere"}  # nobody looks for these yet
    monkeypatch.setattr("sys.argv", [name, *(f"--{k}={v}" for k, v in options.items())])
    with pytest.raises(ValueError, match=r"batch_size=8 .*7"):
        script(name).main()


def test_an_empty_set_is_refused_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with pytest.raises(ValueError, match="set' holds no images"):
        check_data(config(tmp_path / "set"), tmp_path)
    with pytest.raises(ValueError, match="set' holds no images"):
        CaptionedImages(config(tmp_path / "set"))
