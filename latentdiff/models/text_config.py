"""Read the configurations and tokenizer of CLIP's towers from files that are not trusted.

Only the keys of `config.json` that are listed here reach transformers, each checked: other keys
make it run code (attention kernels from the Hub, quantizers) or take memory.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from transformers import CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig
from transformers.tokenization_utils_base import LARGE_INTEGER

from latentdiff.formats.header import short_repr
from latentdiff.models.clip_text import ACTIVATIONS

# Far above every published tower; under these even an absurd one is built, empty, in a second.
_MAX_SIZES = {
    "vocab_size": 2**24,
    "hidden_size": 2**15,
    "intermediate_size": 2**17,
    "projection_dim": 2**15,
    "num_hidden_layers": 2**8,
    "num_attention_heads": 2**10,
    "max_position_embeddings": 2**16,
}
_MAX_SIZES_IMAGE = {
    **{key: _MAX_SIZES[key] for key in ("hidden_size", "intermediate_size", "projection_dim")},
    **{key: _MAX_SIZES[key] for key in ("num_hidden_layers", "num_attention_heads")},
    "image_size": 2**13,
    "patch_size": 2**10,
}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DIVIDED = ("hidden_size", "num_attention_heads")
_TILED = ("image_size", "patch_size")
_NUMBERS = ("layer_norm_eps", "attention_dropout", "initializer_range", "initializer_factor")

Tower = Literal["text", "image"]


def tower_config(values: Mapping[str, Any]) -> CLIPTextConfig:
    """The configuration of a CLIP text tower, from the keys of a `config.json`.

    The config of a complete CLIP (`model_type` "clip") has the tower's keys under `text_config`.
    Keys that the tower does not compute with are ignored. Raises ValueError, naming key and value,
    for another kind of model, and for values of a wrong type or out of range.
    """
    kind = values.get("model_type", "clip_text_model")
    if kind == "clip" and isinstance(values.get("text_config"), dict):
        values = values["text_config"]
    elif kind != "clip_text_model":
        raise ValueError(
            f"the text encoder has model_type={short_repr(kind)}; only clip_text_model is supported"
        )
    for key in _TOKENS:
        value = values.get(key, 0)
        if value is None and key != "eos_token_id":  # which alone the tower looks for
            continue
        if not (type(value) is int and 0 <= value < _MAX_SIZES["vocab_size"]):
            raise _refused(
                key, value, f"a token's number, from 0 to {_MAX_SIZES['vocab_size'] - 1}"
            )
    known = _checked_keys(values, _MAX_SIZES, CLIPTextConfig, of="text")
    known |= {key: values[key] for key in _TOKENS if values.get(key) is not None}
    return CLIPTextConfig(**known)


def image_config(values: Mapping[str, Any]) -> CLIPVisionConfig:
    """The configuration of the image tower of a CLIP, from the keys of `vision_config`.

    Raises ValueError, naming key and value, as `tower_config` does.
    """
    if values.get("num_channels", 3) != 3:
        raise _refused("num_channels", values["num_channels"], "3: red, green and blue", of="image")
    known = _checked_keys(values, _MAX_SIZES_IMAGE, CLIPVisionConfig, of="image")
    side, patch = (known.get(key, getattr(CLIPVisionConfig, key)) for key in _TILED)
    if side % patch:
        raise ValueError(f"image_size={side} must be divisible by patch_size={patch}")
    return CLIPVisionConfig(**known)


def load_tokenizer(folder: Path, config: CLIPTextConfig) -> CLIPTokenizer:
    """Read a CLIPTokenizer for the tower of this configuration.

    One without a limit has the tower's, `max_position_embeddings`. Raises ValueError when the files
    are not a tokenizer's, and as `check_tokenizer` does.
    """
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers has no class of its own for what it cannot read
        raise ValueError(f"{folder} holds no CLIP tokenizer ({short_repr(str(error))})") from error
    length = tokenizer.model_max_length
    # transformers' word for a tokenizer without a limit is 1e30, also where its file says nothing.
    if type(length) in (int, float) and length > LARGE_INTEGER:
        tokenizer.model_max_length = config.max_position_embeddings
    check_tokenizer(tokenizer, config, where=str(folder))
    return tokenizer


def check_tokenizer(tokenizer: CLIPTokenizer, config: CLIPTextConfig, *, where: str) -> None:
    """Raise ValueError for a tokenizer that does not fit the tower; `where` it is from begins it.

    It must not have tokens that the tower does not have, nor let a prompt be longer than the
    tower's positions.
    """
    length, positions = tokenizer.model_max_length, config.max_position_embeddings
    if type(length) is not int or not 3 <= length <= positions:
        raise ValueError(
            f"{where}: model_max_length={short_repr(length)} must be from 3 to the text encoder's "
            f"max_position_embeddings={positions}"
        )
    vocabulary = tokenizer.get_vocab()
    largest = max(vocabulary.values())
    if largest >= config.vocab_size:
        raise ValueError(
            f"{where}: token {largest} is beyond the text encoder's vocab_size={config.vocab_size}"
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(tokenizer, name) is None:
            raise ValueError(f"{where}: the tokenizer has no {name.removesuffix('_id')}")
    unknown = (
        tokenizer.backend_tokenizer.model.unk_token
    )  # the tokenizer raises at text that needs it
    if unknown is not None and unknown not in vocabulary:
        raise ValueError(f"{where}: unk_token={short_repr(unknown)} is not in the vocabulary")


def _checked_keys(
    values: Mapping[str, Any], sizes: Mapping[str, int], kind: type[Any], *, of: Tower
) -> dict[str, Any]:
    """The keys that a tower computes with, checked; `sizes` has the bounds of integers."""
    for key, most in sizes.items():
        value = values.get(key, 1)
        if key == "projection_dim" and value is None:  # of what comes behind the tower
            continue
        if not (type(value) is int and 1 <= value <= most):
            raise _refused(key, value, f"a whole number from 1 to {most}", of=of)
    for key in _NUMBERS:
        value = values.get(key, 0)
        if not (type(value) in (int, float) and 0 <= value <= 1000):  # nor is NaN
            raise _refused(key, value, "a number from 0 to 1000", of=of)
    activation = values.get("hidden_act", "gelu")
    if not (isinstance(activation, str) and activation in ACTIVATIONS):
        raise _refused("hidden_act", activation, "one of " + ", ".join(ACTIVATIONS), of=of)
    keys = (*sizes, *_NUMBERS, "hidden_act")
    known = {key: values[key] for key in keys if key in values}
    known |= {key: float(known[key]) for key in _NUMBERS if key in known}  # transformers asks
    width, heads = (known.get(key, getattr(kind, key)) for key in _DIVIDED)
    if width % heads:
        raise ValueError(f"hidden_size={width} must be divisible by num_attention_heads={heads}")
    return known


def _refused(key: str, value: object, allowed: str, *, of: Tower = "text") -> ValueError:
    return ValueError(f"{key}={short_repr(value)} of the {of} encoder must be {allowed}")
