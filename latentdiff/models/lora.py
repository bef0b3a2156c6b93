"""LoRAs (Hu et al. 2021) on a UNet and its text tower: several at once, each with its scale.

The computation is peft's: it wraps each layer that a LoRA changes in one that computes
W x + scale · alpha / r · up (down x), and leaves W unchanged. formats/lora.py reads the files.
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from latentdiff.formats.header import short_repr
from latentdiff.formats.lora import LoRALayer, read_lora
from latentdiff.formats.weights import check_numbers
from latentdiff.models.dit import DiT
from latentdiff.models.unet import UNet

if TYPE_CHECKING:
    from peft.tuners import lora


class LoRAs:
    """The LoRAs that are loaded into a UNet and a text tower, by name.

    They change what the two networks compute from `load` on; with no LoRA, or with all scales at
    0, the networks compute bit for bit what they did before. peft and diffusers must be installed
    (`pip install "latentdiff[lora]"`); without them `load` raises ModuleNotFoundError.
    """

    def __init__(self, unet: UNet | DiT, text_encoder: nn.Module) -> None:
        self.unet = unet
        # CLIPTextModel keeps its layers one module deeper in some releases of transformers.
        self.text_encoder: nn.Module = getattr(text_encoder, "text_model", text_encoder)
        self._scales: dict[str, float] = {}

    @property
    def scales(self) -> dict[str, float]:
        """Scale of each loaded LoRA, in the order of loading."""
        return dict(self._scales)

    def load(self, path: Path | str, *, name: str | None = None, scale: float = 1.0) -> str:
        """Load a LoRA file into the networks, in addition to others; returns its name.

        name: for `set_scales`; by default the file's name without extension.
        scale: multiplies the change; 1 is as trained, 0 is off, any finite number is allowed.
        Raises ValueError if the file is not a LoRA, or one for other networks, or if the name is
        taken; nothing has changed then.
        """
        import peft  # noqa: F401 - before anything is changed

        path = Path(path)
        if not isinstance(self.unet, UNet):
            raise ValueError(f"{path} cannot be loaded: LoRAs are for a UNet, and this is a DiT")
        name = path.stem if name is None else name
        if not name or name in self._scales:
            raise ValueError(f"name={name!r} must be new; loaded are {list(self._scales)}")
        _check_scale(scale)
        file = read_lora(path, layers_per_block=self.unet.config.layers_per_block)
        _check_layers(path, "UNet", self.unet, file.unet)
        _check_layers(path, "text encoder", self.text_encoder, file.text_encoder)

        adapter = _adapter(len(self._scales))
        _inject(self.unet, file.unet, adapter)
        _inject(self.text_encoder, file.text_encoder, adapter)
        self._scales[name] = float(scale)
        self._apply()
        return name

    def set_scales(self, scales: Mapping[str, float]) -> None:
        """Give loaded LoRAs other scales; those that are not named get 0.

        Raises ValueError for a name that is not loaded, or a scale that is not finite.
        """
        for name, scale in scales.items():
            if name not in self._scales:
                raise ValueError(f"no LoRA {name!r} is loaded; loaded are {list(self._scales)}")
            _check_scale(scale)
        self._scales = {name: float(scales.get(name, 0)) for name in self._scales}
        self._apply()

    def unload(self) -> None:
        """Remove all LoRAs: the networks are as before, bit for bit.

        Raises ValueError if none is loaded, as after `fuse`, which cannot be undone.
        """
        self._check_any("unload")
        for network in (self.unet, self.text_encoder):
            _unwrap(network)
        self._scales = {}

    @torch.no_grad()
    def fuse(self) -> None:
        """Add all LoRAs, with their scales, to the weights: the networks are as fast as without.

        The original weights are gone then; only loading the model anew brings them back.
        Raises ValueError if none is loaded, or if a weight would not be finite; nothing has
        changed then.
        """
        self._check_any("fuse")
        active = self._active()
        for network in (self.unet, self.text_encoder):
            for layer_name, layer in _lora_layers(network).items():
                weight = layer.get_base_layer().get_parameter("weight")
                changes = [layer.get_delta_weight(a) for a in active if a in layer.lora_A]
                if not torch.isfinite(sum(changes, weight)).all():
                    raise ValueError(
                        f"the LoRAs {list(self._scales)} cannot be fused: the weight of "
                        f"{layer_name} would be too large for {weight.dtype}"
                    )
        for network in (self.unet, self.text_encoder):
            for layer in _lora_layers(network).values():
                layer.merge(adapter_names=active)
            _unwrap(network)
        self._scales = {}

    def _active(self) -> list[str]:
        """peft's names of the LoRAs whose scale is not 0."""
        return [_adapter(i) for i, scale in enumerate(self._scales.values()) if scale != 0]

    def _apply(self) -> None:
        """Set the scales in peft's layers; LoRAs of scale 0 are disabled, not added as 0."""
        from peft.functional import set_adapter

        for network in (self.unet, self.text_encoder):
            set_adapter(network, self._active(), inference_mode=True)
            for layer in _lora_layers(network).values():
                for i, scale in enumerate(self._scales.values()):
                    layer.set_scale(_adapter(i), scale)

    def _check_any(self, verb: str) -> None:
        if not self._scales:
            raise ValueError(
                f"there is no LoRA to {verb}: none was loaded, or they were fused into the "
                "weights already, which only loading the model anew undoes"
            )


def _adapter(i: int) -> str:
    """peft's name of the i-th LoRA: a module's name, which cannot be any text."""
    return f"adapter{i}"


def _check_scale(scale: float) -> None:
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"scale={scale!r} must be a finite number")


def _check_layers(
    path: Path, title: str, network: nn.Module, layers: Mapping[str, LoRALayer]
) -> None:
    """Raise ValueError, naming the first, unless each layer is in the network with its widths.

    Its numbers, too, must be within the range of the network's precision.
    """
    weights = _weights(network)
    absent = [name for name in layers if name not in weights]
    if absent:
        raise ValueError(
            f"{path}: {len(absent)} of its {len(layers)} layers for the {title}, first "
            f"{short_repr(absent[0])}, are not in this model: the LoRA is for another architecture"
        )
    wrong = [name for name, layer in layers.items() if not _fits(layer, weights[name])]
    if wrong:
        layer, weight = layers[wrong[0]], weights[wrong[0]]
        raise ValueError(
            f"{path}: {len(wrong)} of its {len(layers)} layers for the {title}, first {wrong[0]}, "
            f"have other widths than this model: {tuple(layer.down.shape)} and "
            f"{tuple(layer.up.shape)} for a weight of {tuple(weight.shape)}"
        )
    for name, layer in layers.items():
        for half in (layer.down, layer.up):
            try:
                check_numbers(name, half, weights[name].dtype)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error


def _fits(layer: LoRALayer, weight: Tensor) -> bool:
    out, channels, *kernel = weight.shape
    down, up = (layer.rank, channels, *kernel), (out, layer.rank, *(1 for _ in kernel))
    return tuple(layer.down.shape) == down and tuple(layer.up.shape) == up


def _weights(network: nn.Module) -> dict[str, Tensor]:
    """Weights that a LoRA can change, by the names that their layers have without LoRAs."""
    wrapped = _lora_layers(network)
    inside = tuple(f"{name}." for name in wrapped)
    weights = {}
    for name, module in network.named_modules():
        layer = wrapped[name].get_base_layer() if name in wrapped else module
        if isinstance(layer, nn.Linear | nn.Conv2d) and not name.startswith(inside):
            weights[name] = layer.weight
    return weights


def _lora_layers(network: nn.Module) -> dict[str, "lora.Linear | lora.Conv2d"]:
    from peft.tuners.lora import Conv2d, Linear

    modules = network.named_modules()
    return {name: layer for name, layer in modules if isinstance(layer, Linear | Conv2d)}


def _inject(network: nn.Module, layers: Mapping[str, LoRALayer], adapter: str) -> None:
    """Wrap layers in peft's, with these weights in the network's precision."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    if not layers:
        return
    weights = _weights(network)
    # peft compares each layer's name with each pattern, so that the commonest need none.
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    patterns = {name: f"^{re.escape(name)}" for name in layers}
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType] - kohya's need not be whole
        rank_pattern={patterns[n]: l.rank for n, l in layers.items() if l.rank != rank},
        alpha_pattern={patterns[n]: l.alpha for n, l in layers.items() if l.alpha != alpha},
        target_modules=list(layers),
        init_lora_weights=False,
        inference_mode=True,
    )
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(config, network, adapter, low_cpu_mem_usage=True)
    for parameter in trainable:  # peft has frozen them
        parameter.requires_grad_()
    state = {}
    for name, layer in layers.items():
        state[f"{name}.lora_A.weight"] = layer.down.to(weights[name].dtype)
        state[f"{name}.lora_B.weight"] = layer.up.to(weights[name].dtype)
    result = set_peft_model_state_dict(network, state, adapter, low_cpu_mem_usage=True)
    assert not result.unexpected_keys


def _unwrap(network: nn.Module) -> None:
    """Replace peft's layers by those that they wrap."""
    for name, layer in _lora_layers(network).items():
        network.set_submodule(name, layer.get_base_layer())
    vars(network).pop("peft_config", None)
