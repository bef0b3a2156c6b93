"""What one training step takes in memory and arithmetic, found by running it without any numbers.

The step runs on fake tensors, which have shapes and types but no memory: every operator that would
run is seen with what it allocates, forward and backward, autocast's copies among them, and what
Python and autograd let go of is freed at the same moment as in a real step. So nothing here is a
rule of thumb; what is left out is what happens inside a single kernel and in the allocator.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten

Model = Callable[..., Any]
"""A network, called under the autocast of its training."""


@dataclass(frozen=True)
class Work:
    """What is trained, as functions that make real tensors, or fake ones where those are on."""

    model: Callable[[], nn.Module]
    loss: Callable[[Model, Sequence[Model], int], Tensor]
    """`loss(model, frozen, n)`: () for n examples, which it makes up."""
    frozen: Callable[[], Sequence[nn.Module]] = tuple
    """Networks beside the model that are not trained, as the text encoder beside the UNet."""


@dataclass(frozen=True)
class Footprint:
    """Counts of one process's step; memory in bytes, arithmetic in FLOP (a product is two)."""

    parameters: int
    weights: int
    """Parameters and buffers of the model."""
    frozen: int
    activations: int
    """What is kept from a forward pass for its backward pass, the batch included."""
    step: int
    """The largest sum of activations, gradients and temporaries at any moment of the step."""
    forward_flop: int
    """Of the model, one forward pass of one part."""
    step_flop: int
    """Of one part: forward and backward passes, and the frozen networks' forward passes."""

    def resident(self, *, emas: int, processes: int) -> dict[str, int]:
        """What is held all the time, in bytes, by name; AdamW keeps two moments a parameter.

        With several processes DDP holds the gradients once more, in the buckets that it sends.
        """
        trainable = 4 * self.parameters
        return {
            "weights": self.weights,
            "optimizer": 2 * trainable,
            "ema": emas * self.weights,
            "frozen networks": self.frozen,
            "buckets of gradients": trainable if processes > 1 else 0,
        }


def footprint(
    work: Work, batch: int, *, accumulation: int = 1, precision: str = "no", gpu: bool = False
) -> Footprint:
    """Run a step of `accumulation` parts of `batch` examples each on fake tensors.

    Parts from the third on are like the second, which finds gradients already there. The
    arithmetic is that of one part.
    `precision` is "no", "bf16" or "fp16", as of accelerate; gpu: autocast keeps norms and softmax
    in float32 as CUDA's does and the CPU's does not.
    """
    with FakeTensorMode():
        model, frozen = work.model(), work.frozen()
        tally = _Tally([model, *frozen])
        called = _Counted(autocast(model, precision, gpu=gpu), tally)
        beside = [autocast(network, precision, gpu=gpu) for network in frozen]
        activations = flop = 0
        with tally:
            for _ in range(min(accumulation, 2)):
                before, flop, called.flop = tally.live, tally.flop, 0
                loss = work.loss(called, beside, batch) / accumulation
                activations = max(activations, tally.live - before)
                loss.backward()
                del loss
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Footprint(
        parameters=parameters,
        weights=nbytes(model),
        frozen=sum(map(nbytes, frozen)),
        activations=activations,
        step=tally.peak,
        forward_flop=called.flop,
        step_flop=tally.flop - flop,
    )


def autocast(model: Model, precision: str, *, gpu: bool = False) -> Model:
    """The model as accelerate calls it in mixed precision, on the CPU or as on a GPU."""
    if precision == "no":
        return model
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def call(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            stack.enter_context(torch.autocast("cpu", dtype=dtype))
            stack.enter_context(_Float32Norms() if gpu else nullcontext())
            return model(*args, **kwargs)

    return call


def nbytes(network: nn.Module) -> int:
    """Bytes of the network's parameters and buffers."""
    tensors = [*network.parameters(), *network.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _Counted:
    """Calls the model and counts the arithmetic of its forward passes apart."""

    def __init__(self, model: Model, tally: "_Tally") -> None:
        self.model, self.tally, self.flop = model, tally, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = self.tally.flop
        output = self.model(*args, **kwargs)
        self.flop += self.tally.flop - before
        return output


def _attention_flop(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward_flop(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


# The CPU's fused attention, which torch's own counter of FLOP passes over.
_FLOP: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flop,
}


class _Tally(TorchDispatchMode):
    """Sees every operator and keeps the sum of what is alive, its peak and the arithmetic."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.live = self.peak = self.flop = 0
        self.seen = WeakIdKeyDictionary()
        for network in networks:  # which are there before the step
            for tensor in (*network.parameters(), *network.buffers()):
                self.seen[tensor.untyped_storage()] = None

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
        self.peak = max(self.peak, self.live)
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self.seen:
            return
        self.seen[storage] = None
        size = storage.nbytes()
        self.live += size
        # A storage lives as long as any tensor, view or node of autograd's graph that holds it.
        weakref.finalize(storage, self._remove, size).atexit = False

    def _remove(self, size: int) -> None:
        self.live -= size


class _Float32Norms(TorchFunctionMode):
    """CUDA's autocast on fake CPU tensors: norms and softmax take and give float32.

    https://docs.pytorch.org/docs/stable/amp.html#cuda-ops-that-can-autocast-to-float32, as far as
    our networks use them.
    """

    FUNCTIONS = (
        torch.group_norm,
        torch.layer_norm,
        torch.softmax,
        Tensor.softmax,
        nn.functional.group_norm,
        nn.functional.layer_norm,
        nn.functional.softmax,
    )

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self.FUNCTIONS and args[0].is_floating_point():
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))
