"""DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353): the magnitude beside a LoRA.

W' = m · (W + ΔW) / ‖W + ΔW‖ (eq. 5), the norm taken along the axes where m has size one: of each
output, as in peft and by default in LyCORIS, or of each input, as in LyCORIS before. Whoever draws
has W, and the norm is then a number, so that the change is the sum of two,

    W' - W = f ΔW + (f - 1) W,    f = m / ‖W + ΔW‖

of which the first is a LoRA again and the second a gain of each output or input. Both are
multiplied by a LoRA's scale, so that 0 is off and several files add up. peft would multiply ΔW
alone, before the norm is taken: its scale 0 still gives W the lengths m.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentdiff.formats.lora_layers import AdapterLayer, LoKrLayer, LoRALayer


class Gains(nn.Module):
    """A layer with the weight W + Σ scale · gain ⊙ W, with the methods that peft's layers have."""

    def __init__(self, base_layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.gains = nn.ParameterDict()
        self.scaling: dict[str, float] = {}

    def add(self, adapter: str, gain: Tensor) -> None:
        """Add a gain: (out, 1) or (1, in), of a convolution with two more ones."""
        self.gains[adapter] = nn.Parameter(gain, requires_grad=False)
        self.scaling[adapter] = 1.0

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply the gain by a scale; 0 is off."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change of the weight, with its scale."""
        return self.scaling[adapter] * self.gains[adapter] * self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        """What the layer computes with its changed weight."""
        layer = self.base_layer
        active = [adapter for adapter, scale in self.scaling.items() if scale != 0]
        if not active:
            return layer(x)
        weight = sum((self.get_delta_weight(adapter) for adapter in active), layer.weight)
        if isinstance(layer, nn.Linear):
            return functional.linear(x, weight, layer.bias)
        return functional.conv2d(
            x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups
        )


def decomposed(layer: AdapterLayer, weight: Tensor) -> tuple[AdapterLayer, Tensor]:
    """The two changes of a layer that has a magnitude: f ΔW, and the gain f - 1 of its weight.

    Computed in float64. f is put into the LoRA's factor of that axis; the change of a LoHa or LoKr
    becomes a matrix of the weight's size, which peft's LoKr adds as 1 ⊗ (f ΔW).
    """
    assert layer.magnitude is not None
    magnitude = layer.magnitude.to(weight.device, torch.float64)
    change = layer.change().to(weight.device).reshape(weight.shape)
    axes = [axis for axis, size in enumerate(magnitude.shape) if size == 1]
    norm = torch.linalg.vector_norm(weight.double() + change, dim=axes, keepdim=True)
    # What is zero stays zero at any length, and no number must come of dividing by it.
    factor = torch.where(norm > 0, magnitude / norm, 1.0)
    if not isinstance(layer, LoRALayer):
        tensors = {"lokr_w1": torch.ones(1, 1), "lokr_w2": factor * change}
        return LoKrLayer(tensors, scale=1.0), factor - 1
    factor_there = factor.to(layer.up.device)
    if factor.shape[0] == weight.shape[0]:
        up, down = layer.up.double() * factor_there, layer.down
    else:
        up, down = layer.up, layer.down.double() * factor_there
    return LoRALayer(down, up, layer.alpha), factor - 1
