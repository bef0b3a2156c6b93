"""What neither names nor shapes of a checkpoint say, by what tools leave in it and by SD's custom.

That is the number of heads and of norm groups, the size of images, noise schedule, prediction,
latent scale, and the text tower's activation.
"""

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentdiff.formats.ldm import loaders
from latentdiff.formats.ldm.shapes import (
    GROUPS,
    HEAD_WIDTH,
    Shapes,
    text_config,
    unet_config,
    vae_config,
)
from latentdiff.formats.scheduler import to_config

SCALE = 0.18215  # of SD's latents

# Of SD 2.x, whose v-prediction shows in no shape: ComfyUI's measure, on a bias that is larger in
# the published v models (supported_models.py, SD20.model_type), of an UNet of that shape.
_V_BIAS = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
_V_STD = 0.09


@dataclass(frozen=True)
class Configurations:
    """The four configurations of a model in diffusers' and transformers' words."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    scheduler: dict[str, Any]


@dataclass(frozen=True)
class Evidence:
    """All that a file says: shapes and weights by diffusers' names, and what lies beside them."""

    unet: Mapping[str, Tensor]
    vae: Mapping[str, Tensor]
    text_encoder: Mapping[str, Tensor]
    open_clip: bool
    """Whether the text tower had open_clip's names."""
    names: Container[str]
    """All names in the file."""
    buffers: Mapping[str, Tensor]
    """`betas` and `scale_factor`, of those there are."""
    metadata: Mapping[str, str]


def assume(
    evidence: Evidence, described: Mapping[str, Mapping[str, Any]] | None
) -> tuple[Configurations, list[str]]:
    """Configurations of a model from elsewhere, and a sentence on each unsure assumption.

    `described` is what an LDM description says, and goes before all but the shapes; it is refused
    if they differ. Raises ValueError, asking for one, where no assumption fits the shapes.
    """
    unet = unet_config(_shapes(evidence.unet))
    vae = vae_config(_shapes(evidence.vae))
    text = text_config(_shapes(evidence.text_encoder))
    if described is not None:
        for name, found in (("unet", unet), ("vae", vae)):
            _check_described(name, found, described[name])
    linear = unet["use_linear_projection"]
    unet.setdefault("cross_attention_dim", text["hidden_size"])
    unet |= {
        "_class_name": "UNet2DConditionModel",
        "norm_num_groups": GROUPS,
        "attention_head_dim": (
            [max(width // HEAD_WIDTH, 1) for width in unet["block_out_channels"]] if linear else 8
        ),
    }
    vae |= {
        "_class_name": "AutoencoderKL",
        "norm_num_groups": GROUPS,
        "scaling_factor": _scale(evidence.buffers.get("scale_factor")),
    }
    text = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "num_attention_heads": max(text["hidden_size"] // HEAD_WIDTH, 1),
        "hidden_act": "gelu" if evidence.open_clip else "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": 512 if evidence.open_clip else text["hidden_size"],
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        **text,
    }

    notes = []
    prediction, sure = _prediction(evidence)
    side = _side(evidence.metadata, 768 if linear and prediction == "v_prediction" else 512)
    vae["sample_size"] = side
    unet["sample_size"] = max(side // 2 ** (len(vae["block_out_channels"]) - 1), 1)
    betas = dict(loaders.SD_BETAS)
    if described is not None:
        unet |= described["unet"]
        vae |= described["vae"]
        prediction = described["scheduler"]["prediction_type"]
        betas = {key: described["scheduler"][key] for key in betas}
    else:
        _check_betas(evidence)
        if not sure:
            notes.append(
                f"nothing in it says whether it predicts noise or v; {prediction} was assumed, as "
                "ComfyUI does, by the spread of a bias"
            )
        if not loaders.is_sd_shape(unet, vae, text):
            notes.append(
                f"it has not the shape of SD 1.x or 2.x; {unet['attention_head_dim']} heads, "
                f"norms in {GROUPS} groups and SD's noise schedule were assumed"
            )
        if notes:
            notes.append("config= says otherwise")
    unet["upcast_attention"] = linear and prediction == "v_prediction"
    _check_divisible(unet, vae)
    zero = "ztsnr" in evidence.names
    scheduler = to_config(
        schedule=betas["beta_schedule"].replace("squaredcos_cap_v2", "cosine"),
        prediction=prediction,
        num_timesteps=betas["num_train_timesteps"],
        beta_start=betas["beta_start"],
        beta_end=betas["beta_end"],
        # Without the noisiest step of all, zero terminal SNR would be for nothing (Lin et al.
        # 2023, arXiv:2305.08891, section 3.3).
        timestep_spacing="trailing" if zero else "leading",
        steps_offset=1,
        set_alpha_to_one=False,
        rescale_betas_zero_snr=zero,
        learned_variance=False,
    )
    return Configurations(unet, vae, text, scheduler), notes


def looks_like_v(unet: Mapping[str, Tensor], unet_config: Mapping[str, Any]) -> bool:
    """Whether ComfyUI will take a UNet, by diffusers' names, for one that predicts v."""
    bias = unet.get(_V_BIAS)
    if bias is None or not unet_config["use_linear_projection"] or unet_config["in_channels"] != 4:
        return False
    return float(bias.float().std(unbiased=False)) > _V_STD


def _prediction(evidence: Evidence) -> tuple[str, bool]:
    """What the UNet predicts, and whether that is sure."""
    metadata = evidence.metadata
    said = metadata.get("modelspec.prediction_type", metadata.get("modelspec.predict_key"))
    if said in ("v", "v_prediction", "epsilon", "eps"):
        return ("v_prediction" if said.startswith("v") else "epsilon"), True
    if "v_pred" in evidence.names:  # ComfyUI writes it beside every v model
        return "v_prediction", True
    architecture = metadata.get("modelspec.architecture", "")
    if architecture.startswith("stable-diffusion-v2-"):
        return ("v_prediction" if architecture.endswith("-v") else "epsilon"), True
    shape = unet_config(_shapes(evidence.unet))
    if not shape["use_linear_projection"] or shape["in_channels"] != 4:
        return "epsilon", True  # SD 1.x, and inpainting models of both
    return ("v_prediction" if looks_like_v(evidence.unet, shape) else "epsilon"), False


def _side(metadata: Mapping[str, str], default: int) -> int:
    """Side of the images in pixels, by `modelspec.resolution` if it is a square."""
    match = re.fullmatch(r"(\d{1,4})x(\d{1,4})", metadata.get("modelspec.resolution", ""))
    return int(match[1]) if match and match[1] == match[2] and int(match[1]) >= 8 else default


def _scale(scale: Tensor | None) -> float:
    """The latents' scale, of training with scale_by_std; else SD's."""
    if scale is None:
        return SCALE
    if scale.numel() != 1 or not float(scale) > 0:
        raise ValueError("its scale_factor is no positive number")
    # To the seven digits that a float32 file holds it is SD's.
    return SCALE if abs(float(scale) - SCALE) < 1e-6 else float(scale)


def _check_described(name: str, found: Mapping[str, Any], described: Mapping[str, Any]) -> None:
    for key in found.keys() & described.keys():
        if found[key] != described[key]:
            raise ValueError(
                f"by config= its {name}'s {key} is {described[key]}, by its tensors {found[key]}"
            )


def _check_betas(evidence: Evidence) -> None:
    """Refuse a file whose noise schedule is there to be seen and is not SD's."""
    betas = evidence.buffers.get("betas")
    if betas is None or "ztsnr" in evidence.names:
        return
    start, end = loaders.SD_BETAS["beta_start"], loaders.SD_BETAS["beta_end"]
    expected = torch.linspace(start**0.5, end**0.5, loaders.SD_BETAS["num_train_timesteps"]) ** 2
    # Of half precision's rounding, but less than from one schedule to another.
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
    numbers = unet["attention_head_dim"]
    widths = unet["block_out_channels"]
    for i, width in enumerate(widths):
        number = numbers if isinstance(numbers, int) else numbers[i]
        attends = unet["down_block_types"][i].startswith("Cross") or i == len(widths) - 1
        if attends and width % number:
            raise ValueError(
                f"the heads of its UNet cannot be told: {number} do not divide {width} channels; "
                "give config=, the model's diffusers folder or LDM YAML file"
            )


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
