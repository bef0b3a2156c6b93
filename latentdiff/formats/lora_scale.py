"""The alphas of a LoRA whose tensors do not hold them: peft's configuration of the adapter.

diffusers writes it into the file's metadata, peft itself into adapter_config.json beside the file.
The layers, their ranks and their widths are the tensors' own; but a LoKr of two whole matrices
shows no rank, by which peft divides all the same.
"""

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from latentdiff.formats.header import parse_json, short_repr
from latentdiff.formats.ldm.keys import TEXT_MODEL
from latentdiff.formats.lora_layers import MAX_RANK
from latentdiff.formats.lora_names import COMPONENTS, is_pefts_own
from latentdiff.formats.weights import load_json

MAX_ALPHA = 1e6

METADATA = "lora_adapter_metadata"
_PEFTS_FILE, _PEFTS_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# What a configuration of peft means where it does not say it; alpha is `alpha` of LoHa and LoKr.
_DEFAULTS = {"lora_alpha": 8, "alpha": 8, "r": 8}
_TENSORS = {"LORA": "lora", "LOHA": ".hada_", "LOKR": ".lokr_"}  # a part of a kind's names
# Keys with which a layer computes something else than W x + scale · up (down x).
_OTHER_COMPUTATIONS = ("lora_bias", "use_qalora", "use_bdlora", "layer_replication")
_OTHER_COMPUTATIONS += ("alora_invocation_tokens", "arrow_config", "kasa_config")
# Starts that leave the model's weights as they are; PiSSA, OLoRA, LoftQ, CorDA and LoRA-GA subtract
# theirs from them, so that what was trained fits the difference alone.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def adapter_configs(
    path: Path, metadata: Mapping[str, str], names: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """The configuration by which each component's alphas follow, checked; {} if there is none.

    `names` are those of the file's tensors. Raises ValueError for a configuration that makes no
    sense, or under which layers compute something that is not read. Warns where peft wrote the file
    and its configuration is not there.
    """
    names = list(names)
    if METADATA in metadata:
        content = _parsed(path, metadata[METADATA])
        return {component: _of(path, content, component, names) for component in COMPONENTS}
    if path.name != _PEFTS_FILE and not any(map(is_pefts_own, names)):
        return {component: {} for component in COMPONENTS}
    beside = path.with_name(_PEFTS_CONFIG)
    if beside.is_file():
        config = _DEFAULTS | load_json(beside)
        _check(beside, config, names)
        return dict.fromkeys(COMPONENTS, config)
    if not any(name.endswith(".alpha") for name in names):
        warnings.warn(
            f"{path}: no {_PEFTS_CONFIG} lies beside it, in which peft writes the alpha; each "
            "layer's rank was assumed, as if the scale were 1",
            stacklevel=2,
        )
    return {component: {} for component in COMPONENTS}


def configured_alpha(config: Mapping[str, Any], component: str, layer: str, *, rank: int) -> float:
    """Alpha by peft's configuration; without one it is the rank, so that the scale is 1."""
    key = "lora_alpha" if config.get("peft_type", "LORA") == "LORA" else "alpha"
    alpha = _by_layer(config, "alpha_pattern", component, layer, config.get(key, rank))
    # Rank-stabilised LoRA (Kalajdzievski 2023) divides by √r where all others divide by r.
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def configured_rank(config: Mapping[str, Any], component: str, layer: str) -> int:
    """The rank by peft's configuration; 1 without one."""
    return _by_layer(config, "rank_pattern", component, layer, config.get("r", 1))


def _by_layer(
    config: Mapping[str, Any], pattern: str, component: str, layer: str, default: Any
) -> Any:
    for key, value in (config.get(pattern) or {}).items():
        name = key.removeprefix("^").removeprefix(f"{component}.").removeprefix(TEXT_MODEL)
        if layer == name or (layer.endswith(f".{name}") and not key.startswith("^")):
            return value
    return default


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        content = parse_json(text.encode())
    except ValueError as error:
        raise ValueError(f"{path}: {METADATA} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: {METADATA} is {short_repr(content)}, not an object")
    return content


def _of(path: Path, content: Mapping[str, Any], component: str, names: list[str]) -> dict[str, Any]:
    """A component's configuration in diffusers' metadata, checked."""
    prefix = f"{component}."
    config = {k.removeprefix(prefix): v for k, v in content.items() if k.startswith(prefix)}
    _check(path, config, names, prefix)
    return config


def _check(path: Path, config: Mapping[str, Any], names: list[str], prefix: str = "") -> None:
    """Raise ValueError, naming the key, unless alphas follow from a configuration."""
    for key in _OTHER_COMPUTATIONS:
        if config.get(key):
            raise ValueError(
                f"{path}: {prefix}{key}={short_repr(config[key])} is not read, only false"
            )
    kind, start = config.get("peft_type", "LORA"), config.get("init_lora_weights")
    if kind not in list(_TENSORS):  # it may be anything
        raise ValueError(
            f"{path}: {prefix}peft_type={short_repr(kind)} is not read, only {', '.join(_TENSORS)}"
        )
    if not any(_TENSORS[kind] in name for name in names):
        raise ValueError(
            f"{path}: {prefix}peft_type={short_repr(kind)} is not that of the tensors, first "
            f"{short_repr(min(names))}"
        )
    if start not in _PLAIN_STARTS:
        raise ValueError(
            f"{path}: {prefix}init_lora_weights={short_repr(start)} is not read: it changes the "
            "weights of the model that the LoRA is for; peft's save_pretrained makes a plain LoRA "
            "of it, with path_initial_model_for_weight_conversion"
        )
    if kind == "LOKR":
        for rank in _values(path, config, f"{prefix}rank_pattern", config.get("r", 1)):
            if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
                raise ValueError(
                    f"{path}: {prefix}r or rank_pattern has rank {short_repr(rank)}, not a whole "
                    f"number from 1 to {MAX_RANK}"
                )
    key = "lora_alpha" if kind == "LORA" else "alpha"
    for alpha in _values(path, config, f"{prefix}alpha_pattern", config.get(key, 1)):
        number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not (number and abs(alpha) <= MAX_ALPHA):
            raise ValueError(
                f"{path}: {prefix}{key} or alpha_pattern has alpha {short_repr(alpha)}, not a "
                f"number within ±{MAX_ALPHA:g}"
            )


def _values(path: Path, config: Mapping[str, Any], name: str, default: Any) -> list[Any]:
    """The default and all values of a pattern. Raises ValueError for keys that name no layer."""
    patterns = config.get(name.rpartition(".")[2]) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{path}: {name} is {short_repr(patterns)}, not an object")
    for key in patterns:
        # peft uses them as regular expressions, and a file could hold one that never ends.
        if re.fullmatch(r"\^?[\w.]+", key) is None:
            raise ValueError(f"{path}: {name} names {short_repr(key)}, not a layer")
    return [default, *patterns.values()]
