"""open_clip's text towers: their tensor names, configs and weights for transformers.

The names are those of open_clip's `TextTransformer`, which single files of SD 2.x hold too.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.formats.clip_tokenizer import VOCAB_SIZE
from latentdiff.formats.header import pickle_message
from latentdiff.formats.ldm.keys import TEXT_MODEL

_ENDS = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_BLOCK = {
    f"{theirs}.{kind}": f"{ours}.{kind}"
    for theirs, ours in {
        "ln_1": "layer_norm1",
        "attn.out_proj": "self_attn.out_proj",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }.items()
    for kind in ("weight", "bias")
}
_PROJECTION = "text_projection"  # of the pooled state; the name in CLIPTextModelWithProjection too
_BLOCK_NAME = re.compile(r"transformer\.resblocks\.(0|[1-9][0-9]{0,3})\.(.+)")
_LAYER_NAME = re.compile(r"encoder\.layers\.(0|[1-9][0-9]{0,3})\.(.+)")

# What a file may hold beside the text tower: the rest of the CLIP, and a mask in old files.
_BESIDE = ("visual.", "logit_scale", "logit_bias", "attn_mask")

# Fields of open_clip's CLIPTextCfg that a CLIPTextConfig can express, and those of the projection,
# which a CLIPTextModel does not have. Every other field must have open_clip's default.
_EXPRESSIBLE = {
    "context_length",
    "width",
    "heads",
    "layers",
    "mlp_ratio",
    "act_kwargs",
    "norm_kwargs",
}
_EXPRESSIBLE |= {"proj_bias", "proj_type", "output_tokens"}


def to_transformers(
    tensors: Mapping[str, Tensor], *, layers: int | None = None
) -> dict[str, Tensor]:
    """Rename the tensors of an open_clip text tower to the names of a CLIPTextModel.

    Tensors of an image tower are ignored, and names may begin with `text.`. `text_projection`, if
    it exists, becomes `text_projection.weight`, a name of CLIPTextModelWithProjection; all others
    begin with `text_model.`. layers: how many blocks to keep, from the first, before the final
    norm; SD 2.x keeps 23 of 24. Raises ValueError for a name without a counterpart in a
    CLIPTextModel, and when `layers` is not from 1 to the number of blocks.
    """
    names = {name: without_prefix(name) for name in tensors}
    blocks = {int(match[1]) for name in names.values() if (match := _BLOCK_NAME.fullmatch(name))}
    if layers is not None and not 1 <= layers <= len(blocks):
        raise ValueError(f"layers={layers} must be from 1 to {len(blocks)}, all that there are")
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        bare = names[name]
        if bare.startswith(_BESIDE):
            continue
        if match := _BLOCK_NAME.fullmatch(bare):
            if layers is not None and int(match[1]) >= layers:
                continue
            new = _split_block(match[1], match[2], name, tensor)
        elif bare in _ENDS:
            new = {TEXT_MODEL + _ENDS[bare]: tensor}
        elif bare == _PROJECTION and tensor.ndim == 2:
            new = {f"{_PROJECTION}.weight": tensor.T}
        else:
            raise _no_counterpart(name, tensor)
        if not found.keys().isdisjoint(new):
            raise ValueError(f"{bare} is there twice, with `text.` and without")
        found |= new
    return found


def from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a CLIPTextModel, with `text_model.` or without, to open_clip's names.

    Raises ValueError for a name that no CLIPTextModel has, and for a layer without q, k or v.
    """
    ends = {ours: theirs for theirs, ours in _ENDS.items()}
    block = {ours: theirs for theirs, ours in _BLOCK.items()}
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}  # of what open_clip keeps in one: q, k and v
    for name, tensor in tensors.items():
        bare = name.removeprefix(TEXT_MODEL)
        match = _LAYER_NAME.fullmatch(bare)
        if match and match[2] in block:
            found[f"transformer.resblocks.{match[1]}.{block[match[2]]}"] = tensor
        elif match and (part := re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", match[2])):
            joined = f"transformer.resblocks.{match[1]}.attn.in_proj_{part[2]}"
            parts.setdefault(joined, {})[part[1]] = tensor
        elif bare in ends:
            found[ends[bare]] = tensor
        elif bare == f"{_PROJECTION}.weight" and tensor.ndim == 2:
            found[_PROJECTION] = tensor.T
        elif bare != "embeddings.position_ids":  # 0, 1, 2 …, which old files hold
            raise _no_counterpart(name, tensor)
    for joined, qkv in parts.items():
        if len(qkv) < 3:
            raise ValueError(f"{joined} needs q, k and v; there is only {', '.join(sorted(qkv))}")
        found[joined] = torch.cat([qkv["q"], qkv["k"], qkv["v"]])
    return found


def without_prefix(name: str) -> str:
    """Remove the prefix `text.` that names have in open_clip's CustomTextCLIP."""
    return name.removeprefix("text.")


def beside(name: str, *, layers: int | None) -> bool:
    """Whether a file may hold this tensor though a tower of `layers` blocks does not need it."""
    match = _BLOCK_NAME.fullmatch(name)
    dropped = match is not None and layers is not None and int(match[1]) >= layers
    return dropped or name.startswith((*_BESIDE, _PROJECTION))


def text_config(name: str, *, layers: int | None = None) -> dict[str, Any]:
    """The keys of a CLIPTextConfig for the text tower of an open_clip model, such as "ViT-H-14".

    layers: how many of its blocks are kept. Raises ValueError for a name that open_clip does not
    know, and for a tower that a CLIPTextModel cannot express, naming the field.
    """
    import open_clip

    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3)
        raise ValueError(
            f"open_clip has no model {name!r}" + (f"; near it: {', '.join(near)}" if near else "")
        )
    model = open_clip.get_model_config(name)
    assert model is not None
    tower = open_clip.CLIPTextCfg(**model["text_cfg"])
    default_tower = open_clip.CLIPTextCfg()
    for field in dataclasses.fields(tower):
        value, default = getattr(tower, field.name), getattr(default_tower, field.name)
        if field.name not in _EXPRESSIBLE and value != default:
            raise _cannot(name, field.name, value, f"only {default!r}")
    activation = _activation(model, tower.act_kwargs)
    if activation is None:
        raise _cannot(name, "act_kwargs", tower.act_kwargs, "only {'approximate': 'tanh'}")
    norm = tower.norm_kwargs or {}
    if not norm.keys() <= {"eps"}:
        raise _cannot(name, "norm_kwargs", norm, "only eps")
    if layers is not None and not 1 <= layers <= tower.layers:
        raise ValueError(f"layers={layers} must be from 1 to {tower.layers}, all that {name} has")
    return {
        "vocab_size": tower.vocab_size,
        "hidden_size": tower.width,
        "intermediate_size": int(tower.width * tower.mlp_ratio),
        "projection_dim": model["embed_dim"],
        "num_hidden_layers": tower.layers if layers is None else layers,
        "num_attention_heads": tower.heads,
        "max_position_embeddings": tower.context_length,
        "hidden_act": activation,
        "layer_norm_eps": norm.get("eps", 1e-5),
        "bos_token_id": VOCAB_SIZE - 2,
        "eos_token_id": VOCAB_SIZE - 1,
        "pad_token_id": tower.pad_id,
    }


def find_weights(name: str, weights: Path | str) -> Path:
    """Find the safetensors file of `weights`: a path, or a tag of open_clip's such as "openai".

    The file of a tag is fetched from the Hugging Face Hub, or taken from its cache when offline;
    not by open_clip, which would fetch a pickle where there is nothing else. Raises ValueError for
    a tag that `name` does not have, that has another activation or only a pickle, and when the
    file is neither in the cache nor reachable.
    """
    if isinstance(weights, Path) or Path(weights).suffix or Path(weights).is_file():
        return Path(weights)
    import open_clip
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    tag = open_clip.get_pretrained_cfg(name, weights)
    if not tag:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ValueError(f"weights={weights!r} is no file and no tag of {name}; its tags: {tags}")
    quick = bool(tag.get("quick_gelu"))
    if quick != (text_config(name)["hidden_act"] == "quick_gelu"):
        other = f"{name}-quickgelu" if quick else name.removesuffix("-quickgelu")
        raise ValueError(
            f"the weights {weights!r} were trained with {'quick_gelu' if quick else 'gelu'}, "
            f"which {name} has not; the model with it is {other}"
        )
    repository, _, file = tag.get("hf_hub", "").rpartition("/")
    if not repository:
        raise ValueError(pickle_message(Path(tag["url"])))
    safe = Path(file).with_suffix(".safetensors").name if file else "open_clip_model.safetensors"
    try:
        return Path(hf_hub_download(repository, safe, library_name="latentdiff"))
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{repository} on the Hugging Face Hub is out of reach, and {safe} is not in the cache"
        ) from error
    except EntryNotFoundError as error:
        raise ValueError(
            pickle_message(Path(repository) / (file or "open_clip_pytorch_model.bin"))
        ) from error
    except HfHubHTTPError as error:
        raise ValueError(f"{repository}: the Hugging Face Hub refuses it ({error})") from error


def _split_block(block: str, name: str, whole: str, tensor: Tensor) -> dict[str, Tensor]:
    layer = f"{TEXT_MODEL}encoder.layers.{block}"
    if name in _BLOCK:
        return {f"{layer}.{_BLOCK[name]}": tensor}
    if name not in ("attn.in_proj_weight", "attn.in_proj_bias"):
        raise _no_counterpart(whole, tensor)
    if tensor.ndim == 0 or len(tensor) % 3:
        raise ValueError(f"{whole} of shape {tuple(tensor.shape)} must hold q, k and v")
    kind = name.removeprefix("attn.in_proj_")
    # Copies: views of one tensor would keep all three in memory, and share their values.
    return {
        f"{layer}.self_attn.{part}_proj.{kind}": third.clone()
        for part, third in zip("qkv", tensor.chunk(3), strict=True)
    }


def _activation(model: Mapping[str, Any], options: Mapping[str, Any] | None) -> str | None:
    if not options:
        return "quick_gelu" if model.get("quick_gelu") else "gelu"
    return "gelu_pytorch_tanh" if dict(options) == {"approximate": "tanh"} else None


def _cannot(name: str, field: str, value: Any, allowed: str) -> ValueError:
    return ValueError(
        f"the text tower of {name} has {field}={value!r}, which a CLIPTextModel cannot express; "
        f"{allowed}"
    )


def _no_counterpart(name: str, tensor: Tensor) -> ValueError:
    return ValueError(
        f"{name[:120]!r} of shape {tuple(tensor.shape)} has no place in a CLIP text tower"
    )
