"""The change of one layer's weight, as LoRA, LoHa, LoKr and DoRA files hold it.

LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685. LoHa: Hyeon-Woo et al. 2021,
https://arxiv.org/abs/2108.06098. LoKr: Yeh et al. 2023, https://arxiv.org/abs/2309.14859. DoRA, a
magnitude beside any of the three: Liu et al. 2024, https://arxiv.org/abs/2402.09353. The names of
tensors are those of LyCORIS, which peft has too.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from latentdiff.formats.header import short_repr

MAX_RANK = 4096  # no weight of SD 1.x and 2.x has a rank above 1280
DORA = ("dora_scale", "lora_magnitude_vector")
_LOHA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
_LOKR_LEFT = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
_LOKR_RIGHT = ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"})
COMPLETE: dict[frozenset[str], str] = {
    frozenset({"down", "up"}): "LoRA",
    _LOHA: "LoHa",
    _LOHA | {"hada_t1", "hada_t2"}: "LoHa",
} | {frozenset(left | right): "LoKr" for left in _LOKR_LEFT for right in _LOKR_RIGHT}
"""The tensors, besides alpha and magnitude, of a layer that can be computed; and its kind."""


@dataclass(frozen=True)
class LoRALayer:
    """The change of one layer's weight, alpha / r · up · down.

    down is (r, in) and up (out, r); of a convolution (r, in, h, w) and (out, r, 1, 1).
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None
    """DoRA's: (out, 1) or (1, in), of a convolution with two more ones."""

    @property
    def rank(self) -> int:
        """r, the number of rows of `down`."""
        return self.down.shape[0]

    def change(self) -> Tensor:
        """The change without the magnitude, of the weight's shape, in float64."""
        product = self.up.double().flatten(1) @ self.down.double().flatten(1)
        return (self.alpha / self.rank * product).reshape(len(self.up), *self.down.shape[1:])


@dataclass(frozen=True)
class LoHaLayer:
    """The change of one layer's weight, scale · (w1_a w1_b) ⊙ (w2_a w2_b).

    hada_w1_a is (out, r) and hada_w1_b (r, in), of a convolution (r, in·h·w). With the cores
    hada_t1 and hada_t2, (r, r, h, w), they are (r, out) and (r, in).
    """

    tensors: Mapping[str, Tensor]
    scale: float
    magnitude: Tensor | None = None
    """DoRA's, as of a LoRA."""

    def change(self) -> Tensor:
        """The change without the magnitude: (out, in·h·w), with cores (out, in, h, w); float64."""
        t = {name: tensor.double() for name, tensor in self.tensors.items()}
        first, second = (
            _tucker(t[f"hada_t{i}"], t[f"hada_w{i}_a"], t[f"hada_w{i}_b"])
            if "hada_t1" in t
            else t[f"hada_w{i}_a"] @ t[f"hada_w{i}_b"]
            for i in (1, 2)
        )
        return self.scale * first * second


@dataclass(frozen=True)
class LoKrLayer:
    """The change of one layer's weight, scale · w1 ⊗ w2, a Kronecker product.

    lokr_w1 is (a, c) and lokr_w2 (b, d), of a convolution (b, d, h, w), with out = a·b and
    in = c·d. Either may be a product, w1_a w1_b and w2_a w2_b, the second of a convolution (b, r)
    and (r, d·h·w); with the core lokr_t2, (r, r, h, w), they are (r, b) and (r, d).
    """

    tensors: Mapping[str, Tensor]
    scale: float
    magnitude: Tensor | None = None
    """DoRA's, as of a LoRA."""

    def change(self) -> Tensor:
        """The change without the magnitude: (out, in·h·w) or (out, in, h, w), in float64."""
        t = {name: tensor.double() for name, tensor in self.tensors.items()}
        left = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
        if "lokr_t2" in t:
            right = _tucker(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
        else:
            right = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
        left = left.reshape(*left.shape, *(1 for _ in right.shape[2:]))
        return self.scale * torch.kron(left, right.contiguous())


AdapterLayer = LoRALayer | LoHaLayer | LoKrLayer


def kind(layer: AdapterLayer) -> str:
    """Its name for a sentence: LoRA, LoHa, LoKr, or one of them with DoRA."""
    name = type(layer).__name__.removesuffix("Layer")
    if layer.magnitude is None:
        return name
    return "DoRA" if name == "LoRA" else f"{name} with DoRA"


def rank_of(weights: Mapping[str, Tensor]) -> int | None:
    """r of a layer's tensors; None of a LoKr of two whole matrices, which no alpha scales."""
    for name in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if name in weights:
            return len(weights[name])
    return None


def assemble(name: str, weights: Mapping[str, Tensor], alpha: float, rank: float) -> AdapterLayer:
    """A layer of its tensors, which are a key of `COMPLETE` and perhaps a magnitude.

    Raises ValueError, naming the layer, for tensors whose numbers or shapes make no sense.
    """
    whole = sorted(
        f"{tensor.dtype}" for tensor in weights.values() if not tensor.is_floating_point()
    )
    if whole:
        raise ValueError(f"{short_repr(name)} holds {whole[0]}, expected floating point")
    magnitude = _magnitude(weights)
    factors = {kind: tensor for kind, tensor in weights.items() if kind not in DORA}
    if "down" in factors:
        _check_pair(name, factors["down"], factors["up"])
        return LoRALayer(factors["down"], factors["up"], alpha, magnitude)
    layer = (LoHaLayer if "hada_w1_a" in factors else LoKrLayer)(factors, alpha / rank, magnitude)
    shapes = ", ".join(f"{kind} {tuple(tensor.shape)}" for kind, tensor in sorted(factors.items()))
    if any(tensor.numel() == 0 for tensor in factors.values()):
        raise ValueError(f"{short_repr(name)} has {shapes}, in which nothing may be empty")
    if rank > MAX_RANK:
        raise ValueError(f"rank {rank} of {short_repr(name)} must be from 1 to {MAX_RANK}")
    try:
        shape_of(layer)
    except RuntimeError as error:
        raise ValueError(f"{short_repr(name)} has {shapes}, which cannot be multiplied") from error
    return layer


def shape_of(layer: AdapterLayer) -> tuple[int, ...]:
    """The shape of `layer.change()`, without computing it."""
    if isinstance(layer, LoRALayer):
        return (len(layer.up), *layer.down.shape[1:])
    factors = {name: tensor.to("meta") for name, tensor in layer.tensors.items()}
    return tuple(type(layer)(factors, layer.scale).change().shape)


def _tucker(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """(r, r, h, w), (r, out) and (r, in) to (out, in, h, w)."""
    return torch.einsum("rshw,ro,si->oihw", core, left, right)


def _magnitude(weights: Mapping[str, Tensor]) -> Tensor | None:
    """LyCORIS' has the shape of the weight's norm along one axis; peft's is of the output always.

    peft writes it as (out,), of a convolution as (1, out, 1, 1), which is LyCORIS' of the input.
    """
    if "dora_scale" in weights and weights["dora_scale"].ndim > 1:
        return weights["dora_scale"]
    vector = weights.get("dora_scale", weights.get("lora_magnitude_vector"))
    if vector is None:
        return None
    dimensions = next(tensor.ndim for kind, tensor in weights.items() if kind not in DORA)
    return vector.reshape(-1, *(1 for _ in range(dimensions - 1)))


def _check_pair(name: str, down: Tensor, up: Tensor) -> None:
    kernel = (1,) * (down.ndim - 2)
    if down.ndim not in (2, 4) or up.shape[1:] != (down.shape[0], *kernel):
        raise ValueError(
            f"{short_repr(name)} has down {tuple(down.shape)} and up {tuple(up.shape)}, "
            "expected (r, in) and (out, r), or (r, in, h, w) and (out, r, 1, 1)"
        )
    if not 1 <= down.shape[0] <= MAX_RANK:
        raise ValueError(f"rank {down.shape[0]} of {short_repr(name)} must be from 1 to {MAX_RANK}")
