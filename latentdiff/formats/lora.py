"""Read LoRA files (Hu et al. 2021) of diffusers, peft, ComfyUI and kohya's trainer into one form.

lora_names.py knows the names that their tensors have, lora_scale.py where their alphas are;
models/lora.py applies what is read here to the networks.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from latentdiff.formats.header import read_header, short_repr
from latentdiff.formats.lora_names import COMPONENTS, SDXL, Layer, parse_name
from latentdiff.formats.lora_scale import MAX_ALPHA, adapter_configs, configured_alpha
from latentdiff.formats.weights import load_safetensors

MAX_RANK = 4096  # no weight of SD 1.x and 2.x has a rank above 1280
_MARK = re.compile(r"[._]lora[._](?:A|B|down|up)\b|\.lora_(?:down|up)\.weight$")


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

    Alphas that are not among the tensors are those of peft's configuration, in the metadata or, of
    a file that peft wrote, in adapter_config.json beside it. Raises ValueError if the file is not
    safetensors, is damaged, or holds anything besides a LoRA
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
    configs = adapter_configs(path, header.metadata, header.shapes)
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
            alpha = configured_alpha(configs[component], component, layer, rank=len(down))
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
    if unknown:
        raise ValueError(
            f"{path}: {len(unknown)} of its {len(names)} tensors, first {short_repr(unknown[0])}, "
            "are no part of a LoRA; one has an up and a down weight for each layer, and perhaps "
            "alpha (DoRA, LoHa, LoKr and biases are not read)"
        )
    if not layers:
        raise ValueError(f"{path}: holds no LoRA, no tensor at all")
    return layers


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
