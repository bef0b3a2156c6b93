"""Which other tools load a single file, by the rules with which they infer its model.

Read from diffusers 0.42.1 (loaders/single_file_utils.py), ComfyUI a125cd8 (model_detection.py,
supported_models.py, sd.py) and A1111's webui 0120be7 (modules/sd_models_config.py).
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from latentdiff.formats.ldm.shapes import GROUPS
from latentdiff.formats.ldm.yaml_config import heads_per_level
from latentdiff.formats.scheduler import DISTILLED_STEPS

# The text towers that tools build for SD 1.x and 2.x, whatever the file holds. That of SD 2.x has
# all layers of OpenCLIP's ViT-H-14 but the last.
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
_MAX_REASONS = 3  # in a sentence
# Of the 48,894 lines of CLIP's merges.txt, without the first, joined by line breaks.
_CLIP_MERGES_SHA256 = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"


def differences(
    config: Mapping[str, Any], expected: Mapping[str, Any], *, of: str = ""
) -> list[str]:
    """A phrase on each key whose value is not the expected one; a missing key counts as equal."""
    phrases = []
    for key, value in expected.items():
        actual = config.get(key, value)
        actual = list(actual) if isinstance(actual, tuple) else actual
        if actual != value:
            phrases.append(f"{of}{key} is {actual}, not {value}")
    return phrases


def is_sd_shape(unet: Mapping[str, Any], vae: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    """Whether a model has the shapes of SD 1.x or 2.x, with any number of UNet input channels."""
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


def describe_compatibility(
    unet: Mapping[str, Any],
    vae: Mapping[str, Any],
    text: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    merges: str | None,
    *,
    looks_like_v: bool,
    yaml_name: str | None,
    unsupported: Sequence[str],
) -> list[str]:
    """One sentence a tool: whether it loads such a file, and how, or what keeps it from that.

    The configs have diffusers' keys. merges: the tokenizer's merges.txt, if it is known.
    looks_like_v: what ComfyUI infers of a model of SD 2.x's shape. yaml_name: name of the LDM
    config that was written beside the file. unsupported: why none could be.
    """
    tower = _tower_differences(unet, text, merges)
    sentences = [
        "latentdiff loads it exactly: what weights do not say is in its metadata.",
        "diffusers loads it with StableDiffusionPipeline.from_single_file(file, config=folder), "
        "where folder is the same model saved as a diffusers folder.",
        _comfyui(unet, vae, scheduler, tower, looks_like_v=looks_like_v),
    ]
    if unsupported:
        sentences.append(
            f"A1111 cannot load it, LDM having no words for it: {_first_reasons(unsupported)}."
        )
    elif tower:
        sentences.append(
            f"A1111 cannot load it, having only SD's own text encoders: {_first_reasons(tower)}; "
            f"its UNet, VAE and schedule are described in {yaml_name}."
        )
    elif yaml_name is None:
        sentences.append("A1111 loads it.")
    else:
        sentences.append(f"A1111 loads it with {yaml_name}, which must stay beside it.")
    if (steps := scheduler.get(DISTILLED_STEPS)) is not None:
        sentences.append(
            f"It is a student: other tools have to be told the sampler Euler, the schedule SGM "
            f"Uniform, {steps} steps and a CFG scale of 1."
        )
    return sentences


def _comfyui(
    unet: Mapping[str, Any],
    vae: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    tower: Sequence[str],
    *,
    looks_like_v: bool,
) -> str:
    """The sentence on ComfyUI, by its detect_unet_config and its classes SD15, SD20 and VAE."""
    reasons = [*_comfyui_unet(unet), *tower, *differences(vae, _SD_VAE, of="the VAE's ")]
    if scheduler.get("use_flow_sigmas"):
        reasons.append("it takes every file of this form for a beta schedule, and this is a flow")
    else:
        reasons += differences(scheduler, SD_BETAS)
        prediction = scheduler["prediction_type"]
        if prediction not in ("epsilon", "v_prediction"):
            reasons.append(f"prediction_type is {prediction}")
    if reasons:
        return f"ComfyUI cannot load it: {_first_reasons(reasons)}."
    # ComfyUI reads the tensors v_pred and ztsnr in files of SDXL only (supported_models.py).
    inferred = "v_prediction" if looks_like_v else "epsilon"
    zero = bool(scheduler.get("rescale_betas_zero_snr"))
    if inferred == scheduler["prediction_type"] and not zero:
        return "ComfyUI loads it."
    sampling = "v_prediction" if scheduler["prediction_type"] == "v_prediction" else "eps"
    return (
        "ComfyUI loads it, but needs its node ModelSamplingDiscrete with "
        f"sampling={sampling} and zsnr={str(zero).lower()}."
    )


def _comfyui_unet(unet: Mapping[str, Any]) -> list[str]:
    """What keeps a UNet from being taken for one of SD 1.x or 2.x, or from working as one."""
    widths, linear = list(unet["block_out_channels"]), unet["use_linear_projection"]
    reasons = []
    if widths[0] != _SD_WIDTHS[0]:
        reasons.append(f"the UNet begins {widths[0]} wide, not {_SD_WIDTHS[0]}")
    if unet["in_channels"] not in (4, 9):
        reasons.append(f"the UNet takes {unet['in_channels']} channels, not 4 or 9")
    if unet["out_channels"] != 4:
        reasons.append(f"the UNet makes {unet['out_channels']} channels, not 4")
    if any(width % widths[0] for width in widths):
        reasons.append(f"the UNet's widths {widths} are no whole multiples of the first")
    context = 1024 if linear else 768
    if unet["cross_attention_dim"] != context:
        projection = "linear layers" if linear else "convolutions"
        reasons.append(
            f"cross_attention_dim is {unet['cross_attention_dim']}, not {context} as with "
            f"{projection}"
        )
    expected = [width // 64 for width in widths] if linear else [8] * len(widths)
    last = len(widths) - 1  # the middle attends with its heads
    attends = [
        block.startswith("Cross") or i == last for i, block in enumerate(unet["down_block_types"])
    ]
    if any(a and n != m for a, n, m in zip(attends, heads_per_level(unet), expected, strict=True)):
        reasons.append(f"the UNet's numbers of heads are {heads_per_level(unet)}, not {expected}")
    return reasons + differences(
        unet, {"norm_num_groups": GROUPS, "flip_sin_to_cos": True, "freq_shift": 0}
    )


def _tower_differences(
    unet: Mapping[str, Any], text: Mapping[str, Any], merges: str | None
) -> list[str]:
    """What keeps tools from using the text towers and the tokenizer that they bring along."""
    expected = SD2_TOWER if unet["use_linear_projection"] else SD1_TOWER
    reasons = differences(text, expected, of="the text encoder's ")
    if merges is not None and not reasons and not is_clip_tokenizer(merges):
        reasons.append("the tokenizer is not CLIP's")
    return reasons


def is_clip_tokenizer(merges: str) -> bool:
    """Whether merges.txt is that of CLIP's tokenizer, which every tool brings along."""
    lines = [line for line in merges.splitlines() if line and not line.startswith("#version")]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() == _CLIP_MERGES_SHA256


def _first_reasons(reasons: Sequence[str]) -> str:
    """The first reasons, joined, and the number of the others: to know them changes nothing."""
    more = len(reasons) - _MAX_REASONS
    first = "; ".join(reasons[:_MAX_REASONS])
    return f"{first}; and {more} more" if more > 0 else first
