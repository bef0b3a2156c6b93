"""CLIPs to start from: what is read computes what its source does, and the rest is refused."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import torch
from open_clip.model import _build_text_tower
from PIL import Image
from support.clips import MEAN, SIDE, STD, tiny_clip
from support.tiny import tiny_text_encoder
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPModel

from latentdiff.formats.weights import save_safetensors
from latentdiff.images import from_pil
from latentdiff.models.clip import CLIPSize
from latentdiff.models.clip_start import Pixels, load_clip, load_start
from latentdiff.models.text import TextEncoder
from latentdiff.options import compose
from latentdiff.planning.workload import make_workload
from latentdiff.tasks.clip.config import TrainCLIP
from latentdiff.tasks.clip.start import check_shapes

SIZE = CLIPSize()
PROMPTS = ["a red circle", "红色", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    tiny_clip(path)
    return path


def photo() -> Image.Image:
    return Image.frombytes("RGB", (SIDE, SIDE), bytes(i * 7 % 256 for i in range(3 * SIDE**2)))


@torch.no_grad()
def test_both_towers_compute_what_transformers_does_from_the_same_folder(folder: Path) -> None:
    """Images go through its image processor there, and through our scaling here."""
    theirs = CLIPModel.from_pretrained(folder).eval()
    start = load_start(str(folder), SIZE, image_size=SIDE)
    (ours, scaled, bias), tokenizer = start.towers, start.tokenizer
    ids = tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    processed = CLIPImageProcessor.from_pretrained(folder)(photo(), return_tensors="pt")
    expected = theirs(input_ids=ids, pixel_values=processed["pixel_values"])
    values = scaled(from_pil(photo(), (SIDE, SIDE))[None])
    torch.testing.assert_close(values, processed["pixel_values"], rtol=0, atol=1e-5)
    found = ours.eval()(input_ids=ids, pixel_values=processed["pixel_values"])
    assert same(ours, theirs)
    for name in ("text_embeds", "image_embeds", "logits_per_image"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    assert (scaled, bias) == (Pixels(tuple(MEAN), tuple(STD)), None)
    assert start.shapes["clip.image_width"] == 12
    assert start.shapes["image_size"] == SIDE


def test_images_in_minus_one_to_one_are_what_ours_are_trained_on() -> None:
    images = torch.rand(2, 3, 4, 4) * 2 - 1
    assert Pixels()(images) is images
    half = Pixels((0.5, 0.5, 0.25), (0.5, 0.25, 0.5))(images)
    torch.testing.assert_close(half[:, 1], 2 * images[:, 1])
    torch.testing.assert_close(half[:, 2], images[:, 2] + 0.5)


def same_states(encoder: TextEncoder, init: str, **options: Any) -> None:
    """A CLIP that starts from a text tower has its states, and a new image tower of our size."""
    start = load_start(init, SIZE, image_size=32)
    with torch.no_grad():
        ids = encoder.tokenize(PROMPTS)
        states = start.towers.model.text_model(input_ids=ids).last_hidden_state
    assert torch.equal(states, encoder(PROMPTS))
    assert start.tokenizer.get_vocab() == encoder.tokenizer.get_vocab()
    assert start.shapes["clip.text_width"] == encoder.width
    assert "clip.image_width" not in start.shapes
    assert start.towers.pixels == Pixels()
    assert start.towers.model.config.vision_config.hidden_size == SIZE.image_width  # pyright: ignore[reportAttributeAccessIssue]


def test_a_text_encoder_gives_its_tower_and_its_tokenizer(tmp_path: Path) -> None:
    encoder = tiny_text_encoder(tmp_path / "scratch")
    encoder.save_pretrained(tmp_path / "pipeline")
    same_states(encoder, str(tmp_path / "pipeline"))


def test_the_embedded_text_encoder_is_one_to_start_from() -> None:
    from latentdiff.formats.diffusers import find_component

    same_states(TextEncoder.from_pretrained(find_component("emoji", "text_encoder")), "emoji")


def test_a_text_tower_of_open_clip_is_one_to_start_from(tmp_path: Path) -> None:
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 8, "patch_size": 8, "width": 8, "layers": 1, "head_width": 8},
        "text_cfg": {"context_length": 16, "width": 32, "heads": 4, "layers": 2},
    }
    (tmp_path / "start.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    weights = tmp_path / "tower.safetensors"
    tower = _build_text_tower(24, config["text_cfg"])  # pyright: ignore[reportArgumentType]
    save_safetensors(tower.state_dict(), weights)
    same_states(TextEncoder.from_open_clip("start", weights), f"open_clip:start:{weights}")
    for init in ("open_clip:start", "open_clip:start:"):
        with pytest.raises(ValueError, match="must be open_clip:NAME:WEIGHTS"):
            load_start(init, SIZE, image_size=32)


def test_a_clip_of_the_hub_comes_from_its_cache_when_offline(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--somebody--clip"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("a" * 40))
    start = load_start("somebody/clip", SIZE, image_size=SIDE)
    assert same(start.towers.model, CLIPModel.from_pretrained(folder))
    with pytest.raises(ValueError, match="init='nobody/nothing' is no folder, and"):
        load_start("nobody/nothing", SIZE, image_size=SIDE)


def same(one: CLIPModel, other: CLIPModel) -> bool:
    state: dict[str, Tensor] = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


def changed(folder: Path, copy: Path, file: str, **values: Any) -> Path:
    """A copy of a folder with other values in one of its JSON files; `key__inner` goes deeper."""
    shutil.copytree(folder, copy)
    content = json.loads((copy / file).read_text())
    for name, value in values.items():
        key, _, inner = name.partition("__")
        if inner:
            content[key][inner] = value
        else:
            content[key] = value
    (copy / file).write_text(json.dumps(content))
    return copy


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("config.json", {"model_type": "siglip"}, "model_type is 'siglip'; only clip is supported"),
        ("config.json", {"vision_config": None}, "text_config and vision_config must both"),
        ("config.json", {"projection_dim": 0}, "projection_dim=0 must be a whole number from 1"),
        ("config.json", {"logit_bias": "low"}, "logit_bias=.* must be a number from -1000 to 1000"),
        ("config.json", {"vision_config__patch_size": 5}, "image_size=16 must be divisible by pat"),
        ("config.json", {"vision_config__num_channels": 4}, "num_channels=4 of the image encoder"),
        ("config.json", {"vision_config__image_size": 1e9}, "image_size=.* of the image encoder"),
        ("config.json", {"vision_config__hidden_size": 13}, "hidden_size=13 must be divisible by"),
        ("config.json", {"text_config__hidden_size": 8}, "does not fit the configuration"),
        (
            "preprocessor_config.json",
            {"image_std": [0, 1, 1]},
            "image_std is .*; allowed are three",
        ),
        ("preprocessor_config.json", {"image_mean": [1, 1]}, "image_mean is .*; allowed are three"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize is .*; only true is"),
    ],
)
def test_what_is_no_clip_is_refused_with_its_file_and_key(
    folder: Path, tmp_path: Path, file: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_clip(changed(folder, tmp_path / "copy", file, **values))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_what_is_not_there_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: no such file"):
        load_start(str(tmp_path / "copy"), SIZE, image_size=SIDE)
    with pytest.raises(ValueError, match="is a file; allowed are"):
        load_start(str(folder / "model.safetensors"), SIZE, image_size=SIDE)
    with pytest.raises(ValueError, match="image_size=32 must be 16, that of the image tower"):
        load_start(str(folder), SIZE, image_size=32)


def test_options_of_other_shapes_are_refused_and_defaults_give_way(folder: Path) -> None:
    shapes = load_start(str(folder), SIZE, image_size=SIDE).shapes

    def check(**options: Any) -> None:
        flat = {"init": "there", "image_size": SIDE, **options}
        check_shapes(compose(TrainCLIP, flat), shapes)

    check()
    check(clip=CLIPSize(text_width=16, image_width=12), max_tokens=12)
    with pytest.raises(
        ValueError, match=r"clip\.text_width=32 contradicts init='there', whose is 16"
    ):
        check(clip=CLIPSize(text_width=32))
    with pytest.raises(ValueError, match="max_tokens=77 contradicts init='there', whose is 12"):
        check(max_tokens=77)


def test_a_plan_asks_for_the_shapes_in_place_of_init() -> None:
    settings = {"clip": asdict(SIZE), "init": "emoji"}
    with pytest.raises(ValueError, match="init='emoji' must be left out for a plan"):
        make_workload(settings)
