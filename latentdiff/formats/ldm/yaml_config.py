"""LDM's config of a model, the YAML file beside a checkpoint, to and from diffusers' configs.

Its keys are those of configs/stable-diffusion/v1-inference.yaml in CompVis/stable-diffusion; an
absent key has the default of LDM's constructors (ldm/models/diffusion/ddpm.py).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from latentdiff.formats.header import short_repr
from latentdiff.formats.ldm.shapes import GROUPS, HEAD_WIDTH
from latentdiff.formats.weights import replacing
from latentdiff.formats.yaml_text import check_keys

MAX_BYTES = 100_000  # published ones have 2,000 to 5,000
MAX_BRACKETS = 1000

# diffusers' beta schedules by LDM's names; LDM's "linear" is linear in the square root of beta.
_BETA_SCHEDULES = {
    "scaled_linear": "linear",
    "linear": "sqrt_linear",
    "squaredcos_cap_v2": "cosine",
}
# LDM's third, x0, is left out: A1111 would sample with it as with eps.
_PARAMETERIZATIONS = {"epsilon": "eps", "v_prediction": "v"}


def unsupported_by_ldm(
    unet: Mapping[str, Any], vae: Mapping[str, Any], scheduler: Mapping[str, Any]
) -> list[str]:
    """What of a model, given by diffusers' configs, an LDM config cannot express; [] if nothing."""
    reasons = []
    if scheduler.get("use_flow_sigmas"):
        reasons.append("a flow cannot be said")
    elif scheduler["prediction_type"] not in _PARAMETERIZATIONS:
        reasons.append(f"prediction {scheduler['prediction_type']} cannot be said")
    elif scheduler["beta_schedule"] not in _BETA_SCHEDULES:
        reasons.append(f"beta schedule {scheduler['beta_schedule']} cannot be said")
    for name, config in (("UNet", unet), ("VAE", vae)):
        widths = config["block_out_channels"]
        if any(width % widths[0] for width in widths):
            reasons.append(
                f"the {name}'s widths {list(widths)} are no whole multiples of the first"
            )
        if config["norm_num_groups"] != GROUPS:
            reasons.append(f"the {name} norms in {config['norm_num_groups']} groups, not {GROUPS}")
    reasons += _unsupported_unet(unet)
    for key in ("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"):
        if not vae.get(key, True):
            reasons.append(f"the VAE's {key} is false")
    return reasons


def to_ldm_config(
    unet: Mapping[str, Any],
    vae: Mapping[str, Any],
    text: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    *,
    open_clip: bool,
) -> dict[str, Any]:
    """The LDM config of a model of which nothing is `unsupported_by_ldm`, from diffusers' configs.

    open_clip: whether its text tower is SD 2.x's.
    """
    assert not unsupported_by_ldm(unet, vae, scheduler)
    inpainting = unet["in_channels"] != unet["out_channels"]
    model = "LatentInpaintDiffusion" if inpainting else "LatentDiffusion"
    latent_size = unet["sample_size"]
    if latent_size is None:
        latent_size = vae["sample_size"] // 2 ** (len(vae["block_out_channels"]) - 1)
    return {
        "model": {
            "target": f"ldm.models.diffusion.ddpm.{model}",
            "params": {
                "parameterization": _PARAMETERIZATIONS[scheduler["prediction_type"]],
                "beta_schedule": _BETA_SCHEDULES[scheduler["beta_schedule"]],
                "linear_start": scheduler["beta_start"],
                "linear_end": scheduler["beta_end"],
                "timesteps": scheduler["num_train_timesteps"],
                "first_stage_key": "jpg",
                "cond_stage_key": "txt",
                "image_size": latent_size,
                "channels": unet["out_channels"],
                "cond_stage_trainable": False,
                "conditioning_key": "hybrid" if inpainting else "crossattn",
                "scale_factor": vae["scaling_factor"],
                "use_ema": False,
                **({"finetune_keys": None} if inpainting else {}),  # nothing to start it from
                "unet_config": _ldm_unet(unet, latent_size),
                "first_stage_config": _ldm_vae(vae),
                "cond_stage_config": _ldm_text_encoder(text, open_clip=open_clip),
            },
        }
    }


def from_ldm_config(ldm_config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The `unet`, `vae`, `text_encoder` and `scheduler` configs that an LDM config stands for.

    They have diffusers' keys, without those that LDM has no counterpart of; `text_encoder` has one
    key, `layer`, "last" or "penultimate". Raises ValueError, naming the key, for a config that is
    not of SD 1.x or 2.x.
    """
    model = _get(_get(ldm_config, "model"), "params", "model.")
    params = _get(_get(model, "unet_config"), "params", "unet_config.")
    first_stage = _get(_get(model, "first_stage_config"), "params", "first_stage_config.")
    ddconfig = _get(first_stage, "ddconfig")
    text_params = _get(model, "cond_stage_config").get("params") or {}
    try:
        unet = _diffusers_unet(params)
        vae = {
            "in_channels": int(ddconfig["in_channels"]),
            "out_channels": int(ddconfig["out_ch"]),
            "block_out_channels": [int(ddconfig["ch"]) * int(m) for m in ddconfig["ch_mult"]],
            "layers_per_block": int(ddconfig["num_res_blocks"]),
            "latent_channels": int(ddconfig["z_channels"]),
            "norm_num_groups": GROUPS,
            "scaling_factor": float(model.get("scale_factor", 1.0)),
        }
        if "image_size" in model:
            unet["sample_size"] = int(model["image_size"])
            vae["sample_size"] = unet["sample_size"] * 2 ** (len(ddconfig["ch_mult"]) - 1)
        scheduler = {
            "prediction_type": _diffusers_name(
                _PARAMETERIZATIONS, model.get("parameterization", "eps"), "parameterization"
            ),
            "beta_schedule": _diffusers_name(
                _BETA_SCHEDULES, model.get("beta_schedule", "linear"), "beta_schedule"
            ),
            "beta_start": float(model.get("linear_start", 1e-4)),
            "beta_end": float(model.get("linear_end", 2e-2)),
            "num_train_timesteps": int(model.get("timesteps", 1000)),
        }
    except KeyError as error:
        raise ValueError(f"it has no {error.args[0]}") from error
    except (TypeError, ArithmeticError, IndexError) as error:
        raise ValueError(f"it is no config of SD 1.x or 2.x ({error})") from error
    layer = text_params.get("layer", "last") if isinstance(text_params, Mapping) else "last"
    if layer not in ("last", "penultimate"):
        raise ValueError(f"cond_stage_config.layer={short_repr(layer)} must be last or penultimate")
    return {"unet": unet, "vae": vae, "text_encoder": {"layer": layer}, "scheduler": scheduler}


def save_ldm_config(ldm_config: Mapping[str, Any], path: Path) -> None:
    """Write an LDM config as YAML, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(yaml.safe_dump(dict(ldm_config), sort_keys=False), encoding="utf-8")


def load_ldm_config(path: Path) -> dict[str, dict[str, Any]]:
    """`from_ldm_config` of a YAML file; ValueError names the file and what is wrong with it."""
    with path.open("rb") as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise ValueError(f"{path}: is over the limit of {MAX_BYTES} bytes")
    # With these, some hundred bytes can ask for minutes of time or for all memory.
    if text.count(b"[") + text.count(b"{") > MAX_BRACKETS or b"<<" in text:
        raise ValueError(f"{path}: has {MAX_BRACKETS} brackets or a merge, as no LDM config has")
    try:
        check_keys(text)
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: is not valid YAML ({reason})") from error
    try:
        return from_ldm_config(content)
    except ValueError as error:
        raise ValueError(f"{path}: is no LDM config: {error}") from error


def heads_per_level(unet: Mapping[str, Any]) -> list[int]:
    """Number of attention heads at each level."""
    number = unet["attention_head_dim"]
    return [number] * len(unet["block_out_channels"]) if isinstance(number, int) else list(number)


def _unsupported_unet(unet: Mapping[str, Any]) -> list[str]:
    """What of a UNet alone an LDM config cannot express."""
    reasons = []
    out = unet["out_channels"]
    if unet["in_channels"] not in (out, 2 * out + 1):  # with a mask and the masked image's latents
        reasons.append(f"the UNet takes {unet['in_channels']} channels and makes {out}")
    down, up = _has_attention(unet["down_block_types"]), _has_attention(unet["up_block_types"])
    if down != up[::-1]:
        reasons.append("the UNet attends at other levels on the way down than on the way up")
    if unet["mid_block_type"] != "UNetMidBlock2DCrossAttn":
        reasons.append("the UNet has no attention in the middle")
    if unet.get("transformer_layers_per_block", 1) != 1:
        # Stability-AI/stablediffusion's SpatialTransformer, which A1111 runs, asks for a list of
        # contexts, one a layer, that nothing makes.
        reasons.append("the UNet's transformers have more than one layer")
    if not _ldm_heads(unet):
        reasons.append(
            f"the numbers of heads {heads_per_level(unet)} are neither equal nor equally wide"
        )
    for key, value in (("flip_sin_to_cos", True), ("freq_shift", 0), ("norm_eps", 1e-5)):
        if unet.get(key, value) != value:
            reasons.append(f"the UNet's {key} is {unet[key]}, not {value}")
    return reasons


def _ldm_unet(unet: Mapping[str, Any], latent_size: int) -> dict[str, Any]:
    attends = _has_attention(unet["down_block_types"])
    return {
        "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "params": {
            "image_size": latent_size,  # not used
            "in_channels": unet["in_channels"],
            "out_channels": unet["out_channels"],
            "model_channels": unet["block_out_channels"][0],
            "attention_resolutions": [2**i for i, attention in enumerate(attends) if attention],
            "num_res_blocks": unet["layers_per_block"],
            "channel_mult": _channel_multipliers(unet),
            **_ldm_heads(unet),
            "use_spatial_transformer": True,
            "use_linear_in_transformer": unet["use_linear_projection"],
            "transformer_depth": 1,
            "context_dim": unet["cross_attention_dim"],
            "use_checkpoint": False,
            "legacy": False,
        },
    }


def _ldm_vae(vae: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "target": "ldm.models.autoencoder.AutoencoderKL",
        "params": {
            "embed_dim": vae["latent_channels"],
            "monitor": "val/rec_loss",
            "ddconfig": {
                "double_z": True,
                "z_channels": vae["latent_channels"],
                "resolution": vae["sample_size"],
                "in_channels": vae["in_channels"],
                "out_ch": vae["out_channels"],
                "ch": vae["block_out_channels"][0],
                "ch_mult": _channel_multipliers(vae),
                "num_res_blocks": vae["layers_per_block"],
                "attn_resolutions": [],
                "dropout": 0.0,
            },
            "lossconfig": {"target": "torch.nn.Identity"},
        },
    }


def _ldm_text_encoder(text: Mapping[str, Any], *, open_clip: bool) -> dict[str, Any]:
    modules = "ldm.modules.encoders.modules"
    if open_clip:
        params = {"freeze": True, "layer": "penultimate"}
        return {"target": f"{modules}.FrozenOpenCLIPEmbedder", "params": params}
    params = {"max_length": text["max_position_embeddings"]}
    return {"target": f"{modules}.FrozenCLIPEmbedder", "params": params}


def _ldm_heads(unet: Mapping[str, Any]) -> dict[str, int]:
    """LDM's key for the heads, one number or one width for all; {} where neither is the same."""
    attends = _has_attention(unet["down_block_types"])
    attends[-1] = True  # the middle
    levels = zip(heads_per_level(unet), unet["block_out_channels"], attends, strict=True)
    heads = [(number, channels // number) for number, channels, attention in levels if attention]
    numbers, widths = {number for number, _ in heads}, {width for _, width in heads}
    if widths == {HEAD_WIDTH}:  # as SD 2.x's configs have it
        return {"num_head_channels": HEAD_WIDTH}
    if len(numbers) == 1:
        return {"num_heads": numbers.pop()}
    return {"num_head_channels": widths.pop()} if len(widths) == 1 else {}


def _channel_multipliers(config: Mapping[str, Any]) -> list[int]:
    widths = config["block_out_channels"]
    return [width // widths[0] for width in widths]


def _has_attention(block_types: Sequence[str]) -> list[bool]:
    return [block_type.startswith("CrossAttn") for block_type in block_types]


def _diffusers_unet(params: Mapping[str, Any]) -> dict[str, Any]:
    widths = [int(params["model_channels"]) * int(m) for m in params["channel_mult"]]
    attends = [2**i in params["attention_resolutions"] for i in range(len(widths))]
    context, depth = params["context_dim"], params.get("transformer_depth", 1)
    width = int(params.get("num_head_channels", -1))
    return {
        "in_channels": int(params["in_channels"]),
        "out_channels": int(params["out_channels"]),
        "block_out_channels": widths,
        "layers_per_block": int(params["num_res_blocks"]),
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]],
        "cross_attention_dim": int(context[0] if isinstance(context, Sequence) else context),
        "transformer_layers_per_block": int(depth[0] if isinstance(depth, Sequence) else depth),
        "use_linear_projection": bool(params.get("use_linear_in_transformer", False)),
        "attention_head_dim": (
            int(params["num_heads"]) if width == -1 else [max(w // width, 1) for w in widths]
        ),
        "norm_num_groups": GROUPS,
    }


def _get(mapping: Mapping[str, Any], key: str, parent: str = "") -> Mapping[str, Any]:
    value = mapping.get(key) if isinstance(mapping, Mapping) else None
    if not isinstance(value, Mapping):
        raise ValueError(f"it has no {parent}{key}")
    return value


def _diffusers_name(ldm_names: Mapping[str, str], ldm_name: object, key: str) -> str:
    """The key of `ldm_names` whose value is `ldm_name`; ValueError names `key` if there is none."""
    for name, value in ldm_names.items():
        if value == ldm_name:
            return name
    raise ValueError(f"{key}={ldm_name!r} must be one of {', '.join(ldm_names.values())}")
