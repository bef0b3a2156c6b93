"""Read and check configurations: what the dataclasses of UNet, VAE and DiT have in common.

network_folder.py reads and writes the files.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from latentdiff.formats.header import name_repr, short_repr

T = TypeVar("T")
# Far from any model; building the most layers that are allowed takes three seconds.
MAX_WIDTH = 2**16
MAX_LEVELS = 8
MAX_LAYERS = 12
MAX_TRANSFORMERS = 256
# What diffusers' EMAModel writes into the config of the averaged network that it saves.
_EMA_KEYS = {
    *("decay", "min_decay", "inv_gamma", "power"),
    *("optimization_step", "update_after_step", "use_ema_warmup"),
}


def config_from_dict(
    cls: type[T], values: dict[str, Any], *, fixed: dict[str, Any], absent: dict[str, Any]
) -> T:
    """Build the dataclass `cls` from a diffusers configuration.

    `fixed` holds the keys that have one supported value, `absent` diffusers' defaults of missing
    keys where they differ from ours. Raises ValueError naming key and value
    for a fixed key with another value and for unknown keys, unless these are off (null or false).
    """
    names = {field.name for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    known = {name: value for name, value in absent.items() if name not in values}
    for key, value in values.items():
        if key in names:
            known[key] = value
        elif key in fixed:
            if not means(value, fixed[key]):
                raise ValueError(
                    f"{key}={short_repr(value)} is not supported, only {short_repr(fixed[key])}"
                )
        elif not (key.startswith("_") or key in _EMA_KEYS or value is None or value is False):
            raise ValueError(f"unknown configuration key {name_repr(key)}={short_repr(value)}")
    return cls(**known)


def means(value: Any, expected: Any) -> bool:
    """Whether a value of a configuration file is to diffusers what the expected one is.

    Null, false and 0 are all off, "swish" is another word for "silu", and a list may repeat the
    value for each block.
    """
    if isinstance(expected, (list, tuple)):
        return isinstance(value, (list, tuple)) and list(value) == list(expected)
    repeats = isinstance(value, list) and value and not isinstance(expected, str)
    off = expected is None or expected is False
    return all(
        one in (None, False) if off else one == expected or (one, expected) == ("swish", "silu")
        for one in (value if repeats else [value])
    )


def one_number(value: Any, count: int) -> Any:
    """The number that a list repeats `count` times, as diffusers takes it; or else the value."""
    repeats = isinstance(value, list) and len(value) == count > 0
    same = repeats and all(type(one) is int and one == value[0] for one in value)
    return value[0] if same else value


def check_types(config: Any) -> None:
    """Raise ValueError, naming key and value, unless every field holds what its annotation says.

    JSON gives lists for tuples and whole numbers for floats; a bool is never a number here.
    diffusers takes a list, one number a block, where some of our fields have one number; SD 1.x and
    2.x have none.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not _fits(value, hint):
            raise ValueError(f"{name}={short_repr(value)} must be {_words(hint)}")


def check_range(config: Any, least: float, most: float, *names: str) -> None:
    """Raise ValueError, naming key and value, unless these keys are from `least` to `most`.

    A value may be None, or a list whose items are all checked. The limits are far from any model:
    they keep a hostile file from filling the memory with layers.
    """
    for name in names:
        value = getattr(config, name)
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if not all(number is None or least <= number <= most for number in numbers):
            raise ValueError(f"{name}={short_repr(value)} must be from {least} to {most}")


def check_levels(config: Any, *, transformer_layers: int = 1) -> None:
    """Raise ValueError, naming key and value, unless the levels of a network can be built."""
    check_range(config, 1, MAX_WIDTH, "block_out_channels", "norm_num_groups")
    check_range(config, 1, MAX_LAYERS, "layers_per_block")
    channels, groups = config.block_out_channels, config.norm_num_groups
    if not 1 <= len(channels) <= MAX_LEVELS:
        raise ValueError(
            f"block_out_channels={short_repr(channels)} must be 1 to {MAX_LEVELS} numbers"
        )
    if any(width % groups for width in channels):
        raise ValueError(
            f"block_out_channels={list(channels)}: each must be a multiple of "
            f"norm_num_groups={groups}"
        )
    layers = len(channels) * config.layers_per_block * transformer_layers
    if layers > MAX_TRANSFORMERS:
        raise ValueError(
            f"layers_per_block={config.layers_per_block} makes {layers} transformer layers in "
            f"{len(channels)} blocks; allowed are {MAX_TRANSFORMERS}"
        )


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Sequence:
        (item,) = get_args(hint)
        return isinstance(value, (list, tuple)) and all(_fits(one, item) for one in value)
    if get_origin(hint) is Literal:
        return type(value) is str and value in get_args(hint)
    if get_args(hint):  # a union
        return any(_fits(value, one) for one in get_args(hint))
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint


def _words(hint: Any) -> str:
    if get_origin(hint) is Sequence:
        return f"a list in which each is {_words(get_args(hint)[0])}"
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_args(hint):
        return " or ".join(map(_words, get_args(hint)))
    return _WORDS[hint]


_WORDS = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "a text",
    type(None): "null",
}
