"""A model in one safetensors file, as A1111 and ComfyUI keep them, both ways.

Weights have LDM's names in it. Other tools' files do not hold the configs, which each tool infers;
our files hold them too, in their metadata, and are read back exactly.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.formats.header import Header, read_header, short_repr
from latentdiff.formats.ldm import compatibility
from latentdiff.formats.ldm import keys as ldm_keys
from latentdiff.formats.ldm.given_configs import GivenConfigs, given_configs
from latentdiff.formats.ldm.inferred_config import (
    V_BIAS,
    CheckpointInfo,
    ModelConfigs,
    infer_configs,
    looks_like_v,
)
from latentdiff.formats.ldm.modelspec import (
    OUR_KEY,
    modelspec,
    pack_configs,
    tensor_hash,
)
from latentdiff.formats.ldm.shapes import Shapes, refuse_other_checkpoints
from latentdiff.formats.ldm.yaml_config import (
    load_ldm_config,
    save_ldm_config,
    to_ldm_config,
    unsupported_by_ldm,
)
from latentdiff.formats.open_clip import from_transformers, to_transformers
from latentdiff.formats.weights import load_safetensors, save_safetensors, to_write

_COMPONENTS = ("unet", "vae", "clip", "open_clip", "buffer")
EMA = "model_ema.diffusion_model"  # begins the names of a UNet's running averages
# Tensors that training leaves in a checkpoint and sampling does not need.
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
    """All of a model: weights and configs under diffusers' and transformers' names."""

    unet: dict[str, Tensor]
    vae: dict[str, Tensor]
    text_encoder: dict[str, Tensor]
    """Names begin with `text_model.`."""
    unet_config: dict[str, Any]
    vae_config: dict[str, Any]
    text_config: dict[str, Any]
    scheduler_config: dict[str, Any]
    tokenizer: dict[str, str] | None = None
    """The text of each of `TOKENIZER_FILES` that the model has; None if there is no tokenizer."""
    metadata: dict[str, str] = field(default_factory=dict)


def read_single_file(
    path: str | Path,
    *,
    config: str | Path | None = None,
    ema: bool = False,
    dtype: torch.dtype | None = None,
) -> SingleFile:
    """Read a checkpoint of SD 1.x or 2.x, or one of ours of any shape.

    The configs are inferred from the names and shapes of the tensors, never from the file's name.
    What those do not show comes from `config` (an LDM YAML file, or a diffusers folder with the
    model's configs), or else from our metadata, or else from a YAML file of the same name beside
    it; then from what other tools left in the file, and last from the conventions of SD. Where
    those are not sure, a warning says what was assumed.
    ema: take the averaged weights of the UNet, which some files hold beside the others.
    dtype: what weights become, one after another; None leaves them as they are.
    Raises ValueError for a file that is anything else, saying what it seems to be, and for one
    with an unknown tensor, naming it.
    """
    path = Path(path)
    header = read_header(path)
    refuse_other_checkpoints(path, header.shapes)
    weights = _read_weights(path, header, ema=ema, dtype=dtype)
    try:
        given = given_configs(path, config, header.metadata)
        text_encoder, configs, notes = _configs(header, weights, given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if given.configs is None and (notes := notes + _left_out(path, header.shapes)):
        warnings.warn(f"{path}: {'; '.join(notes)}", stacklevel=2)
    return SingleFile(
        unet=weights["unet"],
        vae=weights["vae"],
        text_encoder=text_encoder,
        unet_config=configs.unet,
        vae_config=configs.vae,
        text_config=configs.text_encoder,
        scheduler_config=configs.scheduler,
        tokenizer=given.tokenizer,
        metadata={key: value for key, value in header.metadata.items() if key != OUR_KEY},
    )


def read_single_file_configs(path: str | Path) -> ModelConfigs:
    """The configs of a file that `read_single_file` reads, by its header alone.

    Sizes are right; what only values of tensors show, whether it predicts v for one, may not be.
    Raises ValueError as `read_single_file` does.
    """
    path = Path(path)
    header = read_header(path)
    refuse_other_checkpoints(path, header.shapes)
    try:
        weights = _by_component(_expected(header, _names(header.shapes, ema=False)))
        weights["unet"].pop(V_BIAS, None)
        weights["buffer"] = {}
        return _configs(header, weights, given_configs(path, None, header.metadata))[1]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_single_file(
    model: SingleFile, path: str | Path, *, dtype: torch.dtype | None = None
) -> list[str]:
    """Write a model as one safetensors file; returns sentences on which tools load it.

    Where other tools cannot infer the model from its tensors and LDM can express it, its LDM config
    is written beside the file, with `.yaml` for `.safetensors`. The model's configs must have all
    keys, and only values that JSON has.
    dtype: what weights are converted to; None leaves them as they are.
    Raises ValueError if `path` does not end in `.safetensors`, for weights that are not finite or
    too large for `dtype`, and where that YAML file is there and is no LDM config; nothing is
    written then.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path={str(path)!r} must end in .safetensors")
    unet, vae, text = model.unet_config, model.vae_config, model.text_config
    scheduler = model.scheduler_config
    is_sd = compatibility.is_sd_shape(unet, vae, text)
    open_clip = not compatibility.differences(text, compatibility.SD2_TOWER)
    unsupported = unsupported_by_ldm(unet, vae, scheduler)
    is_default = is_sd and not unet["use_linear_projection"] and _is_epsilon(scheduler)
    yaml_path = path.with_suffix(".yaml")
    writes_yaml = not unsupported and not is_default
    if writes_yaml and yaml_path.exists():
        load_ldm_config(yaml_path)  # an older model's is replaced, but not what is none
    tensors = to_write(_to_ldm(model, open_clip=open_clip), path, dtype)
    configs = ModelConfigs(unet, vae, text, scheduler)
    metadata = {
        **modelspec(configs, model.metadata, title=path.stem, is_sd=is_sd),
        "modelspec.hash_sha256": tensor_hash(tensors),
        OUR_KEY: pack_configs(configs, model.tokenizer),
    }
    save_safetensors(tensors, path, metadata)
    if writes_yaml:
        save_ldm_config(to_ldm_config(unet, vae, text, scheduler, open_clip=open_clip), yaml_path)
    sentences = compatibility.describe_compatibility(
        unet,
        vae,
        text,
        scheduler,
        (model.tokenizer or {}).get("merges.txt"),
        looks_like_v=looks_like_v(model.unet, unet),
        yaml_name=yaml_path.name if writes_yaml else None,
        unsupported=unsupported,
    )
    if not writes_yaml and yaml_path.exists():
        sentences.append(f"A1111 reads {yaml_path.name}, which lies there and is of another model.")
    return sentences


def _left_out(path: Path, shapes: Shapes) -> list[str]:
    """A phrase on what is in a file of another tool's, or beside it, that would change images."""
    phrases = []
    if loras := [name for name in shapes if "lora_" in name]:
        phrases.append(
            f"a LoRA in it ({len(loras)} tensors, first {short_repr(min(loras))}) was left out"
        )
    for kind in ("safetensors", "pt", "ckpt"):  # modules/sd_vae.py of A1111
        if (vae := path.with_suffix(f".vae.{kind}")).is_file():
            phrases.append(f"A1111 takes {vae.name} beside it for its VAE; its own was read")
    return phrases


def _read_weights(
    path: Path, header: Header, *, ema: bool, dtype: torch.dtype | None
) -> dict[str, dict[str, Tensor]]:
    """The tensors of each of `_COMPONENTS` by the names that `_names` gives them."""
    try:
        names = _names(header.shapes, ema=ema)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    expected = _expected(header, names)
    tensors = load_safetensors(
        path,
        expected=expected,
        optional=lambda name: name not in expected,
        rename=lambda name: names.get(name, f"ignored {name}"),
        dtype=dtype,
    )
    return _by_component(tensors)


def _expected(header: Header, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors without their values, by the names that `_names` gives them."""
    return {
        ours: torch.empty(header.shapes[name], dtype=header.dtypes[name], device="meta")
        for name, ours in names.items()
    }


def _by_component(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each of `_COMPONENTS`, which are taken out of `tensors`."""
    weights: dict[str, dict[str, Tensor]] = {component: {} for component in _COMPONENTS}
    for ours in list(tensors):
        component, _, name = ours.partition(" ")
        weights[component][name] = tensors.pop(ours)
    for name, tensor in weights["vae"].items():
        if ldm_keys.is_vae_convolution(name) and tensor.ndim > 2:
            weights["vae"][name] = tensor.flatten(1)
    return weights


def _configs(
    header: Header, weights: Mapping[str, Mapping[str, Tensor]], given: GivenConfigs
) -> tuple[dict[str, Tensor], ModelConfigs, list[str]]:
    """The text tower by transformers' names, all configs, and what was assumed for them."""
    text_encoder = dict(weights["clip"])
    if not text_encoder:
        layers = _num_layers(weights["open_clip"], given.configs, given.ldm_config)
        text_encoder = to_transformers(weights["open_clip"], layers=layers)
    if given.configs is not None:
        return text_encoder, given.configs, []
    info = CheckpointInfo(
        unet=weights["unet"],
        vae=weights["vae"],
        text_encoder=text_encoder,
        open_clip=bool(weights["open_clip"]),
        names=header.shapes,
        buffers=weights["buffer"],
        metadata=header.metadata,
    )
    return text_encoder, *infer_configs(info, given.ldm_config, beside=given.beside)


def _names(shapes: Shapes, *, ema: bool) -> dict[str, str]:
    """Each name in the file that is read -> its component, a space, and diffusers' name.

    Tensors of an open_clip text tower keep their names. ValueError names an unknown tensor.
    """
    prefixes = (ldm_keys.UNET, ldm_keys.VAE, ldm_keys.CLIP, ldm_keys.OPEN_CLIP)
    read = [name for name in shapes if not _IGNORED.fullmatch(name)]
    unknown = [name for name in read if not name.startswith(prefixes)]
    if unknown:
        raise ValueError(f"tensor {short_repr(min(unknown))} is nothing that SD 1.x and 2.x have")
    names = {name: f"buffer {name}" for name in ("betas", "scale_factor") if name in shapes}
    for component, prefix, rename in (
        ("unet", ldm_keys.UNET, ldm_keys.unet_from_ldm),
        ("vae", ldm_keys.VAE, ldm_keys.vae_from_ldm),
        ("clip", ldm_keys.CLIP, ldm_keys.clip_from_ldm),
        ("open_clip", ldm_keys.OPEN_CLIP, lambda names: {name: name for name in names}),
    ):
        ldm_names = [name.removeprefix(prefix) for name in read if name.startswith(prefix)]
        for ldm_name, name in rename(ldm_names).items():
            names[prefix + ldm_name] = f"{component} {name}"
    if ema:
        names = {_ema_name(name): ours for name, ours in names.items()}
        missing = [name for name in names if name not in shapes]
        if missing:
            raise ValueError(f"ema=True, but it holds no {short_repr(missing[0])}")
    return names


def _ema_name(name: str) -> str:
    """LitEma's name of a UNet's parameter, without dots (ldm/modules/ema.py); or `name` itself."""
    bare = name.removeprefix(ldm_keys.UNET)
    return name if bare == name else EMA + bare.replace(".", "")


def _num_layers(
    open_clip: Mapping[str, Tensor],
    configs: ModelConfigs | None,
    ldm_config: Mapping[str, Mapping[str, Any]] | None,
) -> int:
    """How many layers of an open_clip tower are used: in SD 2.x, all 24 but the last."""
    if configs is not None and isinstance(configs.text_encoder.get("num_hidden_layers"), int):
        return configs.text_encoder["num_hidden_layers"]
    layers = ldm_keys.count(open_clip, "transformer.resblocks.")
    if ldm_config is not None:
        penultimate = ldm_config["text_encoder"]["layer"] == "penultimate"
    else:
        penultimate = layers == compatibility.SD2_TOWER["num_hidden_layers"] + 1
    return layers - penultimate


def _to_ldm(model: SingleFile, *, open_clip: bool) -> dict[str, Tensor]:
    """The tensors of the file that is written, under LDM's names."""
    tensors = {}
    for name, ldm_name in ldm_keys.unet_to_ldm(model.unet).items():
        tensors[ldm_keys.UNET + ldm_name] = model.unet[name]
    for name, ldm_name in ldm_keys.vae_to_ldm(model.vae).items():
        tensor = model.vae[name]
        convolution = ldm_keys.is_vae_convolution(name)
        tensors[ldm_keys.VAE + ldm_name] = tensor[:, :, None, None] if convolution else tensor
    if open_clip:
        tower = _with_unused_layer(from_transformers(model.text_encoder))
        tensors |= {ldm_keys.OPEN_CLIP + name: tensor for name, tensor in tower.items()}
    else:
        for name, ldm_name in ldm_keys.clip_from_ldm(model.text_encoder).items():
            tensors[ldm_keys.CLIP + ldm_name] = model.text_encoder[name]
    # Empty marks: ComfyUI writes v_pred for every v model (model_base.py), A1111 reads ztsnr.
    for name, applies in (
        ("v_pred", model.scheduler_config["prediction_type"] == "v_prediction"),
        ("ztsnr", model.scheduler_config.get("rescale_betas_zero_snr")),
    ):
        if applies:
            tensors[name] = torch.empty(0)
    return tensors


def _with_unused_layer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """SD 2.x's text tower with its last layer and projection, which files hold and nothing uses.

    Tools build all 24 layers and stop before the last. A copy of the layer before it fills its
    place, as in files of kohya's trainer.
    """
    unused = compatibility.SD2_TOWER["num_hidden_layers"]
    last, extra = f"transformer.resblocks.{unused - 1}.", f"transformer.resblocks.{unused}."
    for name in [name for name in tensors if name.startswith(last)]:
        tensors[extra + name.removeprefix(last)] = tensors[name].clone()
    embedding = tensors["token_embedding.weight"]
    tensors["text_projection"] = torch.eye(embedding.shape[1], dtype=embedding.dtype)
    tensors["logit_scale"] = torch.ones((), dtype=embedding.dtype)
    return tensors


def _is_epsilon(scheduler: Mapping[str, Any]) -> bool:
    """Whether it is what every tool assumes by default: SD's betas and noise prediction."""
    expected = {
        **compatibility.SD_BETAS,
        "prediction_type": "epsilon",
        "use_flow_sigmas": False,
    }
    return not compatibility.differences(scheduler, expected)
