"""LDM's YAML beside a checkpoint, against diffusers' reading of it; and who loads what."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers.loaders.single_file_utils import (
    create_unet_diffusers_config_from_ldm,
    create_vae_diffusers_config_from_ldm,
)
from hypothesis import HealthCheck, given, settings
from support.ldm import checkpoint
from support.strategies import unet_configs, vae_configs

from latentdiff.diffusion import Diffusion
from latentdiff.formats.ldm import compatibility
from latentdiff.formats.ldm.yaml_config import (
    from_ldm_config,
    heads_per_level,
    load_ldm_config,
    save_ldm_config,
    to_ldm_config,
    unsupported_by_ldm,
)
from latentdiff.formats.single_file import read_single_file
from latentdiff.formats.weights import save_safetensors
from latentdiff.models.unet import UNetConfig
from latentdiff.models.vae import VAEConfig

EPSILON = Diffusion(
    "scaled_linear", "epsilon", timestep_spacing="leading", set_alpha_to_one=False
).to_scheduler_config()
V = EPSILON | {"prediction_type": "v_prediction"}
FLOW = Diffusion("flow", "flow_prediction").to_scheduler_config()
SD1, SD_VAE = UNetConfig().to_dict(), VAEConfig().to_dict()
SD2 = UNetConfig(
    cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
).to_dict()
TINY = UNetConfig(
    block_out_channels=(64, 128),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=16,
    attention_head_dim=4,
)
WHOLE = dict.fromkeys(("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"), True)
TINY_VAE = VAEConfig(block_out_channels=(32, 64), layers_per_block=1, scaling_factor=0.5)


@settings(
    derandomize=True, deadline=None, max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(unet_configs(width=32), vae_configs(width=32))
def test_what_ldm_can_say_comes_back(unet: UNetConfig, vae: VAEConfig) -> None:
    mirrored = [
        "CrossAttnUpBlock2D" if "Cross" in b else "UpBlock2D" for b in unet.down_block_types
    ]
    unet = dataclasses.replace(
        unet, norm_num_groups=32, mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=mirrored[::-1], transformer_layers_per_block=1,
    )  # fmt: skip
    vae = dataclasses.replace(vae, norm_num_groups=32, **WHOLE)
    values, vae_values = unet.to_dict(), vae.to_dict()
    unsupported = unsupported_by_ldm(values, vae_values, V)
    assert all("heads" in reason or "widths" in reason for reason in unsupported)
    if unsupported:
        with pytest.raises(AssertionError):
            to_ldm_config(values, vae_values, compatibility.SD1_TOWER, V, open_clip=False)
        return
    ldm_config = to_ldm_config(values, vae_values, compatibility.SD1_TOWER, V, open_clip=False)
    found = from_ldm_config(yaml.safe_load(yaml.safe_dump(ldm_config)))
    for name, expected in (("unet", values), ("vae", vae_values), ("scheduler", V)):
        for key, value in found[name].items():
            there = expected[key]
            if key == "attention_head_dim":  # says something of levels that do not attend, too
                for i, block in enumerate(unet.down_block_types):
                    if "Cross" in block:
                        assert heads_per_level(found["unet"])[i] == unet.heads[i]
                assert heads_per_level(found["unet"])[-1] == unet.heads[-1]
                continue
            if (name, key) == ("vae", "sample_size"):
                assert value == found["unet"]["sample_size"] * vae.factor
                continue
            assert value == (list(there) if isinstance(there, tuple) else there) or there is None


@pytest.mark.parametrize(
    ("unet", "vae"), [(SD1, SD_VAE), (SD2, SD_VAE), (TINY.to_dict(), TINY_VAE.to_dict())]
)
def test_diffusers_reads_our_ldm_config_as_the_configuration_it_is_of(
    unet: dict[str, Any], vae: dict[str, Any]
) -> None:
    tower = compatibility.SD2_TOWER if unet["use_linear_projection"] else compatibility.SD1_TOWER
    ldm_config = to_ldm_config(unet, vae, tower, EPSILON, open_clip=unet["use_linear_projection"])
    theirs = create_unet_diffusers_config_from_ldm(ldm_config, {})
    unseen = {"sample_size", "class_embed_type", "addition_embed_type"}  # of SD's, by themselves
    for key in theirs.keys() - unseen - {"upcast_attention"}:
        expected = unet[key]
        assert theirs[key] == (list(expected) if isinstance(expected, tuple) else expected), key
    theirs = create_vae_diffusers_config_from_ldm(ldm_config, {})
    for key in theirs.keys() - {"sample_size"}:
        expected = vae[key]
        assert theirs[key] == (list(expected) if isinstance(expected, tuple) else expected), key


def test_an_ldm_config_says_what_weights_do_not(tmp_path: Path) -> None:
    """It holds heads, schedule, prediction, scale and size; nothing is left to warn of."""
    path = tmp_path / "model.safetensors"
    save_safetensors(checkpoint(TINY, TINY_VAE), path)
    ldm_config = to_ldm_config(
        TINY.to_dict(), TINY_VAE.to_dict(), compatibility.SD1_TOWER, V, open_clip=False
    )
    save_ldm_config(ldm_config, tmp_path / "any.yaml")
    file = read_single_file(path, config=tmp_path / "any.yaml")
    assert UNetConfig.from_dict(file.unet_config) == TINY
    assert file.vae_config["scaling_factor"] == 0.5
    assert file.scheduler_config == V
    other = ldm_config | {}
    other["model"]["params"]["unet_config"]["params"]["num_res_blocks"] = 2
    save_ldm_config(other, tmp_path / "other.yaml")
    with pytest.raises(ValueError, match="layers_per_block is 2, by its tensors 1"):
        read_single_file(path, config=tmp_path / "other.yaml")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "model: 1", "model: {params: {unet_config: {params: {}}}}", "a: [", "[" * 99_999,
     "- " * 49_999, "a: &a {b: c}\nd: {<<: *a}", "\x00", "#" * 100_001,
     "!!python/object/apply:os.system ['true']"],
)  # fmt: skip
def test_any_other_yaml_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bad\.yaml"):
        load_ldm_config(path)


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    """PyYAML took the last, so that a v-model's line could be undone unseen."""
    path = tmp_path / "bad.yaml"
    save_ldm_config(to_ldm_config(SD2, SD_VAE, compatibility.SD2_TOWER, V, open_clip=True), path)
    text = path.read_text()
    path.write_text(
        text.replace("parameterization: v", "parameterization: v\n    parameterization: eps")
    )
    with pytest.raises(ValueError, match=r"bad\.yaml: .*the key 'parameterization' is there twice"):
        load_ldm_config(path)


@pytest.mark.parametrize("number", [".inf", "two", "[]", "0"])
def test_numbers_that_are_none_are_refused(tmp_path: Path, number: str) -> None:
    path = tmp_path / "bad.yaml"
    save_ldm_config(to_ldm_config(SD2, SD_VAE, compatibility.SD2_TOWER, V, open_clip=True), path)
    text = path.read_text().replace("num_head_channels: 64", f"num_head_channels: {number}")
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bad\.yaml"):
        load_ldm_config(path)


def test_a_value_of_any_other_kind_is_read_or_refused() -> None:
    """An empty context_dim ended in an IndexError."""
    ldm_config = to_ldm_config(SD1, SD_VAE, compatibility.SD1_TOWER, V, open_clip=False)

    def keys(value: Any) -> Iterator[tuple[Any, Any]]:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in list(pairs) if isinstance(value, dict | list) else []:
            yield value, key
            if isinstance(inner, dict | list):
                yield from keys(inner)

    places = list(keys(ldm_config))
    assert len(places) > 50
    for parent, key in places:
        whole = parent[key]
        for other in ["", "x", [], [[]], {}, None, -1, 0, True, math.nan, math.inf, 10**400]:
            parent[key] = other
            with contextlib.suppress(ValueError):
                from_ldm_config(ldm_config)
        parent[key] = whole


def sentences(
    unet: dict[str, Any],
    text: dict[str, Any],
    scheduler: dict[str, Any],
    *,
    vae: dict[str, Any] = SD_VAE,
    merges: str | None = None,
    looks_like_v: bool = False,
) -> str:
    unsupported = unsupported_by_ldm(unet, vae, scheduler)
    return " ".join(
        compatibility.describe_compatibility(
            unet, vae, text, scheduler, merges, looks_like_v=looks_like_v,
            yaml_name=None if unsupported else "model.yaml", unsupported=unsupported,
        )
    )  # fmt: skip


SD1_TEXT, SD2_TEXT = compatibility.SD1_TOWER, compatibility.SD2_TOWER


def test_every_tool_loads_sds_own_shapes() -> None:
    for said in (sentences(SD1, SD1_TEXT, EPSILON), sentences(SD2, SD2_TEXT, EPSILON)):
        assert "ComfyUI loads it." in said
        assert "A1111 loads it" in said
        assert "diffusers loads it" in said
    assert compatibility.is_sd_shape(SD1, SD_VAE, SD1_TEXT)
    assert compatibility.is_sd_shape(SD2 | {"in_channels": 9}, SD_VAE, SD2_TEXT)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"scheduler": FLOW}, "this is a flow"),
        ({"scheduler": EPSILON | {"beta_end": 0.02}}, "beta_end is 0.02, not 0.012"),
        ({"scheduler": V}, "ModelSamplingDiscrete with sampling=v_prediction and zsnr=false"),
        ({"unet": SD1 | {"attention_head_dim": 4}}, r"are \[4, 4, 4, 4\], not \[8, 8, 8, 8\]"),
        ({"unet": SD1 | {"cross_attention_dim": 512}}, "cross_attention_dim is 512, not 768"),
        ({"unet": SD1 | {"block_out_channels": (64, 64, 64, 64)}}, "begins 64 wide, not 320"),
        ({"unet": SD1 | {"in_channels": 8}}, "takes 8 channels, not 4 or 9"),
        ({"vae": SD_VAE | {"scaling_factor": 1.0}}, "the VAE's scaling_factor is 1.0"),
        ({"text": SD1_TEXT | {"num_hidden_layers": 11}}, "encoder's num_hidden_layers is 11"),
        ({"merges": "a b"}, "the tokenizer is not CLIP's"),
    ],
)  # fmt: skip
def test_what_keeps_comfyui_from_a_file_is_said(changes: dict[str, Any], what: str) -> None:
    said = sentences(**({"unet": SD1, "text": SD1_TEXT, "scheduler": EPSILON} | changes))
    comfyui = said.split("ComfyUI", maxsplit=1)[1]
    assert re.search(what, comfyui)


def test_a_v_model_of_sd_2_needs_a_node_only_if_comfyui_guesses_wrong() -> None:
    assert "ComfyUI loads it." in sentences(SD2, SD2_TEXT, V, looks_like_v=True)
    assert "sampling=v_prediction" in sentences(SD2, SD2_TEXT, V, looks_like_v=False)
    assert "sampling=eps" in sentences(SD2, SD2_TEXT, EPSILON, looks_like_v=True)
