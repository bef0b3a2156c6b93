"""Read LoRA files of diffusers, peft, ComfyUI, LyCORIS and kohya's trainer into one form.

lora_layers.py knows what a layer's tensors compute, lora_names.py the names that they have,
lora_scale.py where their alphas are; models/lora.py applies what is read here to the networks.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from latentdiff.formats.header import read_header, short_repr
from latentdiff.formats.lora_layers import COMPLETE, DORA, AdapterLayer, assemble, rank_of
from latentdiff.formats.lora_names import COMPONENTS, SDXL, Layer, parse_name
from latentdiff.formats.lora_scale import (
    MAX_ALPHA,
    adapter_configs,
    configured_alpha,
    configured_rank,
)
from latentdiff.formats.weights import load_safetensors

DISTILLED_STEPS = "latentdiff.distilled_steps"
"""In the metadata of a LoRA that makes a model a student: the steps that this draws in."""
_MARK = re.compile(
    r"[._]lora[._](?:A|B|down|up)\b|\.lora_(?:down|up)\.weight$|\.(?:hada_w1|lokr_w1)(?:_a)?$"
)


@dataclass(frozen=True)
class LoRAFile:
    """The changes of a LoRA, by layer name; names in the text tower are without `text_model.`."""

    unet: Mapping[str, AdapterLayer]
    text_encoder: Mapping[str, AdapterLayer]
    distilled_steps: int | None = None
    """The steps that a model draws in with a student's LoRA."""


def read_lora(path: Path, *, layers_per_block: int) -> LoRAFile:
    """Read a LoRA file in any of the namings; `layers_per_block` is the UNet's, for LDM's names.

    LoHa, LoKr and DoRA are read too, also beside one another. Alphas that are not among the tensors
    are those of peft's configuration, in the metadata or, of a file that peft wrote, in
    adapter_config.json beside it. Raises ValueError if the file is not safetensors, is damaged, or
    holds anything besides such changes for SD 1.x or 2.x (biases, a second text encoder, other
    kinds of LyCORIS and peft): nothing is ignored. Raises ModuleNotFoundError without diffusers.
    """
    path = Path(path)
    header = read_header(path)
    names = _names_by_layer(path, header.shapes, layers_per_block)
    for (_, layer), kinds in names.items():
        factors = frozenset(kinds) - {"alpha", *DORA}
        if factors not in COMPLETE or kinds.keys() >= {*DORA}:
            raise ValueError(
                f"{path}: of the LoRA's layer {short_repr(layer)} there is only "
                f"{short_repr(sorted(kinds.values()))}; each has the two weights of a LoRA, down "
                "and up, or all of a LoHa or LoKr, and perhaps one magnitude"
            )
    configs = adapter_configs(path, header.metadata, header.shapes)
    tensors = load_safetensors(path)
    layers: dict[str, dict[str, AdapterLayer]] = {component: {} for component in COMPONENTS}
    for (component, layer), kinds in names.items():
        weights = {kind: tensors[name] for kind, name in kinds.items()}
        config = configs[component]
        if config.get("use_dora") and not weights.keys() & {*DORA}:
            raise ValueError(
                f"{path}: {short_repr(layer)} has no lora_magnitude_vector, and use_dora=true in "
                "its configuration: the file is not whole"
            )
        try:
            layers[component][layer] = _layer(layer, weights, component, config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    steps = header.metadata.get(DISTILLED_STEPS)
    if steps is not None and not steps.isdecimal():
        raise ValueError(f"{path}: {DISTILLED_STEPS}={short_repr(steps)} must be a whole number")
    return LoRAFile(layers["unet"], layers["text_encoder"], None if steps is None else int(steps))


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
        parsed = parse_name(name, layers_per_block)
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
    if any(name.startswith("first_stage_model.") for name in unknown):
        raise ValueError(f"{path}: is a whole checkpoint and no LoRA; give it as the model")
    if unknown:
        raise ValueError(
            f"{path}: {len(unknown)} of its {len(names)} tensors, first {short_repr(unknown[0])}, "
            "are no part of a LoRA, LoHa, LoKr or DoRA (a LoCon's `lora_mid`, biases and all other "
            "kinds of LyCORIS and peft are not read)"
        )
    if not layers:
        raise ValueError(f"{path}: holds no LoRA, no tensor at all")
    return layers


def _layer(
    name: str, weights: dict[str, Tensor], component: str, config: Mapping[str, Any]
) -> AdapterLayer:
    """A layer of its tensors, and of the alpha that is one of them or the configuration's."""
    given = weights.pop("alpha", None)
    rank = rank_of(weights)
    if given is None or rank is None:  # a LoKr of two whole matrices has an alpha without meaning
        rank = configured_rank(config, component, name) if rank is None else rank
        alpha = configured_alpha(config, component, name, rank=rank)
    elif given.numel() == 1:
        alpha = float(given)
    else:
        raise ValueError(f"alpha of {short_repr(name)} holds {given.numel()} numbers")
    if not abs(alpha) <= MAX_ALPHA:
        raise ValueError(
            f"alpha={alpha} of {short_repr(name)} must be a number within ±{MAX_ALPHA:g}"
        )
    return assemble(name, weights, alpha, rank)
