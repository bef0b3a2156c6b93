"""The settings of small trainings, as the scripts write them into config.yaml."""

from typing import Any

import pytest
import torch

from latentdiff.models.precision import computes_bf16
from latentdiff.planning.devices import Device

ANY = Device({"no": 1e12, "bf16": 2e12})
"""A device that no test depends on."""

WITH_BF16 = pytest.mark.skipif(
    not computes_bf16(torch.device("cpu")), reason="the processor does not compute in bfloat16"
)
HALF = "bf16" if computes_bf16(torch.device("cpu")) else "no"
"""Half precision where the processor computes in it; others take up to a hundred times as long."""


def unet(
    width: int, batch: int, size: int, precision: str = "no", *, stages: int = 2
) -> dict[str, Any]:
    network = {
        "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * (stages - 1),
        "up_block_types": ["CrossAttnUpBlock2D"] * (stages - 1) + ["UpBlock2D"],
        "block_out_channels": [width * 2**i for i in range(stages)],
        "layers_per_block": 1,
        "attention_head_dim": [2**i for i in range(stages)],
        "use_linear_projection": True,
    }
    shared = {"batch_size": batch, "image_size": size, "mixed_precision": precision}
    return {"unet": network, **shared}


def dit(batch: int, attention: str = "cross") -> dict[str, Any]:
    """The UNet's keys beside it, as the script writes them."""
    network = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
    shared = {"batch_size": batch, "image_size": 32, "mixed_precision": "no"}
    return {**unet(32, batch, 32), "dit": {**network, "attention": attention}, **shared}


def vae(
    width: int, batch: int, size: int, precision: str = "no", *, stages: int = 2
) -> dict[str, Any]:
    network = {
        "block_out_channels": [width * 2**i for i in range(stages)],
        "layers_per_block": 1,
        "norm_num_groups": 16,
        "mid_block_add_attention": False,
    }
    shared = {"batch_size": batch, "image_size": size, "mixed_precision": precision}
    return {"vae": network, **shared}


def clip(batch: int) -> dict[str, Any]:
    towers = {"text_width": 32, "text_layers": 2, "text_heads": 2, "image_width": 48}
    towers |= {"image_layers": 2, "image_heads": 2, "patch_size": 8, "projection_dim": 16}
    shared = {"batch_size": batch, "image_size": 32, "vocab_size": 600, "max_tokens": 12}
    return {"clip": towers, "mixed_precision": "no", **shared}
