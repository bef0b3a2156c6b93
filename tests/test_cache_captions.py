"""A finished cache whose data has changed: captions are read anew, and other images are named."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from test_cache import Cut, Watched, data_config, vae, write_images

from latentdiff.data.cache import LatentCache
from latentdiff.data.cache_captions import changed_data
from latentdiff.data.cache_writer import write_cache
from latentdiff.data.opening import open_images
from latentdiff.formats.weights import load_json, save_json
from latentdiff.models.vae import VAE


class Idle(VAE):
    """A VAE that must not encode again."""

    def encode(self, images: torch.Tensor) -> Any:
        raise AssertionError("an image is encoded anew")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Seven images with captions, and tmp_path / "cache" of them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    write_images(tmp_path / "set", 7)
    assert write(tmp_path) == ""
    return tmp_path / "set"


def write(home: Path, network: VAE | None = None, **fields: Any) -> str:
    images = open_images(data_config(home / "set", **fields))
    network = vae() if network is None else network
    return write_cache(home / "cache", images, network, batch_size=4, chunk_size=3)


def again(home: Path, **fields: Any) -> str:
    """Write the finished cache with a network that refuses to encode."""
    idle = Idle(vae().config)
    idle.load_state_dict(vae().state_dict())
    return write(home, idle.eval(), **fields)


def edit(data: Path, row: int, **values: Any) -> None:
    """Change a row of the metadata; None deletes it."""
    path = data / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows[row] |= values
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")


@pytest.mark.parametrize("stream", [False, True])
def test_edited_captions_are_read_anew_and_nothing_is_encoded(
    data: Path, tmp_path: Path, stream: bool
) -> None:
    """A cache of other captions was refused as "another data", and hours of encoding were due."""
    if stream:
        shutil.rmtree(tmp_path / "cache")
        write(tmp_path, stream=True)
    before = LatentCache(tmp_path / "cache")
    fingerprint, moments = before.fingerprint, [before[i]["moments"] for i in range(7)]
    edit(data, 2, text="a cat")
    edit(data, 5, more=["a dog", "a hound"])
    said = again(tmp_path, stream=stream)
    assert said == "the captions of 2 of 7 images have changed, no image has"
    cache = LatentCache(tmp_path / "cache")
    assert list(cache.captions) == list(open_images(data_config(data)).captions or [])
    assert [cache.captions[i][0] for i in (2, 5)] == ["a cat", "image 5"]
    assert all(cache[i]["moments"].equal(moments[i]) for i in range(7))
    assert cache.fingerprint != fingerprint
    assert again(tmp_path, stream=stream) == ""
    edit(data, 2, text="image 2")
    edit(data, 5, more=["一\u2028", "a\nb"])
    again(tmp_path, stream=stream)
    assert LatentCache(tmp_path / "cache").fingerprint == fingerprint  # so that its runs go on


def test_other_options_of_captions_are_read_anew(data: Path, tmp_path: Path) -> None:
    said = again(tmp_path, caption_columns=("text",), caption_templates={"text": ["a {}"]})
    assert said == "the captions of 7 of 7 images have changed, no image has"
    cache = LatentCache(tmp_path / "cache")
    assert list(cache.captions) == [[f"a image {i}"] for i in range(7)]
    assert cache.header["options"]["caption_templates"] == {"text": ["a {}"]}


def test_files_that_were_only_copied_or_touched_are_the_same(data: Path, tmp_path: Path) -> None:
    """Their times are other ones, and a copied data set had to be encoded anew."""
    fingerprint = LatentCache(tmp_path / "cache").fingerprint
    for path in data.iterdir():
        os.utime(path, (1, 1))
    data.rename(tmp_path / "moved")
    (tmp_path / "set").symlink_to(tmp_path / "moved")
    assert again(tmp_path) == "the captions of 0 of 7 images have changed, no image has"
    assert LatentCache(tmp_path / "cache").fingerprint == fingerprint


def test_another_image_is_named_and_nothing_is_written(data: Path, tmp_path: Path) -> None:
    files = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    refused = "was made of other images: {}; choose a new folder or delete this one"
    Image.new("RGB", (20, 20), "red").save(data / "003.png")
    with pytest.raises(ValueError, match=refused.format("'003.png' is another image")):
        again(tmp_path)
    edit(data, 3, file_name="002.png")
    with pytest.raises(ValueError, match=r"'002\.png' stands where the cache has '003\.png'"):
        again(tmp_path)
    lines = (data / "metadata.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (data / "metadata.jsonl").write_text("".join(lines[:3]), encoding="utf-8")
    with pytest.raises(ValueError, match=refused.format("'003.png' is gone")):
        again(tmp_path)
    assert {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == files


def test_a_new_image_is_named_and_a_bad_one_is_left_out(data: Path, tmp_path: Path) -> None:
    (data / "bad.png").write_bytes(b"no image")
    with (data / "metadata.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"file_name": "bad.png", "text": "bad", "more": []}\n')
    said = again(tmp_path, max_bad=0.2)
    assert said == "the captions of 0 of 7 images have changed, no image has"
    cache = LatentCache(tmp_path / "cache")
    assert cache.header["left_out"] == {"cannot be decoded": 1}
    assert "bad.png" in (tmp_path / "cache" / "left_out.jsonl").read_text(encoding="utf-8")
    Image.new("RGB", (20, 20), "red").save(data / "bad.png")
    with pytest.raises(ValueError, match=r"'bad.png' stands where the cache has no more"):
        again(tmp_path)


def test_a_change_of_the_data_is_seen_from_the_cache(data: Path, tmp_path: Path) -> None:
    """Captions that were edited after a cache was made trained as they had been, unsaid."""
    cache = LatentCache(tmp_path / "cache")
    assert cache.data == str(data)
    assert changed_data(cache) is None
    edit(data, 0, text="a cat")
    assert changed_data(cache) == str(data)
    again(tmp_path)
    assert changed_data(LatentCache(tmp_path / "cache")) is None
    (data / "metadata.jsonl").write_text("{", encoding="utf-8")
    assert changed_data(LatentCache(tmp_path / "cache")) == str(data)
    shutil.rmtree(data)  # it may lie on another machine
    assert changed_data(LatentCache(tmp_path / "cache")) is None


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"caption_columns": ("text",)}, r"caption_columns was \['text', 'more'\] and is"),
        ({"exclude": {"text": ["image 0"]}}, r"exclude was {} and is {'text': \['image 0'\]}"),
    ],
)
def test_a_begun_cache_goes_on_with_the_captions_that_it_began_with(
    data: Path, tmp_path: Path, fields: dict[str, Any], named: str
) -> None:
    shutil.rmtree(tmp_path / "cache")
    images = open_images(data_config(data))
    with pytest.raises(Cut):
        write_cache(tmp_path / "cache", Watched(images, 1), vae(), batch_size=4, chunk_size=3)
    with pytest.raises(ValueError, match=f"holds another cache: {named}"):
        write(tmp_path, **fields)


def test_caches_of_versions_that_noted_less_are_read_and_kept(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache" / "header.json"
    header = load_json(path)
    del header["options"], header["samples"]
    save_json(header, path)
    assert again(tmp_path) == ""
    cache = LatentCache(tmp_path / "cache")
    assert (cache.data, changed_data(cache)) == (None, None)
    edit(data, 0, text="a cat")
    with pytest.raises(ValueError, match="holds another cache: its data is another; choose"):
        again(tmp_path)
