"""Captioned images: folders read as they are meant, and refused in one sentence if not."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import latentdiff.data.dataset
from latentdiff.data.config import DataConfig
from latentdiff.data.dataset import CaptionedImages
from latentdiff.data.decode import BadSample
from latentdiff.data.samples import Sample, collate, square
from latentdiff.images import to_floats, to_pixels

Rows = Sequence[Mapping[str, object]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` keeps what it read: not in the user's home, and not from test to test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def make_image(colour: str, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("RGB", size, colour)


def folder(path: Path, rows: Rows, split: str = "") -> Path:
    """An image folder with a grey image for each row, a little darker than the one before."""
    (path / split).mkdir(parents=True)
    for i, row in enumerate(rows):
        Image.new("L", (8, 8), 200 - 10 * i).save(path / split / str(row["file_name"]))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (path / split / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return path


def config(data: Path | str, **fields: object) -> DataConfig:
    return replace(DataConfig(data=str(data), image_size=8), **fields)


ROWS: Rows = (
    {"file_name": "a.png", "text": "cat", "text_zh": "猫", "aliases": ["kitty", "puss"], "kind": 1},
    {"file_name": "b.png", "text": "dog", "text_zh": "狗", "aliases": [], "kind": 2},
    {"file_name": "c.png", "text": "owl", "text_zh": None, "aliases": None, "kind": 3},
)


def test_transparent_images_lie_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    grey = Image.new("LA", (4, 4), (0, 0))
    palette = make_image("red", (4, 4)).quantize()
    palette.info["transparency"] = palette.getpixel((0, 0))
    for image in (clear, grey, palette):
        assert set(square(image, 4).get_flattened_data()) == {(255, 255, 255)}
    assert set(square(half, 4).get_flattened_data()) == {(255, 127, 127)}


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGB", "YCbCr", "RGBA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = square(make_image("white").convert(mode), 4)
    assert image.mode == "RGB"
    assert set(image.get_flattened_data()) == {(255, 255, 255)}


def test_sixteen_bits_of_grey_keep_their_brightness() -> None:
    """Pillow clips them: X-ray images came out white."""
    image = Image.fromarray(np.full((4, 4), 128 * 257, np.uint16))
    assert image.mode == "I;16"
    assert set(square(image, 4).get_flattened_data()) == {(128, 128, 128)}


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    image = make_image("blue", (8, 8))
    image.paste("red", (0, 0, 8, 4))  # above in the file, to the right when upright
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn 90 degrees clockwise
    (tmp_path / "set").mkdir()
    image.save(tmp_path / "set" / "1.png", exif=exif)
    (tmp_path / "set" / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "x"}\n')
    upright = square(Image.open(tmp_path / "set" / "1.png"), 8)
    assert upright.getpixel((7, 4)) == (255, 0, 0)
    assert upright.getpixel((0, 4)) == (0, 0, 255)
    loaded = CaptionedImages(config(tmp_path / "set")).image(0)
    assert torch.equal(loaded, torch.from_numpy(np.array(upright)).permute(2, 0, 1))


def test_the_middle_is_cut_out() -> None:
    wide = make_image("red", (16, 8))
    wide.paste("blue", (4, 0, 12, 8))
    for image in (wide, wide.transpose(Image.Transpose.ROTATE_90)):
        assert set(square(image, 8).get_flattened_data()) == {(0, 0, 255)}


def test_images_of_the_right_size_stay_as_they_are() -> None:
    pixels = torch.randint(256, (8, 8, 3), dtype=torch.uint8).numpy()
    np.testing.assert_array_equal(np.array(square(Image.fromarray(pixels), 8)), pixels)


def test_small_and_large_images_get_the_size_asked_for() -> None:
    for size in ((3, 5), (640, 480), (1, 1)):
        assert square(make_image("green", size), 8).size == (8, 8)


def test_pixels_survive_the_way_to_floats_and_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    floats = to_floats(pixels)
    assert (floats.min(), floats.max()) == (-1, 1)
    assert torch.equal(to_pixels(floats), pixels)


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_examples_are_images_with_their_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Decoded anew each time, as large sets are, and kept in memory, as small ones are."""
    monkeypatch.setattr(latentdiff.data.dataset, "MEMORY_LIMIT", limit)
    dataset = CaptionedImages(config(folder(tmp_path / "set", ROWS)))
    assert len(dataset) == 3
    for _ in range(2):
        examples = [dataset[i] for i in (2, 0)]
        batch = collate(examples)
        assert batch["images"].dtype == torch.uint8
        assert batch["images"].shape == (2, 3, 8, 8)
        assert batch["images"].flatten(1).float().mean(dim=1).tolist() == [180, 200]
        assert batch["captions"] == [["owl"], ["cat"]]


def test_captions_come_from_several_columns_lists_and_templates(tmp_path: Path) -> None:
    columns = ("text", "text_zh", "aliases")
    templates = {"text": ("{}", "a {}"), "aliases": ("the {}",)}
    data = folder(tmp_path / "set", ROWS)
    dataset = CaptionedImages(config(data, caption_columns=columns, caption_templates=templates))
    assert list(dataset.captions) == [
        ["cat", "a cat", "猫", "the kitty", "the puss"],
        ["dog", "a dog", "狗"],
        ["owl", "a owl"],
    ]


def test_excluded_rows_are_left_out(tmp_path: Path) -> None:
    data = folder(tmp_path / "set", ROWS)
    with pytest.warns(UserWarning, match="exclude leaves out nothing by 7, which no row has"):
        dataset = CaptionedImages(config(data, exclude={"kind": [2, 7], "text": ["owl"]}))
    assert list(dataset.captions) == [["cat"]]
    assert dataset.image(0).float().mean() == 200


def test_splits_are_folders(tmp_path: Path) -> None:
    folder(tmp_path / "set", ROWS[:2], "train")
    folder(tmp_path / "set", ROWS[:1], "test")
    for split, captions in (("train", [["cat"], ["dog"]]), ("test", [["cat"]])):
        assert list(CaptionedImages(config(tmp_path / "set", split=split)).captions) == captions


def test_captions_may_hold_any_character(tmp_path: Path) -> None:
    """A line separator in a caption is no end of a JSON line: it was read as one."""
    text = "a cat \u2028 and\x85 a dog"
    data = folder(tmp_path / "set", [{"file_name": "1.png", "text": text}])
    assert list(CaptionedImages(config(data)).captions) == [[text]]


def test_images_without_captions_train_a_vae(tmp_path: Path) -> None:
    data = folder(tmp_path / "set", ROWS)
    (data / "metadata.jsonl").unlink()
    dataset = CaptionedImages(config(data, caption_columns=()))
    assert len(dataset) == 3
    assert collate([dataset[1]])["captions"] == [[]]


def no_metadata(data: Path) -> None:
    (data / "metadata.jsonl").unlink()


def no_rows(data: Path) -> None:
    (data / "metadata.jsonl").write_text("")


def no_image(data: Path) -> None:
    (data / "b.png").unlink()


def bad_line(data: Path) -> None:
    with (data / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "d.p')


def no_file_name(data: Path) -> None:
    with (data / "metadata.jsonl").open("a") as file:
        file.write('{"text": "d"}\n')


def mixed_types(data: Path) -> None:
    with (data / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "a.png", "text": 3}\n')


def no_caption(data: Path) -> None:
    with (data / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "a.png"}\n')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_metadata, r"set' has no column 'text', only \['image'\].* metadata\.jsonl .*file_name"),
        (no_rows, r"metadata\.jsonl has no rows"),
        (no_image, r"set': 1 of 3 samples are bad, .*: 1 missing image; the first is 'b\.png'"),
        (
            bad_line,
            r"""metadata\.jsonl, line 4: expected .*file_name, got '\{"file_name": "d\.p'""",
        ),
        (no_file_name, r"metadata\.jsonl, line 4: expected a JSON object with file_name"),
        (mixed_types, r"metadata.jsonl: the column 'text' holds different kinds of values"),
        (no_caption, r"set': 1 of 4 samples are bad, .*: 1 no caption; the first is 'a\.png'"),
    ],
)
def test_broken_folders_are_refused_in_one_sentence(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    data = folder(tmp_path / "set", ROWS)
    spoil(data)
    with pytest.raises(ValueError, match=message) as caught:
        CaptionedImages(config(data))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"split": "test"}, r"no split 'test', only \['train'\]"),
        ({"caption_columns": ("title",)}, r"no column 'title', only \['image', 'text'"),
        ({"image_column": "photo"}, "no column 'photo'"),
        ({"image_column": "text"}, "column 'text' holds no images; those"),
        ({"exclude": {"group": ["x"]}}, "no column 'group'"),
        ({"exclude": {"kind": [1, 2, 3]}}, "no image is left in split 'train'"),
    ],
)
def test_what_a_folder_does_not_have_is_named(
    tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    data = folder(tmp_path / "set", ROWS)
    with pytest.raises(ValueError, match=message):
        CaptionedImages(config(data, **fields))


def test_damaged_images_are_refused_by_row(tmp_path: Path) -> None:
    rows = [{"file_name": f"{i}.jpg", "text": "x"} for i in range(3)]
    data = folder(tmp_path / "set", rows)
    whole = (data / "1.jpg").read_bytes()
    dataset = CaptionedImages(config(data))
    for damaged in (whole[: len(whole) // 2], b"no image"):
        (data / "1.jpg").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"set': the image of row 1, '1\.jpg', cannot be used"):
            dataset.image(1)


def test_a_sample_set_apart_never_stands_in_for_a_bad_one(tmp_path: Path) -> None:
    rows = [{"file_name": f"{i}.png", "text": word} for i, word in enumerate("abcd")]
    data = folder(tmp_path / "set", rows)
    dataset = CaptionedImages(config(data, max_bad=0.5))
    (data / "1.png").write_bytes(b"no image")
    dataset.validation = frozenset({2})
    with pytest.warns(UserWarning, match="a sample is replaced by the next"):
        captions = [dataset[number]["captions"][0] for number in range(4)]
    assert captions == ["a", "d", "c", "d"]


@pytest.mark.parametrize("num_workers", [0, 3])
def test_chunks_are_all_samples_in_order_at_full_size(tmp_path: Path, num_workers: int) -> None:
    rows = [{"file_name": f"{i}.png", "text": f"image {i}"} for i in range(7)]
    data = folder(tmp_path / "set", rows)
    make_image("red", (31, 20)).save(data / "3.png")
    (data / "5.png").write_bytes(b"no image")
    dataset = CaptionedImages(config(data, num_workers=num_workers, exclude={"text": ["image 1"]}))
    asked = []
    chunks = {}
    for number, samples in dataset.chunks(2, lambda number: asked.append(number) or number != 1):
        chunks[number] = list(samples)
    assert asked == [0, 1, 2]
    assert list(chunks) == [0, 2]
    assert [sample.name for sample in chunks[0]] == ["0.png", "2.png"]
    assert [sample.captions for sample in chunks[0]] == [["image 0"], ["image 2"]]
    bad, last = chunks[2]
    assert isinstance(bad, BadSample)
    assert bad.reason == "cannot be decoded"
    assert bad.detail.startswith("'5.png'")
    assert last.name == "6.png"
    [(_, samples)] = dataset.chunks(6, lambda number: True)
    sample = list(samples)[2]
    assert isinstance(sample, Sample)
    assert (sample.image.size, sample.image.mode) == ((31, 20), "RGB")


OPTIONS = {
    "image_size": 4,
    "caption_columns": ("text", "text_zh"),
    "caption_templates": {"text": ["a {}"]},
    "allow_empty_caption": True,
    "exclude": {"kind": [2]},
    "upscale_limit": 2.0,
    "background": "black",
    "first_frame": True,
    "max_megapixels": 1.0,
}


@pytest.mark.parametrize("option", OPTIONS)
def test_the_fingerprint_is_of_every_option_that_changes_samples(
    tmp_path: Path, option: str
) -> None:
    data = folder(tmp_path / "set", ROWS)
    first = CaptionedImages(config(data))
    assert (
        CaptionedImages(config(data, num_workers=2, max_bad=0.5)).fingerprint == first.fingerprint
    )
    other = CaptionedImages(config(data, **{option: OPTIONS[option]}))
    assert other.fingerprint != first.fingerprint


def test_the_fingerprint_is_of_every_caption_and_image(tmp_path: Path) -> None:
    data = folder(tmp_path / "set", ROWS)
    prints = [CaptionedImages(config(data)).fingerprint]
    text = (data / "metadata.jsonl").read_text(encoding="utf-8")
    (data / "metadata.jsonl").write_text(text.replace("dog", "cow"), encoding="utf-8")
    prints.append(CaptionedImages(config(data)).fingerprint)
    make_image("red", (9, 9)).save(data / "b.png")
    prints.append(CaptionedImages(config(data)).fingerprint)
    assert len(set(prints)) == 3


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
        CaptionedImages(config(name))


def test_a_folder_without_anything_is_refused_even_without_captions(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with pytest.raises(ValueError, match="set' holds no images"):
        CaptionedImages(config(tmp_path / "set", caption_columns=()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 0}, "image_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        (
            {"caption_templates": {"txt": ["a {}"]}},
            r"'txt' must be one of caption_columns=\['text'",
        ),
        ({"caption_templates": {"text": ["a %s"]}}, r"'text' must have forms with \{\}"),
        ({"caption_templates": {"text": []}}, r"'text' must have forms with \{\}"),
    ],
)
def test_impossible_configurations_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config("set", **fields)


@pytest.mark.exhaustive
def test_the_default_draws_shapes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dataset = CaptionedImages(DataConfig())
    assert dataset.image(0).shape == (3, 64, 64)
    drawn = (tmp_path / "runs/shapes/data").stat().st_mtime_ns
    assert list(CaptionedImages(DataConfig()).captions) == list(dataset.captions)
    assert (tmp_path / "runs/shapes/data").stat().st_mtime_ns == drawn
