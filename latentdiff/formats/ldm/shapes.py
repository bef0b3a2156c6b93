"""What the names and shapes of a checkpoint say: whether it is SD 1.x or 2.x, and its networks.

Names are those of diffusers and transformers, except in `refuse_others`, which reads the file's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentdiff.formats.header import shown
from latentdiff.formats.ldm.keys import CLIP, OPEN_CLIP, TEXT_MODEL, UNET, VAE, count, has

Shapes = Mapping[str, tuple[int, ...]]

GROUPS = 32  # of every GroupNorm, in LDM a constant
HEAD_WIDTH = 64  # of every head of SD 2.x's UNet and of both versions' text towers

# What else people keep in safetensors files, by what a name begins with or, after a star, holds.
_OTHERS = (
    ("*lora_", "a LoRA, which is loaded on top of a model"),
    ("*.hada_w", "a LyCORIS adapter"),
    ("*joint_blocks.", "Stable Diffusion 3"),
    ("*double_blocks.", "Flux"),
    ("conditioner.embedders.", "SDXL or another model of its kind"),
    ("*time_stack.", "a video model"),
    ("embedder.", "an unCLIP model"),
    (UNET + "label_emb.", "SDXL, an upscaler or an unCLIP model"),
    ("depth_model.", "a depth-to-image model"),
    ("control_model.", "a ControlNet"),
    ("controlnet_", "a ControlNet in diffusers' form"),
    ("cc_projection.", "Zero-1-to-3"),
    ("emb_params", "a textual inversion"),
    ("down_blocks.", "a diffusers UNet alone; give its pipeline's folder instead"),
    ("encoder.down_blocks.", "a diffusers VAE alone; give its pipeline's folder instead"),
    ("encoder.down.", "a VAE alone"),
    (TEXT_MODEL, "a text encoder alone"),
)


def refuse_others(path: Path, shapes: Shapes) -> None:
    """Raise ValueError, saying what the file seems to be, unless it is a whole SD 1.x or 2.x.

    `shapes` by the file's own names. LoRA tensors beside a whole model are left for the caller.
    """
    parts = {
        "UNet": has(shapes, UNET + "input_blocks."),
        "VAE": has(shapes, VAE),
        "text encoder": has(shapes, CLIP) or has(shapes, OPEN_CLIP),
    }
    whole = all(parts.values())
    for mark, what in _OTHERS:
        begins, holds = mark.removeprefix("*"), mark.startswith("*")
        if any(begins in name if holds else name.startswith(begins) for name in shapes) and not (
            whole and begins == "lora_"
        ):
            raise ValueError(f"{path} is no checkpoint of SD 1.x or 2.x but seems to be {what}")
    missing = [part for part, there in parts.items() if not there]
    if len(missing) == len(parts):
        first = shown(min(shapes)) if shapes else "nothing"
        raise ValueError(f"{path} is no checkpoint of SD 1.x or 2.x; it holds {first}")
    if missing:
        raise ValueError(
            f"{path} is no whole checkpoint of SD; it holds no {', no '.join(missing)}"
        )


def unet_config(shapes: Shapes) -> dict[str, Any]:
    """What shows of a UNet2DConditionModel's configuration: all but heads, norms and size."""
    levels = count(shapes, "down_blocks.")
    attends = {
        way: [has(shapes, f"{way}_blocks.{i}.attentions.") for i in range(levels)]
        for way in ("down", "up")
    }
    middle = has(shapes, "mid_block.attentions.")
    projection = next((name for name in shapes if name.endswith(".proj_in.weight")), None)
    config = {
        "in_channels": _shape(shapes, "conv_in.weight", 4)[1],
        "out_channels": _shape(shapes, "conv_out.weight", 4)[0],
        "block_out_channels": _widths(shapes, "down_blocks.", levels),
        "layers_per_block": count(shapes, "down_blocks.0.resnets."),
        "down_block_types": [
            "CrossAttnDownBlock2D" if there else "DownBlock2D" for there in attends["down"]
        ],
        "mid_block_type": (
            "UNetMidBlock2DCrossAttn"
            if middle
            else "UNetMidBlock2D"
            if has(shapes, "mid_block.")
            else None
        ),
        "up_block_types": [
            "CrossAttnUpBlock2D" if there else "UpBlock2D" for there in attends["up"]
        ],
        "use_linear_projection": projection is not None and len(shapes[projection]) == 2,
    }
    if projection is not None:
        blocks = projection.removesuffix("proj_in.weight") + "transformer_blocks."
        config["transformer_layers_per_block"] = count(shapes, blocks)
        config["cross_attention_dim"] = _shape(shapes, f"{blocks}0.attn2.to_k.weight", 2)[1]
    return config


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """What shows of an AutoencoderKL's configuration: all but norms, size and scale."""
    levels = count(shapes, "encoder.down_blocks.")
    return {
        "in_channels": _shape(shapes, "encoder.conv_in.weight", 4)[1],
        "out_channels": _shape(shapes, "decoder.conv_out.weight", 4)[0],
        "block_out_channels": _widths(shapes, "encoder.down_blocks.", levels),
        "layers_per_block": count(shapes, "encoder.down_blocks.0.resnets."),
        "latent_channels": _shape(shapes, "decoder.conv_in.weight", 4)[1],
        "mid_block_add_attention": has(shapes, "encoder.mid_block.attentions."),
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def text_config(shapes: Shapes) -> dict[str, Any]:
    """What shows of a CLIPTextConfig: all but heads, activation and special tokens."""
    layers = TEXT_MODEL + "encoder.layers."
    words, width = _shape(shapes, TEXT_MODEL + "embeddings.token_embedding.weight", 2)
    return {
        "vocab_size": words,
        "hidden_size": width,
        "max_position_embeddings": _shape(
            shapes, TEXT_MODEL + "embeddings.position_embedding.weight", 2
        )[0],
        "num_hidden_layers": count(shapes, layers),
        "intermediate_size": _shape(shapes, f"{layers}0.mlp.fc1.weight", 2)[0],
    }


def _widths(shapes: Shapes, blocks: str, levels: int) -> list[int]:
    return [_shape(shapes, f"{blocks}{i}.resnets.0.conv1.weight", 4)[0] for i in range(levels)]


def _shape(shapes: Shapes, name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor that every such network has; ValueError if this one has not."""
    shape = shapes.get(name)
    if shape is None:
        raise ValueError(f"tensor {name} is missing")
    if len(shape) != dimensions:
        raise ValueError(f"tensor {name} has the shape {shape}, expected {dimensions} dimensions")
    return shape
