"""peft's layers around those of a network: put on, taken off, and added to the weights.

A layer that LoRAs of several kinds change has a wrapper of each kind, one around the other; each
holds what all files of its kind have for the layer, by adapter. The computation is peft's, which
adds scale · ΔW x to what is inside and leaves W unchanged; the gain of DoRA is dora.py's.
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.formats.lora_layers import AdapterLayer, LoHaLayer, LoKrLayer, LoRALayer
from latentdiff.models.dora import Gains


def wrapped(network: nn.Module) -> dict[str, nn.Module]:
    """The outermost wrapper of each layer that has one, by the name of the layer without it."""
    return {
        name: module
        for name, module in network.named_modules()
        if hasattr(module, "base_layer") and not name.endswith(".base_layer")
    }


def wrappers(layer: Any) -> Iterator[Any]:
    """The wrappers of a layer, from the outermost to the innermost."""
    while hasattr(layer, "base_layer"):
        yield layer
        layer = layer.base_layer


def weights(network: nn.Module) -> dict[str, Tensor]:
    """Weights that a LoRA can change, by the names that their layers have without LoRAs."""
    outermost = wrapped(network)
    inside = tuple(f"{name}." for name in outermost)
    found = {}
    for name, module in network.named_modules():
        layer = _base(module) if name in outermost else module
        if isinstance(layer, nn.Linear | nn.Conv2d) and not name.startswith(inside):
            found[name] = layer.weight
    return found


def add(
    network: nn.Module,
    layers: Mapping[str, AdapterLayer],
    gains: Mapping[str, Tensor],
    adapter: str,
) -> None:
    """Wrap layers, with these changes of their weights in the network's precision."""
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    precisions = {name: weight.dtype for name, weight in weights(network).items()}
    for kind in (LoRALayer, LoHaLayer, LoKrLayer):
        some: dict[str, Any] = {n: layer for n, layer in layers.items() if isinstance(layer, kind)}
        if some:
            with _alone(network, list(some), kind):
                put_on = _add_loras if kind is LoRALayer else _add_lycoris
                put_on(network, some, precisions, adapter)
    for name, gain in gains.items():
        *_, innermost = wrappers(network.get_submodule(name))
        if not isinstance(innermost, Gains):
            innermost.base_layer = Gains(innermost.base_layer)
            innermost = innermost.base_layer
        innermost.add(adapter, gain.to(innermost.base_layer.weight))
    for parameter in trainable:  # peft has frozen them
        parameter.requires_grad_()


def set_scales(network: nn.Module, scales: Mapping[str, float]) -> None:
    """Set the adapters' scales; those of scale 0 are disabled, not added as 0."""
    from peft.functional import set_adapter

    set_adapter(network, [a for a, scale in scales.items() if scale != 0], inference_mode=True)
    for layer in wrapped(network).values():
        for wrapper in wrappers(layer):
            for adapter, scale in scales.items():
                wrapper.set_scale(adapter, scale)


def fused_weight(layer: nn.Module, adapters: list[str]) -> Tensor:
    """The weight of a wrapped layer with the changes of these adapters added."""
    weight = _base(layer).weight
    for wrapper in wrappers(layer):
        for adapter in adapters:
            if adapter in wrapper.scaling:
                weight = weight + wrapper.get_delta_weight(adapter)
    return weight


@torch.no_grad()
def fuse(network: nn.Module, adapters: list[str]) -> None:
    """Add the changes of these adapters to the weights, and take the wrappers off."""
    for layer in wrapped(network).values():
        _base(layer).weight.copy_(fused_weight(layer, adapters))
    take_off(network)


@contextmanager
@torch.no_grad()
def merged(network: nn.Module, adapters: list[str]) -> Iterator[bool]:
    """Have the changes of these adapters in the weights and no wrappers, until this is left.

    Yields whether there are any.
    """
    outermost = wrapped(network)
    bases = {name: _base(layer) for name, layer in outermost.items()}
    weights = {name: base.weight.data for name, base in bases.items()}
    try:
        for name, layer in outermost.items():
            bases[name].weight.data = fused_weight(layer, adapters)
            network.set_submodule(name, bases[name])
        yield any(
            adapter in wrapper.scaling
            for layer in outermost.values()
            for wrapper in wrappers(layer)
            for adapter in adapters
        )
    finally:
        for name, layer in outermost.items():
            bases[name].weight.data = weights[name]
            network.set_submodule(name, layer)


def take_off(network: nn.Module) -> None:
    """Replace the wrappers by what they wrap."""
    for name, layer in wrapped(network).items():
        network.set_submodule(name, _base(layer))
    vars(network).pop("peft_config", None)


def _base(layer: nn.Module) -> Any:
    *_, innermost = wrappers(layer)
    return innermost.base_layer


@contextmanager
def _alone(network: nn.Module, names: list[str], kind: type[AdapterLayer]) -> Iterator[None]:
    """Leave of these layers' wrappers that of one kind, or none; then the others are put back.

    peft adds an adapter to the wrapper that it finds, and cannot put one for a convolution around
    another. A wrapper that came new is the outermost afterwards.
    """
    from peft.tuners import loha, lokr, lora

    classes = {
        LoRALayer: lora.LoraLayer,
        LoHaLayer: loha.layer.LoHaLayer,
        LoKrLayer: lokr.layer.LoKrLayer,
    }
    outermost = wrapped(network)
    before = {name: outermost[name] for name in names if name in outermost}
    for name, layer in before.items():
        own = [wrapper for wrapper in wrappers(layer) if isinstance(wrapper, classes[kind])]
        network.set_submodule(name, own[0] if own else _base(layer))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        yield
    for name, layer in before.items():
        wrapper: Any = network.get_submodule(name)
        if wrapper in [*wrappers(layer)]:
            network.set_submodule(name, layer)
        else:
            wrapper.base_layer = layer


def _add_loras(
    network: nn.Module,
    layers: Mapping[str, LoRALayer],
    precisions: Mapping[str, torch.dtype],
    adapter: str,
) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

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
    inject_adapter_in_model(config, network, adapter, low_cpu_mem_usage=True)
    state = {}
    for name, layer in layers.items():
        state[f"{name}.lora_A.weight"] = layer.down.to(precisions[name])
        state[f"{name}.lora_B.weight"] = layer.up.to(precisions[name])
    result = set_peft_model_state_dict(network, state, adapter, low_cpu_mem_usage=True)
    assert not result.unexpected_keys


def _add_lycoris(
    network: nn.Module,
    layers: Mapping[str, LoHaLayer] | Mapping[str, LoKrLayer],
    precisions: Mapping[str, torch.dtype],
    adapter: str,
) -> None:
    """Give peft's layers the tensors as they are: peft's own would have other shapes.

    LyCORIS factors a LoKr's widths in ways that peft's configuration cannot say, and a file may
    have cores in some layers alone. What a layer of peft computes follows from what it holds.
    """
    from peft import LoHaConfig, LoKrConfig, inject_adapter_in_model

    kind = LoHaConfig if isinstance(next(iter(layers.values())), LoHaLayer) else LoKrConfig
    config = kind(
        r=1, alpha=1, target_modules=list(layers), init_weights=False, inference_mode=True
    )
    inject_adapter_in_model(config, network, adapter, low_cpu_mem_usage=True)
    for name, layer in layers.items():
        wrapper: Any = network.get_submodule(name)
        device = _base(wrapper).weight.device
        for kind_of_tensor in wrapper.adapter_layer_names:
            held = getattr(wrapper, kind_of_tensor)
            if adapter in held:
                del held[adapter]
            if kind_of_tensor in layer.tensors:
                tensor = layer.tensors[kind_of_tensor].to(device, precisions[name])
                held[adapter] = nn.Parameter(tensor, requires_grad=False)
        wrapper.alpha[adapter] = layer.scale  # of rank 1, so that the scale is this one
