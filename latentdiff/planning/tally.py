"""Tally: the memory and arithmetic of operators as they run, of real tensors or of fake ones."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from torch.utils.weak import WeakIdKeyDictionary

from latentdiff.training.blocks import local

aten = torch.ops.aten


def _attention_flop(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward_flop(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


# The CPU's fused attention, which torch's own FLOP counter lacks.
_FLOP: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flop,
}


class Tally(TorchDispatchMode):
    """Counts, of every operator that runs in it, bytes allocated and not yet freed, and FLOP.

    `allocated` is the sum of all that was ever allocated.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.live = self.peak = self.allocated = self.flop = 0
        self.sizes = WeakIdKeyDictionary()
        """Storage -> [counted bytes]; those of `networks` were allocated before, and count as 0."""
        for network in networks:
            for tensor in (*network.parameters(), *network.buffers()):
                self.sizes[local(tensor).untyped_storage()] = [0]

    def __enter__(self) -> Self:
        # FSDP frees gathered weights by resizing their storage to 0, which is no operator.
        self._resize = resize = torch.UntypedStorage.resize_

        def counted(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if storage in self.sizes:
                self._count(self.sizes[storage], size)
            return result

        torch.UntypedStorage.resize_ = counted  # pyright: ignore[reportAttributeAccessIssue]
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in _FLOP:
            self.flop += _FLOP[packet](*args, **(kwargs or {}))
        elif packet in flop_registry:
            self.flop += flop_registry[packet](*args, **(kwargs or {}), out_val=output)
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self.sizes:
            return
        self.sizes[storage] = counted = [0]
        self._count(counted, storage.nbytes())
        # A storage lives as long as any tensor, view or node of autograd's graph that holds it.
        weakref.finalize(storage, self._count, counted, 0).atexit = False

    def _count(self, counted: list[int], size: int) -> None:
        self.live += size - counted[0]
        self.allocated += max(0, size - counted[0])
        counted[0] = size
        self.peak = max(self.peak, self.live)
