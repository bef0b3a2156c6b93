"""Checkpoints from elsewhere: what they are shows in names and shapes, the rest is SD's custom."""

import base64
import dataclasses
import json
import re
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from support.interchange_table import Measured
from support.ldm import checkpoint
from torch import Tensor

from latentdiff.diffusion import Diffusion
from latentdiff.formats.ldm import compatibility
from latentdiff.formats.ldm.modelspec import OUR_KEY
from latentdiff.formats.ldm.yaml_config import save_ldm_config, to_ldm_config
from latentdiff.formats.single_file import SingleFile, read_single_file, write_single_file
from latentdiff.formats.weights import save_json, save_safetensors
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.models.vae import VAE, VAEConfig

pytestmark = pytest.mark.interchange

SMALL = UNetConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1, cross_attention_dim=64)
SMALL_2 = UNetConfig(
    block_out_channels=(64, 64, 128, 128),
    layers_per_block=2,
    cross_attention_dim=64,
    attention_head_dim=(1, 1, 2, 2),
    use_linear_projection=True,
)
VAE_CONFIG = VAEConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1)
LDM_CONFIG = to_ldm_config(
    SMALL.to_dict(),
    VAE_CONFIG.to_dict(),
    {"max_position_embeddings": 12},
    Diffusion("scaled_linear", "v_prediction").to_scheduler_config(),
    open_clip=False,
)
V_BIAS = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"


def written(
    folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> Path:
    save_safetensors(tensors, folder / "any name.safetensors", metadata)
    return folder / "any name.safetensors"


def read_quietly(path: Path, **options: Any) -> SingleFile:
    """Small models never have SD's own shape, of which a warning speaks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_single_file(path, **options)


@pytest.fixture(scope="module")
def sd1() -> dict[str, Tensor]:
    return checkpoint(SMALL, VAE_CONFIG)


@pytest.fixture(scope="module")
def sd2() -> dict[str, Tensor]:
    """With 24 layers of text, as published."""
    return checkpoint(SMALL_2, VAE_CONFIG, open_clip=True, layers=24)


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_an_original_checkpoint_is_read_as_diffusers_reads_it(
    sd1: dict[str, Tensor], tmp_path: Path, measured: Measured
) -> None:
    file = read_quietly(written(tmp_path, sd1))
    assert_equal(file.unet, convert_ldm_unet_checkpoint(sd1, {"layers_per_block": 1}))
    assert_equal(file.vae, convert_ldm_vae_checkpoint(sd1, VAE_CONFIG.to_dict()))
    assert_equal(file.text_encoder, convert_ldm_clip_checkpoint(sd1))
    measured("single file", "read", "LDM's names, as diffusers reads them", "weights", 0)
    assert UNetConfig.from_dict(file.unet_config) == SMALL
    assert VAEConfig.from_dict(file.vae_config) == VAE_CONFIG
    assert file.text_config["num_hidden_layers"] == 2
    assert file.text_config["hidden_act"] == "quick_gelu"
    assert file.tokenizer is None
    scheduler = file.scheduler_config
    assert not compatibility.differences(
        scheduler, compatibility.SD_BETAS | {"prediction_type": "epsilon"}
    )
    assert scheduler["set_alpha_to_one"] is False
    assert scheduler["steps_offset"] == 1


def test_of_sd_2_the_last_text_layer_is_left_out(sd2: dict[str, Tensor], tmp_path: Path) -> None:
    file = read_quietly(written(tmp_path, sd2))
    expected = dataclasses.replace(SMALL_2, sample_size=96, upcast_attention=True)  # it says v
    assert UNetConfig.from_dict(file.unet_config) == expected
    assert file.text_config["num_hidden_layers"] == 23
    assert file.text_config["hidden_act"] == "gelu"
    assert "text_model.encoder.layers.22.mlp.fc1.weight" in file.text_encoder
    assert "text_model.encoder.layers.23.mlp.fc1.weight" not in file.text_encoder
    for network, tensors in ((UNet(SMALL_2), file.unet), (VAE(VAE_CONFIG), file.vae)):
        network.load_state_dict(tensors)


def test_an_inpainting_model_shows_in_its_first_convolution(tmp_path: Path) -> None:
    config = UNetConfig(
        in_channels=9, block_out_channels=(32, 64), cross_attention_dim=64,
        down_block_types=SMALL.down_block_types[2:], up_block_types=SMALL.up_block_types[:2],
    )  # fmt: skip
    file = read_quietly(written(tmp_path, checkpoint(config, VAE_CONFIG)))
    assert UNetConfig.from_dict(file.unet_config) == config
    assert file.scheduler_config["prediction_type"] == "epsilon"


@pytest.mark.parametrize(
    ("metadata", "extra", "prediction"),
    [
        ({"modelspec.prediction_type": "v"}, [], "v_prediction"),
        ({"modelspec.prediction_type": "epsilon"}, ["v_pred"], "epsilon"),
        ({"modelspec.predict_key": "v"}, [], "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, [], "v_prediction"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, [], "epsilon"),
        ({}, ["v_pred"], "v_prediction"),
    ],
)
def test_the_prediction_is_what_tools_left_word_of(
    sd2: dict[str, Tensor],
    tmp_path: Path,
    metadata: dict[str, str],
    extra: list[str],
    prediction: str,
) -> None:
    tensors = sd2 | {name: torch.empty(0) for name in extra}
    file = read_quietly(written(tmp_path, tensors, metadata))
    assert file.scheduler_config["prediction_type"] == prediction


@pytest.mark.parametrize(("std", "prediction"), [(0.2, "v_prediction"), (0.05, "epsilon")])
def test_without_any_word_sd_2_is_taken_for_what_comfyui_takes_it_for(
    sd2: dict[str, Tensor], tmp_path: Path, std: float, prediction: str
) -> None:
    bias = sd2[V_BIAS]
    path = written(tmp_path, sd2 | {V_BIAS: (bias - bias.mean()) / bias.std() * std})
    with pytest.warns(UserWarning, match=f"{prediction} was assumed"):
        file = read_single_file(path)
    assert file.scheduler_config["prediction_type"] == prediction
    side = 768 if prediction == "v_prediction" else 512
    assert (file.vae_config["sample_size"], file.unet_config["sample_size"]) == (side, side // 8)


def test_what_had_to_be_assumed_is_said(sd1: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="not the shape of SD .* 8 heads, norms in 32 groups"):
        read_single_file(written(tmp_path, sd1))


def test_zero_terminal_snr_is_read_from_its_mark(sd1: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = sd1 | {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    file = read_quietly(written(tmp_path, tensors, {"modelspec.resolution": "256x256"}))
    assert file.scheduler_config["rescale_betas_zero_snr"] is True
    assert file.scheduler_config["timestep_spacing"] == "trailing"
    assert file.unet_config["sample_size"] == 32
    write_single_file(file, tmp_path / "again.safetensors")
    again = read_single_file(tmp_path / "again.safetensors")
    assert again.scheduler_config == file.scheduler_config


def test_running_averages_are_passed_over_or_chosen(sd1: dict[str, Tensor], tmp_path: Path) -> None:
    prefix = "model.diffusion_model."
    averages = {
        "model_ema.diffusion_model" + name.removeprefix(prefix).replace(".", ""): tensor + 1
        for name, tensor in sd1.items()
        if name.startswith(prefix)
    }
    path = written(tmp_path, sd1 | averages | {"model_ema.decay": torch.tensor(0.9999)})
    plain, averaged = read_quietly(path), read_quietly(path, ema=True)
    assert_equal(averaged.unet, {name: tensor + 1 for name, tensor in plain.unet.items()})
    assert_equal(averaged.vae, plain.vae)
    with pytest.raises(ValueError, match="holds no 'model_ema"):
        read_single_file(written(tmp_path, sd1), ema=True)


def betas(start: float, end: float) -> Tensor:
    return torch.linspace(start**0.5, end**0.5, 1000) ** 2


def test_what_training_leaves_behind_is_passed_over(sd1: dict[str, Tensor], tmp_path: Path) -> None:
    left = {
        "betas": betas(0.00085, 0.012).half(),
        "alphas_cumprod": torch.rand(1000),
        "sqrt_one_minus_alphas_cumprod": torch.rand(1000),
        "posterior_mean_coef1": torch.rand(1000),
        "logvar": torch.zeros(1000),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(12)[None],
        "cond_stage_model.logit_scale": torch.tensor(4.6),
        "first_stage_model.loss.discriminator.main.0.weight": torch.rand(2, 2),
        "lora_unet_down_blocks_0.lora_up.weight": torch.rand(2, 2),
    }
    assert_equal(
        read_quietly(written(tmp_path, sd1 | left)).unet, read_quietly(written(tmp_path, sd1)).unet
    )


def test_a_lora_in_a_checkpoint_is_not_left_out_without_a_word(
    sd1: dict[str, Tensor], tmp_path: Path
) -> None:
    """Trainers that keep their LoRA's layers in the model save both; the images need both."""
    name = "model.diffusion_model.input_blocks.1.1.proj_in.lora_up.weight"
    path = written(tmp_path, sd1 | {name: torch.rand(2, 2)})
    with pytest.warns(UserWarning, match=rf"a LoRA in it \(1 tensors, first '{name}'\) was left"):
        read_single_file(path)


@pytest.mark.parametrize("kind", ["safetensors", "pt", "ckpt"])
def test_a_vae_beside_that_a1111_would_take_is_named(
    sd1: dict[str, Tensor], tmp_path: Path, kind: str
) -> None:
    """Without it, images of such a model are pale there, and here, too."""
    path = written(tmp_path, sd1)
    path.with_suffix(f".vae.{kind}").touch()
    with pytest.warns(UserWarning, match=rf"A1111 takes any name\.vae\.{kind} beside it for its"):
        read_single_file(path)


@pytest.mark.parametrize("key", ["modelspec.prediction_type", "modelspec.predict_key"])
def test_a_prediction_that_is_not_known_is_not_taken_for_noise(
    sd1: dict[str, Tensor], tmp_path: Path, key: str
) -> None:
    path = written(tmp_path, sd1, {key: "sample"})
    with pytest.raises(ValueError, match=r"say that it predicts 'sample'; known are .* config="):
        read_single_file(path)
    save_ldm_config(LDM_CONFIG, tmp_path / "it.yaml")
    file = read_quietly(path, config=tmp_path / "it.yaml")
    assert file.scheduler_config["prediction_type"] == "v_prediction"
    path = written(tmp_path, sd1, {key: "V"})
    assert read_quietly(path).scheduler_config["prediction_type"] == "v_prediction"


def test_another_noise_schedule_is_never_taken_for_sds(
    sd1: dict[str, Tensor], tmp_path: Path
) -> None:
    path = written(tmp_path, sd1 | {"betas": betas(0.0001, 0.02)})
    with pytest.raises(ValueError, match=r"its betas are not SD's; give config="):
        read_single_file(path)


def test_the_latent_scale_is_read_where_a_file_holds_it(
    sd1: dict[str, Tensor], tmp_path: Path
) -> None:
    file = read_quietly(written(tmp_path, sd1 | {"scale_factor": torch.tensor(0.25)}))
    assert file.vae_config["scaling_factor"] == 0.25


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["lora_unet_down_blocks_0_attentions_0.lora_down.weight"], "a LoRA"),
        (["unet.down_blocks.0.attentions.0.to_q.lora_A.weight"], "a LoRA"),
        (["conditioner.embedders.0.transformer.x", "model.diffusion_model.label_emb.0"], "SDXL"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "Diffusion 3"),
        (["double_blocks.0.img_attn.norm.key_norm.scale"], "Flux"),
        (["down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"], "a diffusers UNet alone"),
        (["encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"], "a VAE alone"),
        (["text_model.final_layer_norm.weight"], "a text encoder alone"),
        (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
        (["emb_params"], "a textual inversion"),
        (["model.layers.0.mlp.weight"], "it holds 'model.layers.0.mlp.weight'"),
    ],
)
def test_another_kind_of_file_is_refused_with_what_it_seems_to_be(
    tmp_path: Path, names: list[str], what: str
) -> None:
    path = written(tmp_path, {name: torch.zeros(1) for name in names})
    with pytest.raises(ValueError, match=f"no checkpoint of SD 1.x or 2.x.*{re.escape(what)}"):
        read_single_file(path)


def test_half_a_checkpoint_is_refused(sd1: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = {n: t for n, t in sd1.items() if not n.startswith("first_stage_model.")}
    with pytest.raises(ValueError, match="it holds no VAE"):
        read_single_file(written(tmp_path, tensors))


@pytest.mark.parametrize(
    "name",
    ["unheard.of", "model.diffusion_model.input_blocks.1.0.in_layers.7.weight",
     "first_stage_model.encoder.spare", "cond_stage_model.transformer.text_model.spare",
     "cond_stage_model.other"],
)  # fmt: skip
def test_a_tensor_that_nobody_knows_is_refused_by_name(
    sd1: dict[str, Tensor], tmp_path: Path, name: str
) -> None:
    path = written(tmp_path, sd1 | {name: torch.zeros(1)})
    with pytest.raises(ValueError, match=re.escape(name.split(".")[-1])):
        read_single_file(path)


def test_heads_that_cannot_be_told_are_asked_for(tmp_path: Path) -> None:
    config = UNetConfig(
        block_out_channels=(32, 96), cross_attention_dim=64, attention_head_dim=3,
        norm_num_groups=32, down_block_types=SMALL.down_block_types[2:],
        up_block_types=SMALL.up_block_types[:2], use_linear_projection=True,
    )  # fmt: skip
    path = written(tmp_path, checkpoint(config, VAE_CONFIG))
    assert read_quietly(path).unet_config["attention_head_dim"] == [1, 1]
    narrow = VAEConfig(block_out_channels=(8,), norm_num_groups=4)
    path = written(tmp_path, checkpoint(config, narrow))
    with pytest.raises(ValueError, match=r"its VAE is \[8\] wide.*give config="):
        read_single_file(path)


def test_a_diffusers_folder_says_what_weights_do_not(
    sd1: dict[str, Tensor], tmp_path: Path
) -> None:
    """Without a warning, because nothing is assumed."""
    file = read_quietly(written(tmp_path, sd1))
    unet = file.unet_config | {"attention_head_dim": 4, "sample_size": 8}
    save_json(unet, tmp_path / "unet" / "config.json")
    save_json(file.vae_config, tmp_path / "vae" / "config.json")
    save_json(file.text_config, tmp_path / "text_encoder" / "config.json")
    save_json(file.scheduler_config, tmp_path / "scheduler" / "scheduler_config.json")
    again = read_single_file(tmp_path / "any name.safetensors", config=tmp_path)
    assert again.unet_config == unet
    with pytest.raises(ValueError, match="must be an LDM YAML file or a diffusers folder"):
        read_single_file(tmp_path / "any name.safetensors", config=tmp_path / "nowhere")


def packed(content: object) -> str:
    return base64.b64encode(zlib.compress(json.dumps(content).encode())).decode()


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ("not base64!", "cannot be read"),
        (base64.b64encode(b"not zlib").decode(), "cannot be read"),
        (base64.b64encode(zlib.compress(b" " * 100_000_000)).decode(), "cannot be read"),
        (packed([]), "lacks one of"),
        (packed({"unet": {}}), "lacks one of"),
        (
            packed({"unet": {}, "vae": {}, "text_encoder": {}, "scheduler": {},
                    "tokenizer": {"../../evil.json": ""}}),
            "a tokenizer that is none",
        ),
    ],
)  # fmt: skip
def test_an_entry_of_ours_that_is_damaged_is_refused(
    sd1: dict[str, Tensor], tmp_path: Path, entry: str, what: str
) -> None:
    with pytest.raises(ValueError, match=what):
        read_single_file(written(tmp_path, sd1, {OUR_KEY: entry}))
