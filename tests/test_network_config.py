"""Configurations of UNet and VAE: every wrong value is named before a layer is made of it."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.training_utils import EMAModel

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


EMA = {
    "decay": 0.9999,
    "inv_gamma": 1.0,
    "min_decay": 0.0,
    "optimization_step": 500,
    "power": 0.6666666666666666,
    "update_after_step": 0,
    "use_ema_warmup": False,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_config_of_an_averaged_network_is_read(name: str) -> None:
    """`unet_ema/` in every checkpoint of diffusers' trainer was refused for "decay"."""
    config = CONFIGS[name]()
    assert CONFIGS[name].from_dict(config.to_dict() | EMA) == config
    network = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[name]
    small = {"norm_num_groups": 4, "block_out_channels": (8,) * (4 if name == "unet" else 1)}
    theirs = network(**small, **({"attention_head_dim": 2} if name == "unet" else {}))
    theirs.register_to_config(**EMAModel(theirs.parameters(), decay=0.99).state_dict())
    values = {key: value for key, value in theirs.config.items() if key != "shadow_params"}
    assert EMA.keys() <= values.keys()
    CONFIGS[name].from_dict(json.loads(json.dumps(values)))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("unet", {"of_the_future": None, "its_switch": False}),
        ("vae", {"of_the_future": None, "its_switch": False}),
        ("unet", {"sample_size": [64, 64]}),
        ("vae", {"sample_size": [512, 512]}),
        ("unet", {"layers_per_block": [2, 2, 2, 2]}),
        ("unet", {"cross_attention_dim": [768] * 4}),
        ("unet", {"transformer_layers_per_block": [1] * 4}),
        ("unet", {"reverse_transformer_layers_per_block": [1] * 4}),
        ("unet", {"only_cross_attention": [False] * 4}),
        ("unet", {"num_attention_heads": 8}),
        ("unet", {"num_attention_heads": [8] * 4}),
        ("unet", {"time_embedding_dim": 1280}),
        ("unet", {"mid_block_only_cross_attention": False, "cross_attention_norm": False}),
        ("unet", {"dual_cross_attention": None, "resnet_skip_time_act": None}),
        ("unet", {"act_fn": "swish"}),
        ("vae", {"act_fn": "swish"}),
        ("vae", {"shift_factor": 0.0}),
        ("vae", {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}),
    ],
)
def test_what_changes_nothing_is_read(name: str, values: dict[str, Any]) -> None:
    config = CONFIGS[name]()
    assert CONFIGS[name].from_dict(config.to_dict() | values) == config


def test_heads_that_differ_by_level_may_be_said_again() -> None:
    config = UNetConfig(attention_head_dim=(5, 10, 20, 20))
    values = config.to_dict() | {"num_attention_heads": [5, 10, 20, 20]}
    assert UNetConfig.from_dict(values) == config


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("unet", "of_the_future", True),
        ("unet", "of_the_future", 0.5),
        ("unet", "sample_size", [64, 48]),
        ("unet", "sample_size", [64]),
        ("unet", "layers_per_block", [2, 2]),
        ("unet", "layers_per_block", [True] * 4),
        ("unet", "cross_attention_dim", [[768]] * 4),
        ("unet", "only_cross_attention", [False, False, False, True]),
        ("unet", "num_attention_heads", 4),
        ("unet", "num_attention_heads", [8, 8, 8, 16]),
        ("unet", "time_embedding_dim", 640),
        ("vae", "shift_factor", 0.1159),
        ("vae", "latents_mean", [0.0, 0.1, 0.0, 0.0]),
        ("vae", "latents_std", [1.0, 1.0, 1.0, 0.5]),
        ("vae", "latents_std", []),
        ("vae", "_class_name", ["AutoencoderKL"]),
    ],
)
def test_what_would_change_something_is_refused_by_name(name: str, key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{key}="):
        CONFIGS[name].from_dict(CONFIGS[name]().to_dict() | {key: value})


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
