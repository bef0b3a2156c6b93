"""LoRAs from weights: the change between two networks, or a LoRA of a smaller rank.

The best approximation of a matrix by one of rank r keeps its r largest singular values (Eckart &
Young 1936, https://doi.org/10.1007/BF02288367).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from latentdiff.formats.lora_layers import LoRALayer


class Difference(NamedTuple):
    """The layers of a LoRA, and what it leaves out of the change."""

    layers: dict[str, LoRALayer]
    left: float
    """Of the change in these layers, by its root mean square: 0 is all of it, 1 nothing."""
    others: list[str]
    """Changed parameters that are in no LoRA: biases, norms, embeddings."""


def low_rank(change: Tensor, rank: int) -> LoRALayer:
    """The change of a weight (out, in) or (out, in, h, w), of rank `rank` or less: alpha is r."""
    matrix = change.flatten(1).double()
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return _layer(u, s, vt, min(rank, len(s)), change.shape[1:])


def resized(layer: LoRALayer, rank: int) -> LoRALayer:
    """A LoRA's layer of rank `rank` or less, the nearest to it: alpha becomes r."""
    # Singular values of up · down are those of the product of their triangles, (r, r).
    left, up = torch.linalg.qr(layer.up.flatten(1).double())
    right, down = torch.linalg.qr(layer.down.flatten(1).double().mT)
    u, s, vt = torch.linalg.svd(layer.alpha / layer.rank * up @ down.mT)
    return _layer(left @ u, s, vt @ right.mT, min(rank, len(s)), layer.down.shape[1:])


@torch.no_grad()
def difference(base: nn.Module, tuned: nn.Module, rank: int) -> Difference:
    """The LoRA of rank `rank` that, added to `base`, comes nearest to `tuned`.

    Raises ValueError for networks whose weights differ in name or shape.
    """
    weights = [dict(network.named_parameters()) for network in (base, tuned)]
    for name in sorted(weights[0].keys() | weights[1].keys()):
        shapes = [tuple(w[name].shape) if name in w else "absent" for w in weights]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name} is {shapes[1]}, and {shapes[0]} in the base model: a LoRA is the "
                "difference of two models of one shape"
            )
    layers, others, total, left = {}, [], 0.0, 0.0
    adaptable = {
        f"{name}.weight"
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    for name, weight in weights[0].items():
        change = weights[1][name].double() - weight.double()
        if not change.any():
            continue
        if name not in adaptable:
            others.append(name)
            continue
        layer = low_rank(change, rank)
        layers[name.removesuffix(".weight")] = layer
        product = (layer.up.flatten(1) @ layer.down.flatten(1)).reshape(change.shape)
        total += float(change.square().sum())
        left += float((change - product).square().sum())
    return Difference(layers, (left / total) ** 0.5 if total else 0.0, others)


def _layer(u: Tensor, s: Tensor, vt: Tensor, rank: int, inner: tuple[int, ...]) -> LoRALayer:
    """Half of each singular value goes into either factor, so that both are of one size."""
    root = s[:rank].sqrt()
    up, down = u[:, :rank] * root, root[:, None] * vt[:rank]
    kernel = (1,) * (len(inner) - 1)
    return LoRALayer(
        down.reshape(rank, *inner).float(), up.reshape(len(u), rank, *kernel).float(), float(rank)
    )
