"""Write LoRA files by kohya's names or by diffusers', which formats/lora.py reads."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from latentdiff.formats.ldm.keys import TEXT_MODEL
from latentdiff.formats.lora import DISTILLED_STEPS, LoRAFile
from latentdiff.formats.lora_layers import LoRALayer, kind
from latentdiff.formats.weights import save_safetensors, to_write

Names = Literal["kohya", "diffusers"]


def write_lora(
    file: LoRAFile,
    path: Path,
    *,
    names: Names = "kohya",
    dtype: torch.dtype = torch.float16,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the changes of a LoRA as one safetensors file.

    kohya: A1111, ComfyUI, kohya's scripts and diffusers read it; each layer has its alpha.
    diffusers: peft and every release of diffusers read it. These names have no place for alpha, so
    that the scale alpha / r becomes a part of `up`.
    `metadata` stands in the header, beside kohya's entries for rank and alpha. Raises ValueError
    for a LoRA without layers, for one that is not plain, and for unknown names.
    """
    if names not in get_args(Names):
        raise ValueError(f"names={names!r} must be one of {', '.join(get_args(Names))}")
    parts = plain_layers(file, path)
    layers = [layer for part in parts.values() for layer in part.values()]
    if not layers:
        raise ValueError(f"{path} would be a LoRA without layers: nothing is changed")
    tensors = {}
    for component, prefix in (("unet", "lora_unet"), ("text_encoder", "lora_te")):
        inner = TEXT_MODEL if component == "text_encoder" else ""
        for name, layer in parts[component].items():
            if names == "kohya":
                tensors |= _kohya(f"{prefix}_{inner}{name}".replace(".", "_"), layer)
            else:
                tensors |= _diffusers(f"{component}.{inner}{name}", layer)
    entries = _entries(layers)
    if file.distilled_steps is not None:
        entries[DISTILLED_STEPS] = str(file.distilled_steps)
    save_safetensors(to_write(tensors, path, dtype), path, entries | dict(metadata or {}))


def plain_layers(file: LoRAFile, path: Path) -> dict[str, dict[str, LoRALayer]]:
    """The layers of both networks. Raises ValueError, naming `path`, for any that is not plain."""
    parts: dict[str, dict[str, LoRALayer]] = {}
    for component, layers in (("unet", file.unet), ("text_encoder", file.text_encoder)):
        parts[component] = {}
        for name, layer in layers.items():
            if not isinstance(layer, LoRALayer) or layer.magnitude is not None:
                raise ValueError(
                    f"{path}: {name} is a {kind(layer)}, and a plain LoRA alone can get another "
                    "rank, precision or other names; `latentdiff convert MODEL OUT --lora FILE` "
                    "writes any kind into a model, whose difference is a LoRA (--lora_of)"
                )
            parts[component][name] = layer
    return parts


def _kohya(module: str, layer: LoRALayer) -> dict[str, Tensor]:
    return {
        f"{module}.lora_down.weight": layer.down,
        f"{module}.lora_up.weight": layer.up,
        f"{module}.alpha": torch.tensor(layer.alpha),
    }


def _diffusers(module: str, layer: LoRALayer) -> dict[str, Tensor]:
    return {
        f"{module}.lora_A.weight": layer.down,
        f"{module}.lora_B.weight": layer.up.float() * (layer.alpha / layer.rank),
    }


def _entries(layers: list[LoRALayer]) -> dict[str, str]:
    """What readers show of a LoRA: the commonest rank and alpha, or kohya's word for several."""
    ranks = Counter(layer.rank for layer in layers)
    alphas = Counter(layer.alpha for layer in layers)
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(next(iter(ranks))) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(next(iter(alphas))) if len(alphas) == 1 else "Dynamic",
    }
