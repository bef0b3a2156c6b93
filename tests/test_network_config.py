"""Configurations of UNet and VAE: every wrong value is named before a layer is made of it."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.models.vae import VAE, VAEConfig

CONFIGS = {"unet": UNetConfig, "vae": VAEConfig}
NETWORKS = {"unet": UNet, "vae": VAE}
COUNTS = ["in_channels", "out_channels", "layers_per_block", "norm_num_groups", "sample_size"]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("key", COUNTS)
@pytest.mark.parametrize(
    "value", ["4", 4.0, True, [4], {"a": 4}, -1, 0, 10**9, 10**30, math.nan, "a" * 10**6]
)
def test_a_count_is_a_whole_number_of_a_size_that_models_have(
    name: str, key: str, value: Any
) -> None:
    values = {**CONFIGS[name]().to_dict(), key: value}
    with pytest.raises(ValueError, match=rf"^{key}=.* must be ") as error:
        CONFIGS[name].from_dict(values)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("unet", "use_linear_projection", 1),
        ("unet", "use_linear_projection", "true"),
        ("unet", "upcast_attention", 0),
        ("unet", "norm_eps", "1e-5"),
        ("unet", "norm_eps", 0),
        ("unet", "norm_eps", math.nan),
        ("unet", "norm_eps", math.inf),
        ("unet", "freq_shift", 1e300),
        ("unet", "freq_shift", -1),
        ("unet", "down_block_types", "DownBlock2D"),
        ("unet", "down_block_types", [["DownBlock2D"]]),
        ("unet", "up_block_types", ["UpBlock2D"] * 10**5),
        ("unet", "mid_block_type", ["UNetMidBlock2D"]),
        ("unet", "mid_block_type", "a" * 10**6),
        ("unet", "block_out_channels", 320),
        ("unet", "block_out_channels", []),
        ("unet", "block_out_channels", [320, 640, 1280, 10**9]),
        ("unet", "block_out_channels", [320, 640, 1280, 1280.0]),
        ("unet", "attention_head_dim", [8, 8, 8, True]),
        ("unet", "attention_head_dim", [1] * 10**5),
        ("unet", "attention_head_dim", None),
        ("unet", "cross_attention_dim", 10**9),
        ("unet", "transformer_layers_per_block", 10**6),
        ("vae", "block_out_channels", "128"),
        ("vae", "block_out_channels", [128] * 10**5),
        ("vae", "scaling_factor", 0),
        ("vae", "scaling_factor", -1.0),
        ("vae", "scaling_factor", math.nan),
        ("vae", "use_quant_conv", "yes"),
        ("vae", "force_upcast", None),
        ("vae", "latent_channels", 10**9),
    ],
)
def test_a_value_of_a_wrong_type_or_size_is_named(name: str, key: str, value: Any) -> None:
    values = {**CONFIGS[name]().to_dict(), key: value}
    with pytest.raises(ValueError, match=key) as error:
        CONFIGS[name].from_dict(values)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("name", CONFIGS)
def test_the_file_is_named_with_what_is_wrong_in_it(tmp_path: Path, name: str) -> None:
    values = {**CONFIGS[name]().to_dict(), "layers_per_block": 10**6}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"config\.json: layers_per_block=1000000 must be from 1"):
        NETWORKS[name].from_pretrained(tmp_path)


def test_many_layers_of_many_transformers_are_too_many_together() -> None:
    with pytest.raises(ValueError, match="layers_per_block=12 makes 480 transformer layers"):
        UNetConfig(layers_per_block=12, transformer_layers_per_block=10)


@pytest.mark.full_size
def test_the_largest_network_that_is_allowed_is_made_in_seconds() -> None:
    """On the meta device, before its weights are looked for."""
    levels = 8
    config = UNetConfig(
        block_out_channels=(2**16,) * levels,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        layers_per_block=10,
        transformer_layers_per_block=3,
        cross_attention_dim=2**16,
    )
    start = time.process_time()
    with torch.device("meta"):
        UNet(config)
    assert time.process_time() - start < 10


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_numbers_stand_for_floats_and_lists_for_tuples_as_json_has_them(name: str) -> None:
    config = CONFIGS[name]()
    again = CONFIGS[name].from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert UNetConfig(freq_shift=1, norm_eps=1).freq_shift == 1
