"""Infer configs from a checkpoint's names and shapes, and refuse what is not SD 1.x or 2.x.

Names are diffusers' and transformers', except those that `refuse_other_checkpoints` reads.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentdiff.formats.header import short_repr
from latentdiff.formats.ldm.keys import CLIP, OPEN_CLIP, TEXT_MODEL, UNET, VAE, count, has

Shapes = Mapping[str, tuple[int, ...]]

GROUPS = 32  # of every GroupNorm, in LDM a constant
HEAD_WIDTH = 64  # of every head of SD 2.x's UNet and of both versions' text towers

# Other models in safetensors files, by the start of a tensor's name or, after a star, a part of it.
_OTHER_MODELS = (
    ("*lora_", "a LoRA, which is loaded on top of a model"),
    ("*.hada_w", "a LoHa, which is loaded on top of a model as a LoRA is"),
    ("*.lokr_w", "a LoKr, which is loaded on top of a model as a LoRA is"),
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
    ("decoder.up_blocks.", "a diffusers VAE alone; give its pipeline's folder instead"),
    ("encoder.down.", "a VAE alone"),
    ("decoder.up.", "a VAE alone"),
    ("input_blocks.", "a UNet alone"),
    (TEXT_MODEL, "a text encoder alone"),
    ("transformer.resblocks.", "a text encoder of open_clip alone"),
)


def refuse_other_checkpoints(path: Path, shapes: Shapes) -> None:
    """Raise ValueError, saying what the file seems to be, unless it is a complete SD 1.x or 2.x.

    `shapes` has the names in the file. LoRA tensors beside a complete model are allowed, and a VAE
    may lack its encoder, which drawing does not need.
    """
    components = {
        "UNet": has(shapes, UNET + "input_blocks."),
        "decoder of its VAE" if has(shapes, VAE) else "VAE": has(shapes, VAE + "decoder."),
        "text encoder": has(shapes, CLIP) or has(shapes, OPEN_CLIP),
    }
    complete = all(components.values())
    for mark, model in _OTHER_MODELS:
        text, anywhere = mark.removeprefix("*"), mark.startswith("*")
        matches = any(text in name if anywhere else name.startswith(text) for name in shapes)
        if matches and not (complete and text == "lora_"):
            raise ValueError(f"{path} is no checkpoint of SD 1.x or 2.x but seems to be {model}")
    missing = [name for name, present in components.items() if not present]
    if len(missing) == len(components):
        first = short_repr(min(shapes)) if shapes else "nothing"
        raise ValueError(f"{path} is no checkpoint of SD 1.x or 2.x; it holds {first}")
    if missing:
        raise ValueError(
            f"{path} is no whole checkpoint of SD; it holds no {', no '.join(missing)}"
        )


def infer_unet_config(shapes: Shapes) -> dict[str, Any]:
    """The keys of a UNet2DConditionModel's config that shapes show: all but heads, norms, size."""
    levels = count(shapes, "down_blocks.")
    attends = {
        way: [has(shapes, f"{way}_blocks.{i}.attentions.") for i in range(levels)]
        for way in ("down", "up")
    }
    projection = next((name for name in shapes if name.endswith(".proj_in.weight")), None)
    config = {
        "in_channels": _shape(shapes, "conv_in.weight", 4)[1],
        "out_channels": _shape(shapes, "conv_out.weight", 4)[0],
        "block_out_channels": _widths(shapes, "down_blocks.", levels),
        "layers_per_block": count(shapes, "down_blocks.0.resnets."),
        "down_block_types": [
            "CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in attends["down"]
        ],
        "mid_block_type": _mid_block_type(shapes),
        "up_block_types": [
            "CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in attends["up"]
        ],
        "use_linear_projection": projection is not None and len(shapes[projection]) == 2,
    }
    if projection is not None:
        blocks = projection.removesuffix("proj_in.weight") + "transformer_blocks."
        config["transformer_layers_per_block"] = count(shapes, blocks)
        config["cross_attention_dim"] = _shape(shapes, f"{blocks}0.attn2.to_k.weight", 2)[1]
    return config


def infer_vae_config(shapes: Shapes) -> dict[str, Any]:
    """The keys of a VAE's config that shapes show: all but norms, size and scale.

    One without an encoder is no AutoencoderKL, but ours.
    """
    levels = count(shapes, "decoder.up_blocks.")
    channels = _shape(shapes, "decoder.conv_out.weight", 4)[0]
    config = {
        "_class_name": "AutoencoderKL",
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": _widths(shapes, "decoder.up_blocks.", levels)[::-1],
        "layers_per_block": count(shapes, "decoder.up_blocks.0.resnets.") - 1,
        "latent_channels": _shape(shapes, "decoder.conv_in.weight", 4)[1],
        "mid_block_add_attention": has(shapes, "decoder.mid_block.attentions."),
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }
    if not has(shapes, "encoder."):
        return config | {"_class_name": "VAE", "encoder": "none"}
    return config | {"in_channels": _shape(shapes, "encoder.conv_in.weight", 4)[1]}


def infer_text_config(shapes: Shapes) -> dict[str, Any]:
    """The keys of a CLIPTextConfig that shapes show: all but heads, activation, special tokens."""
    layers = TEXT_MODEL + "encoder.layers."
    vocab_size, width = _shape(shapes, TEXT_MODEL + "embeddings.token_embedding.weight", 2)
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "max_position_embeddings": _shape(
            shapes, TEXT_MODEL + "embeddings.position_embedding.weight", 2
        )[0],
        "num_hidden_layers": count(shapes, layers),
        "intermediate_size": _shape(shapes, f"{layers}0.mlp.fc1.weight", 2)[0],
    }


def _mid_block_type(shapes: Shapes) -> str | None:
    if has(shapes, "mid_block.attentions."):
        return "UNetMidBlock2DCrossAttn"
    return "UNetMidBlock2D" if has(shapes, "mid_block.") else None


def _widths(shapes: Shapes, blocks: str, levels: int) -> list[int]:
    return [_shape(shapes, f"{blocks}{i}.resnets.0.conv1.weight", 4)[0] for i in range(levels)]


def _shape(shapes: Shapes, name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor; ValueError where it is missing or has another number of dimensions."""
    shape = shapes.get(name)
    if shape is None:
        raise ValueError(f"tensor {name} is missing")
    if len(shape) != dimensions:
        raise ValueError(f"tensor {name} has the shape {shape}, expected {dimensions} dimensions")
    return shape
