"""LDM's description of a model, the YAML file beside a checkpoint, to and from diffusers' words.

The words are those of configs/stable-diffusion/v1-inference.yaml in CompVis/stable-diffusion; what
is absent means what LDM's constructors take (ldm/models/diffusion/ddpm.py).
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from latentdiff.formats.ldm.shapes import GROUPS, HEAD_WIDTH

MAX_BYTES = 100_000  # published ones have 2,000 to 5,000
MAX_BRACKETS = 1000

# diffusers' beta schedules in LDM's words, whose "linear" is linear in the root.
_BETA_SCHEDULES = {
    "scaled_linear": "linear",
    "linear": "sqrt_linear",
    "squaredcos_cap_v2": "cosine",
}
# LDM's third, x0, is left out: A1111 would draw with it as with eps.
_PARAMETERIZATIONS = {"epsilon": "eps", "v_prediction": "v"}


def obstacles(
    unet: Mapping[str, Any], vae: Mapping[str, Any], scheduler: Mapping[str, Any]
) -> list[str]:
    """Why LDM has no words for a model, given by diffusers' configurations; nothing if it has."""
    found = []
    if scheduler.get("use_flow_sigmas"):
        found.append("a flow cannot be said")
    elif scheduler["prediction_type"] not in _PARAMETERIZATIONS:
        found.append(f"prediction {scheduler['prediction_type']} cannot be said")
    elif scheduler["beta_schedule"] not in _BETA_SCHEDULES:
        found.append(f"beta schedule {scheduler['beta_schedule']} cannot be said")
    for name, config in (("UNet", unet), ("VAE", vae)):
        widths = config["block_out_channels"]
        if any(width % widths[0] for width in widths):
            found.append(f"the {name}'s widths {list(widths)} are no whole multiples of the first")
        if config["norm_num_groups"] != GROUPS:
            found.append(f"the {name} norms in {config['norm_num_groups']} groups, not {GROUPS}")
    out = unet["out_channels"]
    if unet["in_channels"] not in (out, 2 * out + 1):  # the latter with a mask and what it leaves
        found.append(f"the UNet takes {unet['in_channels']} channels and makes {out}")
    down, up = _attends(unet["down_block_types"]), _attends(unet["up_block_types"])
    if down != up[::-1]:
        found.append("the UNet attends at other levels on the way down than on the way up")
    if unet["mid_block_type"] != "UNetMidBlock2DCrossAttn":
        found.append("the UNet has no attention in the middle")
    if unet.get("transformer_layers_per_block", 1) != 1:
        # Stability-AI/stablediffusion's SpatialTransformer, which A1111 runs, asks for a list of
        # contexts, one a layer, that nothing makes.
        found.append("the UNet's transformers have more than one layer")
    if not _heads(unet):
        found.append(f"the numbers of heads {heads(unet)} are neither equal nor equally wide")
    for key, value in (("flip_sin_to_cos", True), ("freq_shift", 0), ("norm_eps", 1e-5)):
        if unet.get(key, value) != value:
            found.append(f"the UNet's {key} is {unet[key]}, not {value}")
    for key in ("mid_block_add_attention", "use_quant_conv", "use_post_quant_conv"):
        if not vae.get(key, True):
            found.append(f"the VAE's {key} is false")
    return found


def to_ldm(
    unet: Mapping[str, Any],
    vae: Mapping[str, Any],
    text: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    *,
    open_clip: bool,
) -> dict[str, Any]:
    """The description of a model without `obstacles`; `open_clip` if its text tower is SD 2.x's."""
    assert not obstacles(unet, vae, scheduler)
    inpainting = unet["in_channels"] != unet["out_channels"]
    model = "LatentInpaintDiffusion" if inpainting else "LatentDiffusion"
    tower = "FrozenOpenCLIPEmbedder" if open_clip else "FrozenCLIPEmbedder"
    attends = _attends(unet["down_block_types"])
    size = unet["sample_size"]
    if size is None:
        size = vae["sample_size"] // 2 ** (len(vae["block_out_channels"]) - 1)
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
                "image_size": size,
                "channels": unet["out_channels"],
                "cond_stage_trainable": False,
                "conditioning_key": "hybrid" if inpainting else "crossattn",
                "scale_factor": vae["scaling_factor"],
                "use_ema": False,
                **({"finetune_keys": None} if inpainting else {}),  # nothing to start it from
                "unet_config": {
                    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                    "params": {
                        "image_size": size,  # not used
                        "in_channels": unet["in_channels"],
                        "out_channels": unet["out_channels"],
                        "model_channels": unet["block_out_channels"][0],
                        "attention_resolutions": [2**i for i, there in enumerate(attends) if there],
                        "num_res_blocks": unet["layers_per_block"],
                        "channel_mult": _multiples(unet),
                        **_heads(unet),
                        "use_spatial_transformer": True,
                        "use_linear_in_transformer": unet["use_linear_projection"],
                        "transformer_depth": 1,
                        "context_dim": unet["cross_attention_dim"],
                        "use_checkpoint": False,
                        "legacy": False,
                    },
                },
                "first_stage_config": {
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
                            "ch_mult": _multiples(vae),
                            "num_res_blocks": vae["layers_per_block"],
                            "attn_resolutions": [],
                            "dropout": 0.0,
                        },
                        "lossconfig": {"target": "torch.nn.Identity"},
                    },
                },
                "cond_stage_config": {
                    "target": f"ldm.modules.encoders.modules.{tower}",
                    "params": (
                        {"freeze": True, "layer": "penultimate"}
                        if open_clip
                        else {"max_length": text["max_position_embeddings"]}
                    ),
                },
            },
        }
    }


def from_ldm(description: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The `unet`, `vae`, `text_encoder`, `scheduler` configurations that a description implies.

    In diffusers' words and without keys of which LDM has nothing to say; `text_encoder` has one
    key, `layer`, "last" or "penultimate". Raises ValueError, naming the key, for a description that
    is none of SD 1.x or 2.x.
    """
    model = _get(_get(description, "model"), "params", "model.")
    params = _get(_get(model, "unet_config"), "params", "unet_config.")
    first_stage = _get(_get(model, "first_stage_config"), "params", "first_stage_config.")
    ddconfig = _get(first_stage, "ddconfig")
    tower = _get(model, "cond_stage_config").get("params") or {}
    try:
        unet = _unet(params)
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
            "prediction_type": _word(
                _PARAMETERIZATIONS, model.get("parameterization", "eps"), "parameterization"
            ),
            "beta_schedule": _word(
                _BETA_SCHEDULES, model.get("beta_schedule", "linear"), "beta_schedule"
            ),
            "beta_start": float(model.get("linear_start", 1e-4)),
            "beta_end": float(model.get("linear_end", 2e-2)),
            "num_train_timesteps": int(model.get("timesteps", 1000)),
        }
    except KeyError as error:
        raise ValueError(f"it has no {error.args[0]}") from error
    except (TypeError, ArithmeticError) as error:
        raise ValueError(f"it is no description of SD 1.x or 2.x ({error})") from error
    layer = tower.get("layer", "last") if isinstance(tower, Mapping) else "last"
    return {"unet": unet, "vae": vae, "text_encoder": {"layer": layer}, "scheduler": scheduler}


def save_description(description: Mapping[str, Any], path: Path) -> None:
    """Write a description as YAML, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(yaml.safe_dump(dict(description), sort_keys=False), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_description(path: Path) -> dict[str, dict[str, Any]]:
    """`from_ldm` of a YAML file; ValueError names the file and what is wrong with it."""
    with path.open("rb") as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise ValueError(f"{path}: is over the limit of {MAX_BYTES} bytes")
    # In some hundred bytes these ask for minutes of time or all memory there is.
    if text.count(b"[") + text.count(b"{") > MAX_BRACKETS or b"<<" in text:
        raise ValueError(f"{path}: has {MAX_BRACKETS} brackets or a merge, as no description has")
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not valid YAML ({error})") from error
    try:
        return from_ldm(content)
    except ValueError as error:
        raise ValueError(f"{path}: is no LDM description: {error}") from error


def heads(unet: Mapping[str, Any]) -> list[int]:
    """Number of attention heads at each level."""
    number = unet["attention_head_dim"]
    return [number] * len(unet["block_out_channels"]) if isinstance(number, int) else list(number)


def _unet(params: Mapping[str, Any]) -> dict[str, Any]:
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


def _attends(blocks: Sequence[str]) -> list[bool]:
    return [block.startswith("CrossAttn") for block in blocks]


def _multiples(config: Mapping[str, Any]) -> list[int]:
    widths = config["block_out_channels"]
    return [width // widths[0] for width in widths]


def _heads(unet: Mapping[str, Any]) -> dict[str, int]:
    """LDM's word for the heads, as one number or one width everywhere; none if there is none."""
    attends = _attends(unet["down_block_types"])
    attends[-1] = True  # the middle
    found = [
        (number, width)
        for number, width, there in zip(
            heads(unet), unet["block_out_channels"], attends, strict=True
        )
        if there
    ]
    numbers = {number for number, _ in found}
    widths = {width // number for number, width in found}
    if widths == {HEAD_WIDTH}:  # SD 2.x's way of saying it
        return {"num_head_channels": HEAD_WIDTH}
    if len(numbers) == 1:
        return {"num_heads": numbers.pop()}
    return {"num_head_channels": widths.pop()} if len(widths) == 1 else {}


def _get(mapping: Mapping[str, Any], key: str, inside: str = "") -> Mapping[str, Any]:
    found = mapping.get(key) if isinstance(mapping, Mapping) else None
    if not isinstance(found, Mapping):
        raise ValueError(f"it has no {inside}{key}")
    return found


def _word(words: Mapping[str, str], word: object, key: str) -> str:
    for theirs, ldm in words.items():
        if ldm == word:
            return theirs
    raise ValueError(f"{key}={word!r} must be one of {', '.join(words.values())}")
