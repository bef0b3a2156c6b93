"""What one training step takes in memory and arithmetic, found by running it without any numbers.

The step runs on fake tensors, which have shapes and types but no memory: every operator that would
run is seen with what it allocates, forward and backward, autocast's copies among them, and what
Python and autograd let go of is freed at the same moment as in a real step. So nothing here is a
rule of thumb; what is left out is what happens inside a single kernel and in the allocator.
Where a network is split over processes (FSDP2), it is so here, too, in a group whose others are
made up: what its blocks gather and send is seen like the rest.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
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

from latentdiff.training.blocks import blocks, local, recompute, shard
from latentdiff.training.deepspeed import BUCKET

aten = torch.ops.aten

Sharding = Literal["none", "full", "zero1", "zero2"]

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
class Passes:
    """How a network is run; as OptimizerConfig and accelerate have it."""

    precision: str = "no"
    """"no", "bf16" or "fp16"."""
    gradient_checkpointing: bool = False
    processes: int = 1
    sharding: Sharding = "none"
    """Of no effect in one process."""
    gpu: bool = False
    """Autocast keeps norms and softmax in float32, as CUDA's does and the CPU's does not."""

    @property
    def split(self) -> Sharding:
        """How the processes really share a network."""
        return self.sharding if self.processes > 1 else "none"


@dataclass(frozen=True)
class Footprint:
    """Counts of one process's step; memory in bytes, arithmetic in FLOP (a product is two)."""

    passes: Passes
    parameters: int
    weights: int
    """Parameters and buffers of the whole model."""
    own_weights: int
    """What this process holds of them all the time."""
    frozen: int
    activations: int
    """What is kept from a forward pass for its backward pass, the batch included."""
    step: int
    """The largest sum of activations, gradients and temporaries at any moment of the step."""
    forward_flop: int
    """Of the model, one forward pass of one part."""
    step_flop: int
    """Of one part: forward and backward passes, and the frozen networks' forward passes."""

    def resident(self, *, averages: int) -> dict[str, int]:
        """What this process holds all the time, in bytes, by name; `averages`: the EMA and others.

        AdamW keeps two moments a parameter. With several processes DDP holds the gradients once
        more, in the buckets that it sends; ZeRO sends less at a time, and holds its own part of
        weights and gradients once more. A network that is split has its average whole as well.
        """
        whole = 4 * self.parameters
        part = -(-whole // self.passes.processes)
        held = {"weights": self.own_weights, "frozen networks": self.frozen}
        match self.passes.split:
            case "full":
                held["optimizer"] = 2 * self.own_weights
                held["averages"] = self.weights + averages * self.own_weights
            case "none":
                held["optimizer"] = 2 * whole
                held["averages"] = averages * self.weights
                held["buckets of gradients"] = whole if self.passes.processes > 1 else 0
            case "zero1" | "zero2":
                held["optimizer"] = 2 * part
                held["averages"] = averages * self.weights
                held["own weights and gradients"] = 2 * part
                held["buckets of gradients"] = min(whole, 4 * BUCKET)
        return held


def footprint(
    work: Work, batch: int, *, accumulation: int = 1, passes: Passes = Passes()
) -> Footprint:
    """Run a step of `accumulation` parts of `batch` examples each on fake tensors.

    Parts from the third on are like the second, which finds gradients already there. The
    arithmetic is that of one part.
    """
    fake = FakeTensorMode()
    with ExitStack() as stack:
        with fake:
            model, frozen = work.model(), work.frozen()
        weights = nbytes(model)
        as_cuda = passes.gpu and passes.precision != "no"
        if passes.gradient_checkpointing:
            for block in blocks(model) if as_cuda else ():
                block.forward = partial(_with_float32_norms, block.forward)
            recompute(model)
        match passes.split:
            case "full":
                stack.enter_context(_made_up_group(passes.processes))
                shard(model, "cpu", passes.processes)
            case "zero2":  # a gradient is sent, and gone, as soon as it is there
                for parameter in model.parameters():
                    parameter.register_post_accumulate_grad_hook(_drop_gradient)
            case _:
                pass
        tally = _Tally([model, *frozen])
        called = _Counted(autocast(model, passes.precision), tally)
        beside = [autocast(network, passes.precision) for network in frozen]
        activations = flop = 0
        with fake, _Float32Norms() if as_cuda else nullcontext(), tally:
            for _ in range(min(accumulation, 2)):
                before, flop, called.flop = tally.live, tally.flop, 0
                loss = work.loss(called, beside, batch) / accumulation
                activations = max(activations, tally.live - before)
                loss.backward()
                del loss
        return Footprint(
            passes=passes,
            parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            weights=weights,
            own_weights=nbytes(model),
            frozen=sum(map(nbytes, frozen)),
            activations=activations,
            step=tally.peak,
            forward_flop=called.flop,
            step_flop=tally.flop - flop,
        )


def autocast(model: Model, precision: str) -> Model:
    """The model as accelerate calls it in mixed precision."""
    if precision == "no":
        return model
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype=dtype):
            return model(*args, **kwargs)

    return call


def nbytes(network: nn.Module) -> int:
    """Bytes of the network's parameters and buffers, of what this process has of them."""
    tensors = [local(tensor) for tensor in (*network.parameters(), *network.buffers())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def _made_up_group(processes: int) -> Iterator[None]:
    """A process group of which this process is the first, and whose messages go nowhere."""
    # torch's own, for estimates such as this one, though it is not among the public modules.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


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
        self.sizes = WeakIdKeyDictionary()
        """Of each storage, how much of it is counted, in a list of one."""
        for network in networks:  # which are there before the step
            for tensor in (*network.parameters(), *network.buffers()):
                self.sizes[local(tensor).untyped_storage()] = [0]

    def __enter__(self) -> Self:
        # FSDP lets go of what it gathered by a size of 0, which is no operator.
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
        counted[0] = size
        self.peak = max(self.peak, self.live)


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


def _with_float32_norms(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """For a forward pass that is run again in the backward pass, where no such mode is on."""
    with _Float32Norms():
        return forward(*args, **kwargs)
