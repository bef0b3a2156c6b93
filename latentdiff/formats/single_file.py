"""A model in one safetensors file, as A1111 and ComfyUI keep them, both ways.

Weights stand in it under LDM's names; the configurations do not stand in it at all, so that other
tools guess them. Files of ours hold them too, in their metadata, and come back exactly.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.formats.header import read_header, shown
from latentdiff.formats.ldm import keys as ldm_keys
from latentdiff.formats.ldm import loaders
from latentdiff.formats.ldm import shapes as ldm_shapes
from latentdiff.formats.ldm.description import load_description, obstacles, save_description, to_ldm
from latentdiff.formats.ldm.guesses import Configurations, Evidence, assume, looks_like_v
from latentdiff.formats.ldm.modelspec import (
    OURS,
    TOKENIZER_FILES,
    modelspec,
    pack,
    tensor_hash,
    unpack,
)
from latentdiff.formats.open_clip import from_transformers, to_transformers
from latentdiff.formats.weights import load_json, load_safetensors, save_safetensors

_PARTS = ("unet", "vae", "clip", "open_clip", "buffer")
_EMA = "model_ema.diffusion_model"
# What training leaves behind in a checkpoint and drawing does not need.
_IGNORED = re.compile(
    r"model_ema\..*|first_stage_model\.(loss|model_ema)\..*|lora_.*|.*\.lora_.*"
    r"|cond_stage_model\.transformer\.(text_model\.embeddings\.position_ids"
    r"|embeddings\.position_ids|text_projection\.weight)"
    r"|cond_stage_model\.(model\.)?(text_projection|logit_scale|attn_mask)"
    r"|(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?"
    r"|posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights|logvar"
    r"|betas|scale_factor|v_pred|ztsnr|global_step|denoiser\.sigmas"
)


@dataclass
class SingleFile:
    """A whole model: weights and configurations under diffusers' and transformers' names."""

    unet: dict[str, Tensor]
    vae: dict[str, Tensor]
    text_encoder: dict[str, Tensor]
    """Names begin with `text_model.`."""
    unet_config: dict[str, Any]
    vae_config: dict[str, Any]
    text_config: dict[str, Any]
    scheduler_config: dict[str, Any]
    tokenizer: dict[str, str] | None = None
    """The text of the files in `TOKENIZER_FILES`, of those there are; None if it is not known."""
    metadata: dict[str, str] = field(default_factory=dict)


def read_single_file(
    path: str | Path,
    *,
    config: str | Path | None = None,
    ema: bool = False,
    dtype: torch.dtype | None = None,
) -> SingleFile:
    """Read a checkpoint of SD 1.x or 2.x, or one of ours of any shape.

    What a model is shows in names and shapes of its tensors; the file's name does not count. What
    does not show comes from our metadata, from `config` (an LDM YAML file, or a diffusers folder
    with the model's configurations), from what other tools left in the file, and last from the
    conventions of SD; where those are not sure, a warning says what was assumed.
    ema: take the running averages of the UNet's weights that some files hold besides.
    dtype: what weights become, one after another; None leaves them as they are.
    Raises ValueError for a file that is anything else, saying what it seems to be, and for one
    with a tensor that nobody knows, naming it.
    """
    path = Path(path)
    header = read_header(path)
    ldm_shapes.refuse_others(path, header.shapes)
    try:
        names = _names(header.shapes, ema=ema)
        expected = {
            ours: torch.empty(header.shapes[name], dtype=header.dtypes[name], device="meta")
            for name, ours in names.items()
        }
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    tensors = load_safetensors(
        path,
        expected=expected,
        optional=lambda name: name not in expected,
        rename=lambda name: names.get(name, f"ignored {name}"),
        dtype=dtype,
    )
    parts = {part: _take(tensors, f"{part} ") for part in _PARTS}
    for name, tensor in parts["vae"].items():
        if ldm_keys.is_vae_convolution(name) and tensor.ndim > 2:
            parts["vae"][name] = tensor.flatten(1)
    try:
        whole, described, tokenizer = _configurations(config, header.metadata)
        text = parts["clip"]
        if not text:
            text = to_transformers(parts["open_clip"], layers=_layers(parts, whole, described))
        if whole is None:
            evidence = Evidence(
                unet=parts["unet"],
                vae=parts["vae"],
                text_encoder=text,
                open_clip=bool(parts["open_clip"]),
                names=header.shapes,
                buffers=parts["buffer"],
                metadata=header.metadata,
            )
            whole, notes = assume(evidence, described)
            if notes:
                warnings.warn(f"{path}: {'; '.join(notes)}", stacklevel=2)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return SingleFile(
        unet=parts["unet"],
        vae=parts["vae"],
        text_encoder=text,
        unet_config=whole.unet,
        vae_config=whole.vae,
        text_config=whole.text_encoder,
        scheduler_config=whole.scheduler,
        tokenizer=tokenizer,
        metadata={key: value for key, value in header.metadata.items() if key != OURS},
    )


def write_single_file(
    single_file: SingleFile, path: str | Path, *, dtype: torch.dtype | None = None
) -> list[str]:
    """Write a model as one safetensors file; returns sentences on which tools load it.

    Where other tools cannot guess the model from its tensors and LDM has words for it, its LDM
    description is written beside the file, with `.yaml` for `.safetensors`. Configurations must be
    whole, and hold nothing that JSON cannot say.
    dtype: what weights are converted to; None leaves them as they are.
    Raises ValueError if `path` does not end in `.safetensors`.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path={str(path)!r} must end in .safetensors")
    unet, vae, text = single_file.unet_config, single_file.vae_config, single_file.text_config
    scheduler = single_file.scheduler_config
    is_sd = loaders.is_sd_shape(unet, vae, text)
    open_clip = not loaders.differences(text, loaders.SD2_TOWER)
    tensors = _to_ldm(single_file, dtype, open_clip=open_clip)
    whole = Configurations(unet, vae, text, scheduler)
    metadata = {
        **modelspec(whole, single_file.metadata, title=path.stem, is_sd=is_sd),
        "modelspec.hash_sha256": tensor_hash(tensors),
        OURS: pack(whole, single_file.tokenizer),
    }
    save_safetensors(tensors, path, metadata)

    in_the_way = obstacles(unet, vae, scheduler)
    plain = is_sd and not unet["use_linear_projection"] and _is_epsilon(scheduler)
    beside = path.with_suffix(".yaml")
    description = beside if not in_the_way and not plain else None
    if description is not None:
        save_description(to_ldm(unet, vae, text, scheduler, open_clip=open_clip), description)
    found = loaders.sentences(
        unet,
        vae,
        text,
        scheduler,
        (single_file.tokenizer or {}).get("merges.txt"),
        looks_like_v=looks_like_v(single_file.unet, unet),
        description=None if description is None else description.name,
        obstacles=in_the_way,
    )
    if description is None and beside.exists():
        found.append(f"A1111 reads {beside.name}, which lies there and is of another model.")
    return found


def _names(shapes: Mapping[str, object], *, ema: bool) -> dict[str, str]:
    """Of each tensor that is read, by the file's name: part, space, diffusers' name.

    Text towers of open_clip keep their names. ValueError names a tensor that nobody knows.
    """
    unknown = [
        name
        for name in shapes
        if not _IGNORED.fullmatch(name)
        and not name.startswith((ldm_keys.UNET, ldm_keys.VAE, ldm_keys.CLIP, ldm_keys.OPEN_CLIP))
    ]
    if unknown:
        raise ValueError(f"tensor {shown(min(unknown))} is nothing that SD 1.x and 2.x have")
    names = {name: f"buffer {name}" for name in ("betas", "scale_factor") if name in shapes}
    for part, prefix, rename in (
        ("unet", ldm_keys.UNET, ldm_keys.unet_from_ldm),
        ("vae", ldm_keys.VAE, ldm_keys.vae_from_ldm),
        ("clip", ldm_keys.CLIP, ldm_keys.clip_from_ldm),
        ("open_clip", ldm_keys.OPEN_CLIP, lambda names: {name: name for name in names}),
    ):
        there = [
            name.removeprefix(prefix)
            for name in shapes
            if name.startswith(prefix) and not _IGNORED.fullmatch(name)
        ]
        for ldm, theirs in rename(there).items():
            names[prefix + ldm] = f"{part} {theirs}"
    if ema:
        names = {_ema_name(name): theirs for name, theirs in names.items()}
        missing = [name for name in names if name not in shapes]
        if missing:
            raise ValueError(f"ema=True, but it holds no {shown(missing[0])}")
    return names


def _ema_name(name: str) -> str:
    """LitEma's name of a parameter: without dots (ldm/modules/ema.py). Only the UNet has any."""
    bare = name.removeprefix(ldm_keys.UNET)
    return name if bare == name else _EMA + bare.replace(".", "")


def _configurations(
    config: str | Path | None, metadata: Mapping[str, str]
) -> tuple[Configurations | None, dict[str, dict[str, Any]] | None, dict[str, str] | None]:
    """Configurations that are known whole, what an LDM description says, tokenizer: what there is.

    `config` goes before our own metadata.
    """
    if config is None:
        if OURS not in metadata:
            return None, None, None
        whole, tokenizer = unpack(metadata[OURS])
        return whole, None, tokenizer
    config = Path(config)
    if config.is_file():
        return None, load_description(config), None
    if not config.is_dir():
        raise ValueError(
            f"config={str(config)!r} must be an LDM YAML file or a diffusers folder that is there"
        )
    whole = Configurations(
        unet=load_json(config / "unet" / "config.json"),
        vae=load_json(config / "vae" / "config.json"),
        text_encoder=load_json(config / "text_encoder" / "config.json"),
        scheduler=load_json(config / "scheduler" / "scheduler_config.json"),
    )
    files = [config / "tokenizer" / name for name in TOKENIZER_FILES]
    tokenizer = {file.name: file.read_text(encoding="utf-8") for file in files if file.is_file()}
    return whole, None, tokenizer or None


def _layers(
    parts: Mapping[str, Mapping[str, Tensor]],
    whole: Configurations | None,
    described: Mapping[str, Mapping[str, Any]] | None,
) -> int:
    """How many of an open_clip tower's blocks are in use: of SD 2.x's, all 24 but the last."""
    if whole is not None and isinstance(whole.text_encoder.get("num_hidden_layers"), int):
        return whole.text_encoder["num_hidden_layers"]
    there = ldm_keys.count(parts["open_clip"], "transformer.resblocks.")
    if described is not None:
        penultimate = described["text_encoder"]["layer"] == "penultimate"
    else:
        penultimate = there == loaders.SD2_TOWER["num_hidden_layers"] + 1
    return there - penultimate


def _to_ldm(
    single_file: SingleFile, dtype: torch.dtype | None, *, open_clip: bool
) -> dict[str, Tensor]:
    """All tensors of the file under its names."""
    tensors = {}
    for ours, theirs in ldm_keys.unet_to_ldm(single_file.unet).items():
        tensors[ldm_keys.UNET + theirs] = single_file.unet[ours]
    for ours, theirs in ldm_keys.vae_to_ldm(single_file.vae).items():
        tensor = single_file.vae[ours]
        convolution = ldm_keys.is_vae_convolution(ours)
        tensors[ldm_keys.VAE + theirs] = tensor[:, :, None, None] if convolution else tensor
    if open_clip:
        tower = _whole_tower(from_transformers(single_file.text_encoder))
        tensors |= {ldm_keys.OPEN_CLIP + name: tensor for name, tensor in tower.items()}
    else:
        for ours, theirs in ldm_keys.clip_from_ldm(single_file.text_encoder).items():
            tensors[ldm_keys.CLIP + theirs] = single_file.text_encoder[ours]
    tensors = {
        name: tensor.detach().to(device="cpu", dtype=dtype) for name, tensor in tensors.items()
    }
    # Empty, as ComfyUI writes the one for every v model (model_base.py); A1111 reads the other.
    for name, there in (
        ("v_pred", single_file.scheduler_config["prediction_type"] == "v_prediction"),
        ("ztsnr", single_file.scheduler_config.get("rescale_betas_zero_snr")),
    ):
        if there:
            tensors[name] = torch.empty(0)
    return tensors


def _whole_tower(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """SD 2.x's text tower with the last layer and the projection, which are there but not in use.

    Tools build all 24 layers and stop before the last. The one before stands in for it, as with
    kohya's trainer.
    """
    unused = loaders.SD2_TOWER["num_hidden_layers"]
    last, extra = f"transformer.resblocks.{unused - 1}.", f"transformer.resblocks.{unused}."
    for name in [name for name in tensors if name.startswith(last)]:
        tensors[extra + name.removeprefix(last)] = tensors[name].clone()
    like = tensors["token_embedding.weight"]
    tensors["text_projection"] = torch.eye(like.shape[1], dtype=like.dtype)
    tensors["logit_scale"] = torch.ones((), dtype=like.dtype)
    return tensors


def _is_epsilon(scheduler: Mapping[str, Any]) -> bool:
    """Whether it is what every tool takes for granted: SD's betas and noise to predict."""
    expected = {**loaders.SD_BETAS, "prediction_type": "epsilon", "use_flow_sigmas": False}
    return not loaders.differences(scheduler, expected)


def _take(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """Take the tensors whose names begin with `part` out, without it."""
    names = [name for name in tensors if name.startswith(part)]
    return {name.removeprefix(part): tensors.pop(name) for name in names}
