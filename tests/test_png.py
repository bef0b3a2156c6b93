"""Metadata in PNG files: any text survives, no pixel changes, and no hostile file does harm."""

import json
import random
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from latentdiff.formats import png
from latentdiff.formats.png import Record, RequestRecord, read_png, save_png
from latentdiff.request import Request

HOSTILE = [
    "中文 提示词",
    "🐈‍⬛ 👩🏽‍🚀",
    "a\0b\r\n\t\x1b[31m",
    "<script>alert(1)</script>",
    "猫" * 5000,
    "",
    "\ud800 \udcff",
]
RECORD: Record = {
    "request": {"prompt": "a cat", "seed": 2**64 - 1, "steps": 20, "guidance_scale": 7.5},
    "model": "emoji",
    "model_sha256": "ab" * 32,
    "dtype": "float32",
    "device": "cpu",
    "packages": {"torch": "2.12.1"},
    "loras": [{"name": "ink.safetensors", "sha256": "cd" * 32, "scale": 0.5}],
}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.frombytes("RGB", (16, 24), random.Random(0).randbytes(16 * 24 * 3))


def with_prompt(prompt: str) -> dict[str, Any]:
    return {**RECORD, "request": {**RECORD["request"], "prompt": prompt}}


def chunk(kind: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def chunks(path: Path) -> list[tuple[bytes, bytes]]:
    data, found = path.read_bytes()[8:], []
    while data:
        (length,) = struct.unpack(">I", data[:4])
        found.append((data[4:8], data[8 : 8 + length]))
        data = data[12 + length :]
    return found


def forge(path: Path, *kinds_and_contents: tuple[bytes, bytes], size: int = 1) -> Path:
    """A PNG file of any chunks after its header."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0))
    body = b"".join(chunk(kind, content) for kind, content in kinds_and_contents)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b""))
    return path


def with_record(path: Path, content: str) -> Path:
    return forge(path, (b"iTXt", b"latentdiff\0\0\0\0\0" + content.encode()))


def test_any_text_comes_back_from_the_record(folder: Path, image: Image.Image) -> None:
    for prompt in HOSTILE:
        save_png(image, folder / "hostile.png", parameters=prompt, record=with_prompt(prompt))
        assert read_png(folder / "hostile.png").record == with_prompt(prompt)


@given(prompt=st.text(max_size=2000), model=st.text(st.characters(), max_size=50))
@settings(max_examples=60, deadline=None)
def test_made_up_texts_come_back_from_the_record(
    folder: Path, image: Image.Image, prompt: str, model: str
) -> None:
    """Two lone surrogates that make one character together come back as that character."""
    model = model.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    record = {**with_prompt(prompt), "model": model}
    save_png(image, folder / "text.png", parameters=prompt, record=record)
    read = read_png(folder / "text.png")
    assert read.record == record
    assert read.parameters == prompt.replace("\0", "?")


def test_parameters_are_text_that_every_reader_of_png_knows(
    folder: Path, image: Image.Image
) -> None:
    """Not compressed: readers in browsers seldom unpack; Latin-1 as tEXt, the rest as iTXt."""
    for text, kind in (("café, 20", b"tEXt"), ("猫" * 5000, b"iTXt")):
        save_png(image, folder / "p.png", parameters=text)
        found = [content for name, content in chunks(folder / "p.png") if name == kind]
        assert len(found) == 1
        assert found[0].endswith(text.encode("latin-1" if kind == b"tEXt" else "utf-8"))
        assert found[0].startswith(b"parameters\0")


def test_the_record_is_one_json_chunk_compressed_when_it_is_long(
    folder: Path, image: Image.Image
) -> None:
    for prompt, compressed in (("a cat", False), ("a cat" * 1000, True)):
        save_png(image, folder / "r.png", record=with_prompt(prompt))
        [(_, content)] = [c for c in chunks(folder / "r.png") if c[0] == b"iTXt"]
        assert content.startswith(b"latentdiff\0" + bytes([compressed]))
        text = zlib.decompress(content[15:]) if compressed else content[15:]
        assert json.loads(text) == {"version": 1, **with_prompt(prompt)}


def test_a_record_too_long_to_be_unpacked_is_not_compressed(
    folder: Path, image: Image.Image
) -> None:
    record = with_prompt("x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1))
    save_png(image, folder / "long.png", record=record)
    assert read_png(folder / "long.png").record == record


def test_metadata_changes_no_pixel(folder: Path, image: Image.Image) -> None:
    save_png(image, folder / "with.png", parameters="a cat", record=RECORD)
    save_png(image, folder / "without.png")
    assert [kind for kind, _ in chunks(folder / "without.png")] == [b"IHDR", b"IDAT", b"IEND"]
    packed = [
        [c for c in chunks(folder / n) if c[0] == b"IDAT"] for n in ("with.png", "without.png")
    ]
    assert packed[0] == packed[1]
    with Image.open(folder / "with.png") as read:
        assert read.tobytes() == image.tobytes()


def test_every_option_of_a_request_has_its_place_in_the_record() -> None:
    given_otherwise = {"image", "mask_image", "progress", "num_images", "num_inference_steps"}
    given_otherwise |= {"num_images_per_prompt", "generator"}
    options = {field.name for field in fields(Request) if field.init}
    assert RequestRecord.__annotations__.keys() == options - given_otherwise


def test_what_could_not_be_read_is_not_written(folder: Path, image: Image.Image) -> None:
    for wrong in ({**RECORD, "colour": 1}, {**RECORD, "dtype": None}, {"model": "emoji"}):
        with pytest.raises(ValueError, match="record"):
            save_png(image, folder / "wrong.png", record=wrong)
    assert not (folder / "wrong.png").exists()


def test_a_failed_write_leaves_the_old_image_and_no_other_file(
    tmp_path: Path, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_png(image, tmp_path / "a.png", record=RECORD)

    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        save_png(image, tmp_path / "a.png", record=with_prompt("a dog"))
    assert read_png(tmp_path / "a.png").record == RECORD
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def nested(depth: int) -> list[Any]:
    return [nested(depth - 1)] if depth else []


def damaged(change: Callable[[dict[str, Any]], object]) -> str:
    content = json.loads(json.dumps({"version": 1, **RECORD}))
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "Expecting"),
        ("[]", "a JSON list, not an object"),
        ("NaN", "NaN is not JSON"),
        ("[" * 100_000, "nested too deeply|Expecting"),
        ('{"version": ' + "9" * 5000 + "}", "limit|digits"),
        (damaged(lambda c: c.pop("version")), "version=None"),
        (damaged(lambda c: c.update(version=2)), "version=2 is not 1"),
        (damaged(lambda c: c.update(version=True)), "version=True is not 1"),
        (damaged(lambda c: c.update(colour="red")), "unknown"),
        (damaged(lambda c: c.pop("model")), "has no field model"),
        (damaged(lambda c: c.update(request=[])), "request=.* must be an object"),
        (damaged(lambda c: c["request"].pop("seed")), "has no field seed"),
        (damaged(lambda c: c["request"].update(steps="20")), "steps='20' must be of type int"),
        (damaged(lambda c: c["request"].update(steps=True)), "steps=True must be of type int"),
        (damaged(lambda c: c["request"].update(guidance_scale=10**400)), "of type float"),
        (damaged(lambda c: c["request"].update(prompt=["x" * 10**5])), "prompt=.* of type str"),
        (damaged(lambda c: c["request"].update(guidance_interval=["x"])), "guidance_interval"),
        (damaged(lambda c: c["request"].update({"x" * 10**5: 1})), "unknown"),
        (damaged(lambda c: c.update(dtype="load")), "dtype='load' must be one of float32"),
        (damaged(lambda c: c["packages"].update({"x" * 10**5: 1})), "packages"),
        (damaged(lambda c: c["request"].update(prompt=nested(300))), "nested|type str"),
        (damaged(lambda c: c["loras"].append({})), r"loras\[1\] has no field"),
        (damaged(lambda c: c.update(packages={"torch": 2})), r"packages\['torch'\]=2"),
    ],
)
def test_a_wrong_record_is_refused_in_one_sentence_that_names_the_file(
    tmp_path: Path, content: str, part: str
) -> None:
    path = with_record(tmp_path / "wrong.png", content)
    with pytest.raises(ValueError, match=part) as caught:
        read_png(path)
    assert str(caught.value).startswith(f"{path}: its record of the drawing cannot be read: ")
    assert len(str(caught.value)) < len(str(path)) + 250
    assert "\n" not in str(caught.value)


def test_a_file_without_metadata_says_so(tmp_path: Path, image: Image.Image) -> None:
    save_png(image, tmp_path / "plain.png")
    with pytest.raises(ValueError, match=r"plain\.png: has no metadata"):
        read_png(tmp_path / "plain.png")
    save_png(image, tmp_path / "theirs.png", parameters="a cat")
    assert read_png(tmp_path / "theirs.png") == png.Metadata("a cat", None)


def test_what_is_not_a_png_file_is_refused(tmp_path: Path, image: Image.Image) -> None:
    image.save(tmp_path / "jpeg.png", format="JPEG")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    for name in ("jpeg.png", "empty.png", "folder.png", "missing.png"):
        with pytest.raises(ValueError, match=f"{name}: .*PNG image"):
            read_png(tmp_path / name)


def test_a_decompression_bomb_is_refused(tmp_path: Path) -> None:
    bomb = b"latentdiff\0\1\0\0\0" + zlib.compress(b" " * 2**26, 9)
    forge(tmp_path / "bomb.png", (b"iTXt", bomb))
    with pytest.raises(ValueError, match=r"bomb\.png: cannot be read"):
        read_png(tmp_path / "bomb.png")
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="too large"):
        read_png(tmp_path / "sparse.png")


def test_long_texts_of_other_programs_are_no_hindrance(tmp_path: Path, image: Image.Image) -> None:
    """A text above Pillow's limit, such as a workflow, made the whole file unreadable."""
    record = (b"iTXt", b"latentdiff\0\0\0\0\0" + json.dumps({"version": 1, **RECORD}).encode())
    long = zlib.compress(b" " * 2**21)
    others = [(b"zTXt", b"workflow\0\0" + long), (b"iTXt", b"prompt\0\1\0\0\0" + long)]
    path = forge(tmp_path / "long.png", *others, record, *[(b"zTXt", b"a\0\0" + long)] * 70)
    assert read_png(path).record == RECORD
    image.save(path)
    whole = path.read_bytes()
    assert png.without_texts(whole) == whole
    head, tail = whole[:33], whole[33:]
    with_texts = head + b"".join(chunk(*other) for other in others) + tail
    assert png.without_texts(with_texts) == whole
    assert png.without_texts(with_texts, keep=("prompt",)) == head + chunk(*others[1]) + tail
    cut = with_texts[: 33 + 40]
    assert png.without_texts(cut) == cut
    assert png.without_texts(b"GIF89a") == b"GIF89a"


def test_no_pixel_is_decoded_to_read_a_record(tmp_path: Path) -> None:
    """Pixels that are none, of an image for which Pillow warns, and nothing after the record."""
    record = json.dumps({"version": 1, **RECORD}).encode()
    itxt, idat = (b"iTXt", b"latentdiff\0\0\0\0\0" + record), (b"IDAT", b"not zlib")
    forge(tmp_path / "huge.png", itxt, idat, size=12_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_png(tmp_path / "huge.png").record == RECORD
    forge(tmp_path / "bomb.png", itxt, idat, size=2**31 - 1)
    with pytest.raises(ValueError, match=r"bomb\.png: cannot be read"):
        read_png(tmp_path / "bomb.png")


@pytest.mark.parametrize("checked", [False, True])
def test_mutated_files_are_read_or_refused_with_a_sentence(
    tmp_path: Path, image: Image.Image, checked: bool
) -> None:
    """Once with bytes of the file changed, once the record's alone, under a check sum that fits."""
    path, rng = tmp_path / "mutated.png", random.Random(0)
    record = json.dumps({"version": 1, **with_prompt("a cat" * 30)}).encode()
    save_png(image, path, parameters="a cat", record=with_prompt("a cat" * 300))
    whole = record if checked else path.read_bytes()
    refused = 0
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            data[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
        if checked:
            forge(path, (b"iTXt", b"latentdiff\0\0\0\0\0" + data))
        else:
            path.write_bytes(data[: rng.randint(0, 2 * len(data))])
        try:
            read_png(path)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"{path}: ")  # noqa: PT017 - of many, not of one
    assert refused > 150
