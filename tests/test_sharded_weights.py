"""Variants and shards: what diffusers and transformers write is found, and what lies is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from support.parity import same_weights
from support.tiny import tiny_pipeline, transformers_tower
from torch import nn

from latentdiff.formats.sharded_weights import load_weights
from latentdiff.models.text import TextEncoder
from latentdiff.models.unet import UNet
from latentdiff.models.vae import VAE
from latentdiff.pipeline import Pipeline

STEM = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return tiny_pipeline(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def references(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """diffusers' and transformers' own networks with our weights."""
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    return {
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet"),
        "vae": AutoencoderKL.from_pretrained(folder / "vae"),
        "text_encoder": transformers_tower(pipeline.text_encoder),
    }


def load(name: str, folder: Path, **options: Any) -> nn.Module:
    if name == "text_encoder":
        return TextEncoder.from_pretrained(folder, **options).model
    return {"unet": UNet, "vae": VAE}[name].from_pretrained(folder / name, **options)


@pytest.mark.parametrize("variant", [None, "fp16", "non_ema"])
@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder"])
def test_shards_of_any_variant_are_read_as_their_libraries_write_them(
    pipeline: Pipeline, references: dict[str, Any], tmp_path: Path, name: str, variant: str | None
) -> None:
    pipeline.save_pretrained(tmp_path)
    for path in (tmp_path / name).glob("*.safetensors"):
        path.unlink()
    references[name].save_pretrained(tmp_path / name, variant=variant, max_shard_size="20KB")
    assert len(list((tmp_path / name).glob("*-of-*.safetensors"))) > 1
    expected = getattr(pipeline, name)
    expected = expected.model if name == "text_encoder" else expected
    assert same_weights(load(name, tmp_path, variant=variant), expected)


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder"])
def test_a_variant_is_chosen_by_name_and_becomes_the_dtype_asked_for(
    pipeline: Pipeline, references: dict[str, Any], tmp_path: Path, name: str
) -> None:
    pipeline.save_pretrained(tmp_path)
    references[name].save_pretrained(tmp_path / name, variant="fp16")
    path = next((tmp_path / name).glob("*.fp16.safetensors"))
    save_file({key: t.half() + 1 for key, t in load_file(path).items()}, path)
    half = load(name, tmp_path, variant="fp16", dtype=torch.float16).state_dict()
    plain = load(name, tmp_path).state_dict()
    assert all(tensor.dtype == torch.float16 for tensor in half.values())
    assert all(torch.equal(half[key], plain[key].half() + 1) for key in plain)


def test_shards_named_as_before_diffusers_0_30_are_read(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.unet.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / f"{STEM}.safetensors")
    (tmp_path / f"{STEM}.safetensors").unlink()
    names = sorted(tensors)
    shards = {f"{STEM}-0000{i + 1}-of-00002.fp16.safetensors": names[i::2] for i in range(2)}
    for shard, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, tmp_path / shard)
    placed = {key: shard for shard, keys in shards.items() for key in keys}
    index = tmp_path / f"{STEM}.safetensors.fp16.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    assert same_weights(UNet.from_pretrained(tmp_path, variant="fp16"), pipeline.unet)


def test_the_vae_files_of_sd_1_and_2_with_the_attention_of_old_are_read(tmp_path: Path) -> None:
    """Their layers have the names of before diffusers 0.17, and every such file was refused."""
    reference = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    reference.save_pretrained(tmp_path)
    path = tmp_path / f"{STEM}.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(path).items():
        for new, former in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
        tensors[name] = tensor
    assert sum("proj_attn" in name for name in tensors) == 4
    save_file(tensors, path, metadata={"format": "pt"})
    assert same_weights(AutoencoderKL.from_pretrained(tmp_path), reference)
    assert same_weights(VAE.from_pretrained(tmp_path), reference)


def test_a_variant_that_is_not_there_is_refused_with_those_that_are(
    pipeline: Pipeline, references: dict[str, Any], tmp_path: Path
) -> None:
    references["unet"].save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    references["unet"].save_pretrained(tmp_path, variant="non_ema")
    with pytest.raises(
        ValueError, match=rf"{STEM}\.ema\.safetensors: no such file; variants found: fp16, non_ema"
    ):
        UNet.from_pretrained(tmp_path, variant="ema")
    with pytest.raises(
        ValueError, match=rf"{STEM}\.safetensors: no such file; variants found: fp16"
    ):
        UNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("variant", ["../fp16", "fp16/..", "", "f*16", "."])
def test_a_variant_is_a_word_and_no_path(pipeline: Pipeline, tmp_path: Path, variant: str) -> None:
    pipeline.unet.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no such file; variants found: plain$"):
        UNet.from_pretrained(tmp_path, variant=variant)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards and their index."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(2), "b": torch.ones(3)}, folder / "one.safetensors")
    save_file({"c": torch.zeros(1)}, folder / "two.safetensors")
    write_index(folder, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    path = folder / f"{STEM}.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_the_shards_together_are_the_weights(sharded: Path) -> None:
    loaded = load_weights(sharded, STEM)
    assert {name: tuple(t.shape) for name, t in loaded.items()} == {"a": (2,), "b": (3,), "c": (1,)}


@pytest.mark.parametrize(
    "shard",
    [
        "../one.safetensors",
        "/elsewhere/one.safetensors",
        "sub/one.safetensors",
        "..\\one.safetensors",
        "C:\\one.safetensors",
        "one.bin",
        "one.safetensors\0",
        "one.safetensors\n",
        "~/one.safetensors",
        7,
        None,
    ],
)
def test_shards_lie_in_the_folder_of_their_index(sharded: Path, shard: object) -> None:
    write_index(sharded, {"a": shard})
    with pytest.raises(ValueError, match=r"allowed: \.safetensors files in the same folder"):
        load_weights(sharded, STEM)


@pytest.mark.parametrize("absolute", [True, False])
def test_a_shard_that_is_a_link_to_elsewhere_is_refused(sharded: Path, absolute: bool) -> None:
    outside = sharded.parent / "outside.safetensors"
    save_file({"c": torch.zeros(1)}, outside)
    (sharded / "two.safetensors").unlink()
    (sharded / "two.safetensors").symlink_to(outside if absolute else Path("..") / outside.name)
    with pytest.raises(ValueError, match=r"two\.safetensors: is a link to outside its folder"):
        load_weights(sharded, STEM)


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ({"a": "one.safetensors", "b": "one.safetensors"}, None),
        ({"a": "one.safetensors", "c": "two.safetensors"}, "tensor b is not in the index"),
        (
            {"a": "two.safetensors", "b": "one.safetensors", "c": "two.safetensors"},
            r"one\.safetensors: tensor a is not in the index|tensor a is not there",
        ),
        ({"a": "one.safetensors", "b": "three.safetensors"}, "is not in the index|no such file"),
        ({}, "weight_map must be an object"),
        ([], "weight_map must be an object"),
        (None, "weight_map must be an object"),
        ({str(i): f"{i}.safetensors" for i in range(1001)}, "names 1001 shards, more than 1000"),
    ],
)
def test_index_and_shards_must_say_the_same(
    sharded: Path, weight_map: object, reason: str | None
) -> None:
    write_index(sharded, weight_map)
    if reason is None:
        assert load_weights(sharded, STEM).keys() == {"a", "b"}
        return
    with pytest.raises(ValueError, match=reason):
        load_weights(sharded, STEM)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    save_file({"c": torch.zeros(1), "a": torch.ones(2)}, sharded / "two.safetensors")
    with pytest.raises(ValueError, match=r"two\.safetensors: tensor a is not in the index"):
        load_weights(sharded, STEM)
