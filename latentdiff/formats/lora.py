"""Read LoRA files (Hu et al. 2021) of diffusers, peft and kohya's trainer into one form.

Four namings of the same tensors are in use: peft's (`unet.….to_q.lora_A.weight`), diffusers' two
older ones (`….to_q.lora.down.weight`, `….processor.to_q_lora.down.weight`) and kohya's
(`lora_unet_…_to_q.lora_down.weight`). diffusers' own functions translate them into peft's.
models/lora.py applies what is read here to the networks.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from latentdiff.formats.header import Header, parse_json, read_header, short_repr
from latentdiff.formats.ldm.keys import TEXT_MODEL
from latentdiff.formats.weights import load_safetensors

MAX_RANK = 4096  # no weight of SD 1.x and 2.x has a rank above 1280
MAX_ALPHA = 1e6

COMPONENTS = ("unet", "text_encoder")
SDXL = ("lora_te2_", "text_encoder_2.")
KOHYA = ("lora_unet_", "lora_te_", "lora_te1_")
KOHYA_KINDS = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha"}
PEFT_KINDS = {"lora_A.weight": "down", "lora_B.weight": "up"}

_MARK = re.compile(r"[._]lora[._](?:A|B|down|up)\b|\.lora_(?:down|up)\.weight$")

Layer = tuple[str, str]
"""Component and layer, for example ("unet", "conv_in")."""


@dataclass(frozen=True)
class LoRALayer:
    """The change of one layer's weight, alpha / r · up · down.

    down is (r, in) and up (out, r); of a convolution (r, in, h, w) and (out, r, 1, 1).
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """r, the number of rows of `down`."""
        return self.down.shape[0]


@dataclass(frozen=True)
class LoRAFile:
    """The changes of a LoRA, by layer name; names in the text tower are without `text_model.`."""

    unet: dict[str, LoRALayer]
    text_encoder: dict[str, LoRALayer]


def read_lora(path: Path, *, layers_per_block: int) -> LoRAFile:
    """Read a LoRA file in any of the namings; `layers_per_block` is the UNet's, for LDM's names.

    Raises ValueError if the file is not safetensors, is damaged, or holds anything besides a LoRA
    for SD 1.x or 2.x (DoRA, LoHa, LoKr, biases, a second text encoder): nothing is ignored.
    Raises ModuleNotFoundError without diffusers.
    """
    path = Path(path)
    header = read_header(path)
    names = _names_by_layer(path, header.shapes, layers_per_block)
    for (_, layer), kinds in names.items():
        if not {"down", "up"} <= kinds.keys():
            raise ValueError(
                f"{path}: of the LoRA's layer {short_repr(layer)} there is only "
                f"{short_repr(sorted(kinds.values()))}; each has two weights, down and up"
            )
    configs = {component: _adapter_config(path, header, component) for component in COMPONENTS}
    tensors = load_safetensors(path)
    layers: dict[str, dict[str, LoRALayer]] = {component: {} for component in COMPONENTS}
    for (component, layer), kinds in names.items():
        down, up = tensors[kinds["down"]], tensors[kinds["up"]]
        _check_pair(path, layer, down, up)
        if "alpha" in kinds:
            alpha = tensors[kinds["alpha"]]
            if alpha.numel() != 1:
                raise ValueError(
                    f"{path}: {short_repr(kinds['alpha'])} holds {alpha.numel()} numbers"
                )
            alpha = float(alpha)
        else:
            alpha = _configured_alpha(configs[component], layer, rank=len(down))
        if not abs(alpha) <= MAX_ALPHA:
            raise ValueError(
                f"{path}: alpha={alpha} of {short_repr(layer)} must be a number within "
                f"±{MAX_ALPHA:g}"
            )
        layers[component][layer] = LoRALayer(down, up, alpha)
    return LoRAFile(unet=layers["unet"], text_encoder=layers["text_encoder"])


def is_lora(path: Path) -> bool:
    """Whether a file holds a LoRA, by the names of its tensors; False if it is not safetensors."""
    try:
        names = read_header(path).shapes
    except ValueError:
        return False
    return any(_MARK.search(name) for name in names)


def check_without_loras(network: nn.Module) -> None:
    """Raise ValueError if LoRAs are loaded into a network: its weights then have peft's names."""
    if any("peft_config" in vars(module) for module in network.modules()):
        raise ValueError(
            f"LoRAs are loaded into this {type(network).__name__}, which cannot be saved with "
            "them: write them into its weights (fuse_loras) or take them out (unload_loras) first"
        )


def _names_by_layer(
    path: Path, names: Iterable[str], layers_per_block: int
) -> dict[Layer, dict[str, str]]:
    """Map each layer to the names in the file of its weights: `down`, `up` and perhaps `alpha`."""
    names = sorted(names)
    second = [name for name in names if name.startswith(SDXL)]
    if second:
        raise ValueError(
            f"{path}: is a LoRA for SDXL, which has a second text encoder ({len(second)} tensors, "
            f"first {short_repr(second[0])}); LoRAs for SD 1.x and 2.x are read"
        )
    layers: dict[Layer, dict[str, str]] = {}
    unknown = []
    for name in names:
        parsed = _from_kohya(name, layers_per_block) if name.startswith(KOHYA) else _from_peft(name)
        if parsed is None:
            unknown.append(name)
            continue
        layer, kind = parsed
        if kind in layers.setdefault(layer, {}):
            raise ValueError(
                f"{path}: {short_repr(layers[layer][kind])} and {short_repr(name)} are the "
                "same weight"
            )
        layers[layer][kind] = name
    if unknown:
        raise ValueError(
            f"{path}: {len(unknown)} of its {len(names)} tensors, first {short_repr(unknown[0])}, "
            "are no part of a LoRA; one has an up and a down weight for each layer, and perhaps "
            "alpha (DoRA, LoHa, LoKr and biases are not read)"
        )
    if not layers:
        raise ValueError(f"{path}: holds no LoRA, no tensor at all")
    return layers


def _from_kohya(name: str, layers_per_block: int) -> tuple[Layer, str] | None:
    """Layer and kind of a weight by kohya's name, or None if it is not that of a LoRA.

    Each name is translated on its own: given several, diffusers takes input_blocks_1 for the start
    of input_blocks_10, and ignores LDM's names beside its own.
    """
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )

    layer, _, kind = name.partition(".")
    if kind not in KOHYA_KINDS:
        return None
    pair = {f"{layer}.lora_down.weight": None, f"{layer}.lora_up.weight": None}
    config = SimpleNamespace(layers_per_block=layers_per_block)
    try:
        pair = _maybe_map_sgm_blocks_to_diffusers(pair, config)
        pair, _ = _convert_non_diffusers_lora_to_diffusers(pair)
    except (ValueError, IndexError, KeyError):  # blocks that are not numbered as LDM's are
        return None
    parsed = _from_peft(next(iter(pair)))
    if parsed is None:
        return None
    # diffusers takes LDM's upsampling layer for an attention, which has no `conv`.
    translated = re.sub(r"attentions\.\d+\.conv$", "upsamplers.0.conv", parsed[0][1])
    return (parsed[0][0], translated), KOHYA_KINDS[kind]


def _from_peft(name: str) -> tuple[Layer, str] | None:
    """Layer and kind of a weight by peft's or diffusers' name, or None if it is not a LoRA's."""
    from diffusers.utils.state_dict_utils import (
        StateDictType,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    component = next(
        (component for component in COMPONENTS if name.startswith(f"{component}.")), None
    )
    if component == "text_encoder":
        # This type's table holds that of the newer one too.
        renamed = convert_state_dict_to_peft(
            {name.removeprefix("text_encoder."): None}, original_type=StateDictType.DIFFUSERS_OLD
        )
    else:  # the first files, of UNets alone, have no prefix
        renamed = convert_unet_state_dict_to_peft({name.removeprefix("unet."): None})
    match = re.fullmatch(r"(.+)\.(lora_[AB]\.weight)", next(iter(renamed)).removeprefix(TEXT_MODEL))
    if match is None:
        return None
    return (component if component is not None else "unet", match[1]), PEFT_KINDS[match[2]]


def _adapter_config(path: Path, header: Header, component: str) -> dict[str, Any]:
    """The keys of peft's adapter config in the header that set a component's scale, checked.

    All other keys follow from the weights, or concern training.
    """
    text = header.metadata.get("lora_adapter_metadata", "{}")
    try:
        content = parse_json(text.encode())
    except ValueError as error:
        raise ValueError(f"{path}: lora_adapter_metadata is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: lora_adapter_metadata is {short_repr(content)}, not an object")
    config = {
        key.removeprefix(f"{component}."): value
        for key, value in content.items()
        if key.startswith(f"{component}.")
    }
    for key in ("use_dora", "lora_bias"):
        if config.get(key):
            raise ValueError(
                f"{path}: {component}.{key}={short_repr(config[key])} is not read, only false"
            )
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(
            f"{path}: {component}.alpha_pattern is {short_repr(patterns)}, not an object"
        )
    for key in patterns:
        # peft uses them as regular expressions, and a file could hold one that never ends.
        if re.fullmatch(r"\^?[\w.]+", key) is None:
            raise ValueError(
                f"{path}: {component}.alpha_pattern names {short_repr(key)}, not a layer"
            )
    for alpha in (config.get("lora_alpha", 1), *patterns.values()):
        number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not (number and abs(alpha) <= MAX_ALPHA):
            raise ValueError(
                f"{path}: {component} has alpha {short_repr(alpha)}, not a number within "
                f"±{MAX_ALPHA:g}"
            )
    return config


def _configured_alpha(config: dict[str, Any], layer: str, *, rank: int) -> float:
    """Alpha by peft's configuration; without one it is the rank, so that the scale is 1."""
    alpha = config.get("lora_alpha", rank)
    for key, value in (config.get("alpha_pattern") or {}).items():
        name = key.removeprefix("^").removeprefix(TEXT_MODEL)
        if layer == name or (layer.endswith(f".{name}") and not key.startswith("^")):
            alpha = value
            break
    # Rank-stabilised LoRA (Kalajdzievski 2023) divides by √r where all others divide by r.
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _check_pair(path: Path, layer: str, down: Tensor, up: Tensor) -> None:
    if not (down.is_floating_point() and up.is_floating_point()):
        raise ValueError(
            f"{path}: {short_repr(layer)} holds {down.dtype} and {up.dtype}, expected "
            "floating point"
        )
    if down.ndim not in (2, 4) or down.ndim != up.ndim or down.shape[0] != up.shape[1]:
        raise ValueError(
            f"{path}: {short_repr(layer)} has down {tuple(down.shape)} and up {tuple(up.shape)}, "
            "expected (r, in) and (out, r), or (r, in, h, w) and (out, r, 1, 1)"
        )
    if not 1 <= down.shape[0] <= MAX_RANK:
        raise ValueError(
            f"{path}: rank {down.shape[0]} of {short_repr(layer)} must be from 1 to {MAX_RANK}"
        )
