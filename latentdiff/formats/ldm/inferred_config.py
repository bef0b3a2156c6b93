"""Infer the configs of a model from a checkpoint that does not hold them.

shapes.py reads what names and shapes of the tensors show. This module adds the rest, from metadata
and marks that other tools leave, and last from the conventions of SD 1.x and 2.x: number of heads
and of norm groups, image size, noise schedule, prediction type, latent scale, the text tower's
activation.
"""

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.formats.header import short_repr
from latentdiff.formats.ldm.compatibility import SD_BETAS, is_sd_shape
from latentdiff.formats.ldm.shapes import (
    GROUPS,
    HEAD_WIDTH,
    Shapes,
    infer_text_config,
    infer_unet_config,
    infer_vae_config,
)
from latentdiff.formats.ldm.yaml_config import heads_per_level
from latentdiff.formats.scheduler import to_config

SCALING_FACTOR = 0.18215  # of SD's latents

# Nothing in the shapes of SD 2.x shows v-prediction. ComfyUI goes by the spread of this bias, which
# is larger in the published v models (supported_models.py, SD20.model_type).
V_BIAS = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
_V_STD = 0.09


@dataclass(frozen=True)
class ModelConfigs:
    """The four configs of a model, with diffusers' and transformers' keys."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    scheduler: dict[str, Any]


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint holds: weights by diffusers' names, and what lies beside them."""

    unet: Mapping[str, Tensor]
    vae: Mapping[str, Tensor]
    text_encoder: Mapping[str, Tensor]
    open_clip: bool
    """Whether the text tower had open_clip's names."""
    names: Container[str]
    """All names in the file."""
    buffers: Mapping[str, Tensor]
    """`betas` and `scale_factor`, where the file has them."""
    metadata: Mapping[str, str]


def infer_configs(
    info: CheckpointInfo,
    ldm_config: Mapping[str, Mapping[str, Any]] | None,
    *,
    beside: Path | None = None,
) -> tuple[ModelConfigs, list[str]]:
    """Infer a model's configs; returns them, and a sentence on each assumption that is not sure.

    ldm_config: what `load_ldm_config` read, if there is such a file. It goes before all but the
    shapes, and is refused where it differs from them. beside: its path, if it was found and not
    asked for; it is then refused, too, where the checkpoint says that it predicts something else.
    Raises ValueError, asking for one, where no assumption fits the shapes.
    """
    unet = infer_unet_config(_shapes(info.unet))
    vae = infer_vae_config(_shapes(info.vae))
    text = infer_text_config(_shapes(info.text_encoder))
    if ldm_config is not None:
        for name, inferred in (("unet", unet), ("vae", vae)):
            _check_agreement(name, inferred, ldm_config[name])
    unet.setdefault("cross_attention_dim", text["hidden_size"])
    unet |= _unet_conventions(unet)
    vae |= {
        "norm_num_groups": GROUPS,
        "scaling_factor": _scaling_factor(info.buffers.get("scale_factor")),
    }
    text = _text_conventions(text, open_clip=info.open_clip) | text
    if ldm_config is None:
        prediction, is_sure = _prediction_type(info)
    else:
        prediction, is_sure = ldm_config["scheduler"]["prediction_type"], True
    linear = unet["use_linear_projection"]  # which shapes show, and no LDM config can change
    image_size = _image_size(
        info.metadata, default=768 if linear and prediction == "v_prediction" else 512
    )
    vae["sample_size"] = image_size
    unet["sample_size"] = max(image_size // 2 ** (len(vae["block_out_channels"]) - 1), 1)
    if ldm_config is None:
        _check_betas(info)
        betas = SD_BETAS
        notes = _unsure(unet, vae, text, None if is_sure else prediction)
    else:
        unet |= ldm_config["unet"]
        vae |= ldm_config["vae"]
        if "scale_factor" in info.buffers:  # LDM measured it, and loads it over its config's
            vae["scaling_factor"] = _scaling_factor(info.buffers["scale_factor"])
        if beside is not None:
            _check_prediction(info, prediction, beside)
        betas = {key: ldm_config["scheduler"][key] for key in SD_BETAS}
        notes = []
    if vae.get("encoder") == "none":
        notes.append("its VAE has no encoder, so that it draws from text alone")
    unet["upcast_attention"] = linear and prediction == "v_prediction"
    _check_divisible(unet, vae)
    scheduler = _scheduler_config(prediction, betas, zero_terminal_snr="ztsnr" in info.names)
    return ModelConfigs(unet, vae, text, scheduler), notes


def looks_like_v(unet: Mapping[str, Tensor], unet_config: Mapping[str, Any]) -> bool:
    """Whether ComfyUI infers v-prediction from a UNet's weights, by diffusers' names."""
    bias = unet.get(V_BIAS)
    if bias is None or not unet_config["use_linear_projection"] or unet_config["in_channels"] != 4:
        return False
    return float(bias.float().std(unbiased=False)) > _V_STD


def _unet_conventions(unet: Mapping[str, Any]) -> dict[str, Any]:
    """What of a UNet's config the shapes do not show, as in SD 1.x, or 2.x if `unet` is linear."""
    widths = unet["block_out_channels"]
    return {
        "_class_name": "UNet2DConditionModel",
        "norm_num_groups": GROUPS,
        "attention_head_dim": (
            [max(width // HEAD_WIDTH, 1) for width in widths]
            if unet["use_linear_projection"]
            else 8
        ),
    }


def _text_conventions(text: Mapping[str, Any], *, open_clip: bool) -> dict[str, Any]:
    """What of a text tower's config the shapes do not show, as in SD 2.x (open_clip) or SD 1.x."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "num_attention_heads": max(text["hidden_size"] // HEAD_WIDTH, 1),
        "hidden_act": "gelu" if open_clip else "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": 512 if open_clip else text["hidden_size"],
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _scheduler_config(
    prediction: str, betas: Mapping[str, Any], *, zero_terminal_snr: bool
) -> dict[str, Any]:
    return to_config(
        schedule=betas["beta_schedule"].replace("squaredcos_cap_v2", "cosine"),
        prediction=prediction,
        num_timesteps=betas["num_train_timesteps"],
        beta_start=betas["beta_start"],
        beta_end=betas["beta_end"],
        # Without the noisiest step of all, zero terminal SNR would be for nothing (Lin et al.
        # 2023, arXiv:2305.08891, section 3.3).
        timestep_spacing="trailing" if zero_terminal_snr else "leading",
        steps_offset=1,
        set_alpha_to_one=False,
        rescale_betas_zero_snr=zero_terminal_snr,
        learned_variance=False,
    )


def _unsure(
    unet: Mapping[str, Any],
    vae: Mapping[str, Any],
    text: Mapping[str, Any],
    assumed_prediction: str | None,
) -> list[str]:
    """A sentence on each assumption that the checkpoint does not confirm; [] if all are sure."""
    notes = []
    if assumed_prediction is not None:
        notes.append(
            f"nothing in it says whether it predicts noise or v; {assumed_prediction} was assumed, "
            "as ComfyUI does, by the spread of a bias"
        )
    if not is_sd_shape(unet, vae, text):
        notes.append(
            f"it has not the shape of SD 1.x or 2.x; {unet['attention_head_dim']} heads, "
            f"norms in {GROUPS} groups and SD's noise schedule were assumed"
        )
    return [*notes, "config= says otherwise, in `latentdiff convert --config` too"] if notes else []


def _prediction_type(info: CheckpointInfo) -> tuple[str, bool]:
    """What the UNet predicts, and whether that is sure."""
    stated = _stated_prediction(info)
    if stated is not None:
        return stated, True
    config = infer_unet_config(_shapes(info.unet))
    if not config["use_linear_projection"] or config["in_channels"] != 4:
        return "epsilon", True  # SD 1.x, and inpainting models of both
    return ("v_prediction" if looks_like_v(info.unet, config) else "epsilon"), False


def _stated_prediction(info: CheckpointInfo) -> str | None:
    """What the file says that the UNet predicts, in metadata or by a mark among its tensors.

    Raises ValueError, asking for config=, where it is anything else than noise and v.
    """
    metadata = info.metadata
    stated = metadata.get("modelspec.prediction_type") or metadata.get("modelspec.predict_key")
    if stated:
        if stated.lower() not in ("v", "v_prediction", "epsilon", "eps"):
            raise ValueError(
                f"its metadata say that it predicts {short_repr(stated)}; known are epsilon and v; "
                "give config=, an LDM YAML file or the model's diffusers folder"
            )
        return "v_prediction" if stated.lower().startswith("v") else "epsilon"
    if "v_pred" in info.names:  # ComfyUI writes it beside every v model
        return "v_prediction"
    architecture = metadata.get("modelspec.architecture", "")
    if architecture.startswith("stable-diffusion-v2-"):
        return "v_prediction" if architecture.endswith("-v") else "epsilon"
    return None


def _check_prediction(info: CheckpointInfo, prediction: str, beside: Path) -> None:
    """Raise ValueError where a file says that it predicts something else than the config beside it.

    To go by either without a word could draw noise.
    """
    stated = _stated_prediction(info)
    if stated not in (None, prediction):
        raise ValueError(
            f"it says of itself that it predicts {stated}, and {beside.name} beside it says "
            f"{prediction}; config={str(beside)!r} decides for the latter, renaming that file for "
            "the former"
        )


def _image_size(metadata: Mapping[str, str], *, default: int) -> int:
    """Side of the images in pixels, by `modelspec.resolution` if it is a square."""
    match = re.fullmatch(r"(\d{1,4})x(\d{1,4})", metadata.get("modelspec.resolution", ""))
    return int(match[1]) if match and match[1] == match[2] and int(match[1]) >= 8 else default


def _scaling_factor(scale_factor: Tensor | None) -> float:
    """The `scale_factor` that LDM stores when it trains with scale_by_std; else SD's."""
    if scale_factor is None:
        return SCALING_FACTOR
    if scale_factor.numel() != 1 or not float(scale_factor) > 0:
        raise ValueError("its scale_factor is no positive number")
    # A float32 file holds seven digits.
    is_sd = abs(float(scale_factor) - SCALING_FACTOR) < 1e-6
    return SCALING_FACTOR if is_sd else float(scale_factor)


def _check_agreement(name: str, inferred: Mapping[str, Any], ldm_config: Mapping[str, Any]) -> None:
    for key in inferred.keys() & ldm_config.keys():
        if inferred[key] != ldm_config[key]:
            raise ValueError(
                f"by its LDM config (config=, or the .yaml beside it) its {name}'s {key} is "
                f"{ldm_config[key]}, by its tensors {inferred[key]}"
            )


def _check_betas(info: CheckpointInfo) -> None:
    """Raise ValueError where the file holds its betas and they are not SD's."""
    betas = info.buffers.get("betas")
    if betas is None or "ztsnr" in info.names:
        return
    start, end = SD_BETAS["beta_start"], SD_BETAS["beta_end"]
    expected = torch.linspace(start**0.5, end**0.5, SD_BETAS["num_train_timesteps"]) ** 2
    # Above the rounding of half precision, and below the difference between two schedules.
    if betas.shape != expected.shape or not torch.allclose(betas.float(), expected, rtol=1e-2):
        raise ValueError("its betas are not SD's; give config=, the LDM YAML file that says which")


def _check_divisible(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    for name, config in (("UNet", unet), ("VAE", vae)):
        widths, groups = config["block_out_channels"], config["norm_num_groups"]
        if any(width % groups for width in widths):
            raise ValueError(
                f"its {name} is {widths} wide, which {groups} norm groups do not divide; give "
                "config=, the model's diffusers folder"
            )
    widths = unet["block_out_channels"]
    for i, (width, number) in enumerate(zip(widths, heads_per_level(unet), strict=True)):
        attends = unet["down_block_types"][i].startswith("Cross") or i == len(widths) - 1
        if attends and width % number:
            raise ValueError(
                f"the heads of its UNet cannot be told: {number} do not divide {width} channels; "
                "give config=, the model's diffusers folder or LDM YAML file"
            )


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
