"""Cross-attention while a network computes: who looks at which token, averaged over heads.

Averaging over layers and steps at the size of the latents is that of DAAM (Tang et al. 2022,
arXiv:2210.04885). Shapes: N = H·W tokens of a feature map, L tokens of the context.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from latentdiff.models.layers import Attention
from latentdiff.models.text import chunk_slices


class AttentionMaps:
    """The mean over layers and steps of what each place of the latents (H, W) looks at."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self._sum, self._count = torch.zeros(()), 0

    @property
    def mean(self) -> Tensor:
        """(L, H, W) on the CPU, whose sum over the L tokens is 1 at each place."""
        return self._sum / max(1, self._count)

    def add(self, weights: Tensor) -> None:
        """Add a layer's attention (N, L), of an N that is (H, W) halved some times, rounded up."""
        height, width = self.size
        while height * width > len(weights):
            height, width = -(-height // 2), -(-width // 2)
        assert height * width == len(weights), f"{len(weights)} places for {self.size}"
        maps = weights.T.unflatten(1, (height, width))[None]
        self._sum = self._sum + F.interpolate(maps, self.size, mode="bilinear")[0].cpu()
        self._count += 1


@contextmanager
def recorded(network: nn.Module, maps: AttentionMaps) -> Iterator[None]:
    """Record the cross-attention of one image in `network`; what it computes stays as it is.

    Of the halves of guidance that with the prompt is recorded, the last. Raises ValueError for a
    network without cross-attention.
    """
    layers: list[Any] = [
        module
        for name, module in network.named_modules()
        if name.endswith("attn2") and isinstance(module, Attention)
    ]
    if not layers:
        raise ValueError(
            f"this {type(network).__name__} has no cross-attention, by which words could be found "
            "in the image"
        )

    def record(layer: Any, inputs: tuple[Any, ...]) -> None:
        x, context = inputs
        maps.add(_weights(layer, x[-1:], context))

    with ExitStack() as stack:
        for layer in layers:
            hook = layer.register_forward_pre_hook(record)
            stack.callback(hook.remove)
        yield


@torch.no_grad()
def _weights(layer: Any, x: Tensor, context: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """softmax(q kᵀ / √d) of x (1, N, C) and the context's last row, the heads' mean (N, L)."""
    keys = context[0] if isinstance(context, tuple) else layer.keys_values(context)[0]
    q = layer.to_q(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2)[0].float()  # (h, N, d)
    k = keys[-1].float()  # (h, L, d)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.softmax(dim=-1).mean(dim=0)


def words(prompt: str, tokenizer: CLIPTokenizer) -> list[tuple[str, list[int]]]:
    """The words of a prompt, in order, each with the positions of its tokens in the context."""
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    texts = tokenizer.convert_ids_to_tokens(ids)
    ends = [text.endswith("</w>") for text in texts]  # CLIP's mark of the last token of a word
    length = tokenizer.model_max_length
    positions = list[int]()
    for number, chunk in enumerate(chunk_slices(ends, size=length - 2)):
        count = len(range(*chunk.indices(len(ids))))
        positions += [number * length + 1 + i for i in range(count)]  # after the start's token
    found, begun = list[tuple[str, list[int]]](), 0
    for i, is_last in enumerate(ends):
        if is_last or i == len(ends) - 1:
            text = _text(tokenizer, ids[begun : i + 1])
            found.append((text, positions[begun : i + 1]))
            begun = i + 1
    return found


def _text(tokenizer: CLIPTokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids))).strip()
