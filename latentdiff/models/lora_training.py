"""A new LoRA in a network, to be trained: which layers it changes, and the file it becomes.

Hu et al. 2021 (https://arxiv.org/abs/2106.09685): W x + alpha / r · up (down x), with `up` at 0, so
that the network computes at first what it did before. The layers are peft's.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from latentdiff.formats.lora_layers import LoRALayer
from latentdiff.formats.lora_writing import Names

Layers = Literal["attention", "feed_forward", "projections", "convolutions"]
UNET_LAYERS: dict[str, str] = {
    "attention": r".*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
    "feed_forward": r".*\.ff\.net\.(0\.proj|2)",
    "projections": r".*attentions\.\d+\.(proj_in|proj_out)",
    "convolutions": r".*\.(conv1|conv2|conv_shortcut|downsamplers\.0\.conv|upsamplers\.0\.conv)",
}
TEXT_LAYERS = r".*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
ADAPTER = "trained"


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers a LoRA changes, and how."""

    rank: int = 16
    alpha: float | None = None
    """The change has the scale alpha / rank; None is the rank, a scale of 1."""
    dropout: float = 0.0
    """Probability that an input of `down` is 0 in a training step."""
    layers: Sequence[Layers] = ("attention", "feed_forward", "projections")
    """Of the UNet: attention, feed_forward, projections (into and out of the transformers) and
    convolutions. The first three are those of kohya's scripts; diffusers' have attention alone."""
    text_encoder: bool = False
    """Change the text encoder's attention and feed-forward layers too."""
    names: Names = "kohya"
    """In the file: kohya's, for A1111, ComfyUI and diffusers, or diffusers' (peft's)."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank={self.rank} must be at least 1")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise ValueError(f"lora.alpha={self.alpha} must be positive")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout={self.dropout} must be in [0, 1)")
        if self.names not in get_args(Names):
            raise ValueError(
                f"lora.names={self.names!r} must be one of {', '.join(get_args(Names))}"
            )
        for name in self.layers:
            if name not in UNET_LAYERS:
                raise ValueError(f"lora.layers: {name!r} must be one of {', '.join(UNET_LAYERS)}")
        if not self.layers and not self.text_encoder:
            raise ValueError("lora.layers=[] must name layers, unless lora.text_encoder=true")


def add_lora(network: nn.Module, config: LoRAConfig, pattern: str, *, seed: int) -> int:
    """Freeze a network and add a new LoRA to the layers whose whole name matches `pattern`.

    Returns the number of layers. `down` is random by `seed`, `up` is 0, and both are in float32,
    whatever the network's precision. Raises ValueError where no layer matches, or where the rank is
    above a layer's own.
    """
    from peft import LoraConfig, inject_adapter_in_model

    network.requires_grad_(False)
    matched = {
        name: module.weight.flatten(1).shape
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and re.fullmatch(pattern, name)
    }
    if not matched:
        raise ValueError(f"the {type(network).__name__} has no layer for a LoRA: none is {pattern}")
    thinnest = min(matched, key=lambda name: min(matched[name]))
    if config.rank > min(matched[thinnest]):
        raise ValueError(
            f"lora.rank={config.rank} must be at most {min(matched[thinnest])}, the rank of "
            f"{thinnest}"
        )
    alpha = config.rank if config.alpha is None else config.alpha
    torch.manual_seed(seed)
    inject_adapter_in_model(
        LoraConfig(
            r=config.rank,
            lora_alpha=alpha,  # pyright: ignore[reportArgumentType] - it need not be whole
            lora_dropout=config.dropout,
            target_modules=list(matched),
        ),
        network,
        ADAPTER,
    )
    for parameter in network.parameters():  # to which peft has given the network's precision
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return len(matched)


def unet_pattern(config: LoRAConfig) -> str:
    """The pattern of the UNet's layers that a LoRA changes."""
    return "|".join(UNET_LAYERS[name] for name in config.layers)


def trained_lora(network: nn.Module) -> dict[str, LoRALayer]:
    """The LoRA that `add_lora` added, by the names of the layers; it shares the weights."""
    from peft.tuners.lora import LoraLayer

    return {
        name: LoRALayer(
            module.lora_A[ADAPTER].get_parameter("weight").detach(),
            module.lora_B[ADAPTER].get_parameter("weight").detach(),
            float(module.lora_alpha[ADAPTER]),
        )
        for name, module in network.named_modules()
        if isinstance(module, LoraLayer)
    }
