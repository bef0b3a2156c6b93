"""Which other tools load a single file, by the rules with which they guess what is in it.

Read from diffusers 0.42.1 (loaders/single_file_utils.py), ComfyUI a125cd8 (model_detection.py,
supported_models.py, sd.py) and A1111's webui 0120be7 (modules/sd_models_config.py).
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from latentdiff.formats.ldm.description import heads
from latentdiff.formats.ldm.shapes import GROUPS

# The towers that tools build for SD 1.x and 2.x, whatever the file holds; of SD 2.x all layers but
# the last of OpenCLIP's ViT-H-14.
_TOWER = {"vocab_size": 49408, "max_position_embeddings": 77}
SD1_TOWER = _TOWER | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
}
SD2_TOWER = _TOWER | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
SD_BETAS = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}
_SD_WIDTHS = [320, 640, 1280, 1280]
_SD_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": GROUPS,
    "scaling_factor": 0.18215,
    "mid_block_add_attention": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}
_SHOWN = 3  # reasons in a sentence
# Of the 48,894 lines of CLIP's merges.txt, without its first, joined by line breaks.
_CLIP_MERGES = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"


def differences(
    config: Mapping[str, Any], expected: Mapping[str, Any], *, of: str = ""
) -> list[str]:
    """Where a configuration differs, in words; keys that it lacks count as equal."""
    found = []
    for key, value in expected.items():
        there = config.get(key, value)
        there = list(there) if isinstance(there, tuple) else there
        if there != value:
            found.append(f"{of}{key} is {there}, not {value}")
    return found


def is_sd_shape(unet: Mapping[str, Any], vae: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    """Whether a model has the shapes of SD 1.x or 2.x, whatever goes into its UNet."""
    linear = unet["use_linear_projection"]
    levels = [True, True, True, False]
    return (
        list(unet["block_out_channels"]) == _SD_WIDTHS
        and unet["layers_per_block"] == 2
        and unet.get("transformer_layers_per_block", 1) == 1
        and [block.startswith("Cross") for block in unet["down_block_types"]] == levels
        and [block.startswith("Cross") for block in unet["up_block_types"]] == levels[::-1]
        and not _comfyui_unet(unet)
        and not differences(vae, _SD_VAE)
        and not differences(text, SD2_TOWER if linear else SD1_TOWER)
    )


def sentences(
    unet: Mapping[str, Any],
    vae: Mapping[str, Any],
    text: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    merges: str | None,
    *,
    looks_like_v: bool,
    description: str | None,
    obstacles: Sequence[str],
) -> list[str]:
    """One sentence a tool: whether it loads such a file, and how, or what keeps it from that.

    The configurations are in diffusers' words. merges: the tokenizer's merges.txt, if it is known.
    looks_like_v: what ComfyUI will take a model of SD 2.x's shape for. description: name of the
    YAML file that was written. obstacles: why none could be.
    """
    tower = _tower(unet, text, merges)
    found = [
        "latentdiff loads it exactly: what weights do not say is in its metadata.",
        "diffusers loads it with StableDiffusionPipeline.from_single_file(file, config=folder), "
        "where folder is the same model saved as a diffusers folder.",
        _comfyui(unet, vae, scheduler, tower, looks_like_v=looks_like_v),
    ]
    if obstacles:
        found.append(f"A1111 cannot load it, LDM having no words for it: {_and(obstacles)}.")
    elif tower:
        found.append(
            f"A1111 cannot load it, having only SD's own text encoders: {_and(tower)}; its "
            f"UNet, VAE and schedule are described in {description}."
        )
    elif description is None:
        found.append("A1111 loads it.")
    else:
        found.append(f"A1111 loads it with {description}, which must stay beside it.")
    return found


def _comfyui(
    unet: Mapping[str, Any],
    vae: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    tower: Sequence[str],
    *,
    looks_like_v: bool,
) -> str:
    """What detect_unet_config, the classes SD15 and SD20, and VAE of ComfyUI make of a file."""
    wrong = [*_comfyui_unet(unet), *tower, *differences(vae, _SD_VAE, of="the VAE's ")]
    if scheduler.get("use_flow_sigmas"):
        wrong.append("it takes every file of this form for a beta schedule, and this is a flow")
    else:
        wrong += differences(scheduler, SD_BETAS)
        prediction = scheduler["prediction_type"]
        if prediction not in ("epsilon", "v_prediction"):
            wrong.append(f"prediction_type is {prediction}")
    if wrong:
        return f"ComfyUI cannot load it: {_and(wrong)}."
    # Read only in files of SDXL: the tensors v_pred and ztsnr (supported_models.py).
    guess = "v_prediction" if looks_like_v else "epsilon"
    zero = bool(scheduler.get("rescale_betas_zero_snr"))
    if guess == scheduler["prediction_type"] and not zero:
        return "ComfyUI loads it."
    sampling = "v_prediction" if scheduler["prediction_type"] == "v_prediction" else "eps"
    return (
        "ComfyUI loads it, but needs its node ModelSamplingDiscrete with "
        f"sampling={sampling} and zsnr={str(zero).lower()}."
    )


def _comfyui_unet(unet: Mapping[str, Any]) -> list[str]:
    """What keeps a UNet from being taken for one of SD 1.x or 2.x, or from working as one."""
    widths, linear = list(unet["block_out_channels"]), unet["use_linear_projection"]
    found = []
    if widths[0] != _SD_WIDTHS[0]:
        found.append(f"the UNet begins {widths[0]} wide, not {_SD_WIDTHS[0]}")
    if unet["in_channels"] not in (4, 9):
        found.append(f"the UNet takes {unet['in_channels']} channels, not 4 or 9")
    if unet["out_channels"] != 4:
        found.append(f"the UNet makes {unet['out_channels']} channels, not 4")
    if any(width % widths[0] for width in widths):
        found.append(f"the UNet's widths {widths} are no whole multiples of the first")
    context = 1024 if linear else 768
    if unet["cross_attention_dim"] != context:
        word = "linear layers" if linear else "convolutions"
        found.append(
            f"cross_attention_dim is {unet['cross_attention_dim']}, not {context} as with {word}"
        )
    expected = [width // 64 for width in widths] if linear else [8] * len(widths)
    last = len(widths) - 1  # the middle attends with its heads
    attends = [
        block.startswith("Cross") or i == last for i, block in enumerate(unet["down_block_types"])
    ]
    if any(a and n != m for a, n, m in zip(attends, heads(unet), expected, strict=True)):
        found.append(f"the UNet's numbers of heads are {heads(unet)}, not {expected}")
    return found + differences(
        unet, {"norm_num_groups": GROUPS, "flip_sin_to_cos": True, "freq_shift": 0}
    )


def _tower(unet: Mapping[str, Any], text: Mapping[str, Any], merges: str | None) -> list[str]:
    """What keeps tools from using their own text towers and tokenizer."""
    expected = SD2_TOWER if unet["use_linear_projection"] else SD1_TOWER
    found = differences(text, expected, of="the text encoder's ")
    if merges is not None and not found and not is_clip_tokenizer(merges):
        found.append("the tokenizer is not CLIP's")
    return found


def is_clip_tokenizer(merges: str) -> bool:
    """Whether merges.txt is that of CLIP's tokenizer, which every tool brings along."""
    lines = [line for line in merges.splitlines() if line and not line.startswith("#version")]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() == _CLIP_MERGES


def _and(reasons: Sequence[str]) -> str:
    """The first reasons in a row: to know the rest changes nothing."""
    more = len(reasons) - _SHOWN
    shown = "; ".join(reasons[:_SHOWN])
    return f"{shown}; and {more} more" if more > 0 else shown
