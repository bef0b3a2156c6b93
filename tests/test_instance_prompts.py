"""Captions by option: images without any are valid data, and fingerprints tell the prompts."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from support.scripts import config_class
from test_cache import vae

from latentdiff.cli import main
from latentdiff.data.cache import LatentCache
from latentdiff.data.cache_writer import write_cache
from latentdiff.data.config import DataConfig
from latentdiff.data.dataset import CaptionedImages
from latentdiff.data.stream import StreamedImages
from latentdiff.training.command_line import parse_config

PROMPTS = ["a photo of sks dog", "a close-up of sks dog, outside"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, of which one has a caption."""
    path = tmp_path / "set"
    path.mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (80 * i, 0, 0)).save(path / f"{i}.png")
    (path / "0.txt").write_text("one of its own")
    return path


def config(folder: Path, **fields: Any) -> DataConfig:
    return DataConfig(data=str(folder), image_size=16, **fields)


def opened(folder: Path, prompts: list[str]) -> CaptionedImages:
    return CaptionedImages(config(folder, instance_prompts=prompts))


@pytest.mark.parametrize("open_images", [CaptionedImages, StreamedImages])
def test_every_image_has_the_prompts_and_no_other_caption(folder: Path, open_images: Any) -> None:
    dataset = open_images(config(folder, instance_prompts=PROMPTS))
    assert [example["captions"] for example in dataset.some_examples(3)] == [PROMPTS] * 3
    assert list(dataset.caption_lists(3)) == [PROMPTS] * 3
    assert [sample.captions for sample in dataset.samples()] == [PROMPTS] * 3
    assert dataset.left_out == Counter()


def test_without_prompts_two_images_of_the_folder_are_bad(folder: Path) -> None:
    assert CaptionedImages(config(folder, max_bad=1)).left_out == {"no caption": 2}


@pytest.mark.parametrize("open_images", [CaptionedImages, StreamedImages])
def test_the_prompts_are_part_of_the_fingerprint(folder: Path, open_images: Any) -> None:
    prompts = ([], PROMPTS[:1], PROMPTS)
    each = [open_images(config(folder, instance_prompts=one, max_bad=1)) for one in prompts]
    assert len({dataset.fingerprint for dataset in each}) == 3


def test_what_identifies_data_without_prompts_is_what_it_was(folder: Path) -> None:
    """Caches and checkpoints from before the option was there stay valid."""
    options = {"data": "there", "caption_columns": ("text",)}
    assert config(folder).with_prompts(options) == options


def test_a_cache_has_the_prompts_and_takes_new_ones_without_encoding(
    folder: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    write_cache(cache, opened(folder, PROMPTS), vae(), batch_size=4)
    assert list(LatentCache(cache).captions) == [PROMPTS] * 3
    said = write_cache(cache, opened(folder, PROMPTS[:1]), vae(), batch_size=4)
    assert said == "the captions of 3 of 3 images have changed, no image has"
    assert list(LatentCache(cache).captions) == [PROMPTS[:1]] * 3


def parsed(name: str, *args: str) -> Any:
    return parse_config(config_class(name), args)[0]


@pytest.mark.parametrize("name", ["train_unet", "cache_latents"])
def test_the_scripts_that_train_on_captions_take_prompts(name: str) -> None:
    option = f"--instance_prompts={json.dumps(PROMPTS)}"
    assert list(parsed(name, option).data.instance_prompts) == PROMPTS


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("train_unet", ["--caption_columns=[name]"], "caption_columns=['name'] has no effect with"),
        ("train_unet", ['--caption_templates={"text": ["a {}"]}'], "caption_templates={'text': ["),
        ("cache_latents", ['--caption_weights={"text": 2}'], "caption_weights={'text': 2.0} has"),
        ("cache_latents", ["--allow_empty_caption=true"], "allow_empty_caption=true has no effect"),
        ("train_unet", ["--cache=there"], "instance_prompts=['a'] has no effect with cache=there"),
        ("train_vae", [], "instance_prompts=['a'] has no effect in this script"),
        ("train_clip", [], "instance_prompts=['a'] has no effect in this script"),
    ],
)
def test_what_has_no_effect_beside_prompts_is_refused(
    name: str, args: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=r"; leave it out$") as caught:
        parsed(name, "--instance_prompts=[a]", *args)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "a photo of sks dog",
            "instance_prompts=a photo of sks dog must be a list, such as [a, b]",
        ),
        ('["a dog", " "]', "instance_prompts=['a dog', ' '] must be texts that are not blank"),
    ],
)
def test_prompts_that_are_none_are_one_sentence(value: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        parsed("train_unet", f"--instance_prompts={value}")
    assert "\n" not in str(caught.value)


def test_the_check_finds_nothing_wrong_with_images_that_have_prompts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", str(folder), "--instance_prompts", *PROMPTS]) == 0
    assert "captions each   2" in capsys.readouterr().out
    assert (folder / "bad_samples.jsonl").read_text() == ""
    assert main(["data", "check", str(folder)]) == 2


def test_the_check_refuses_columns_beside_prompts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["data", "check", str(folder), "--allow_empty_caption", "--instance_prompts", "a dog"]
    assert main(args) == 2
    assert "--allow_empty_caption have no effect with --inst" in capsys.readouterr().err
