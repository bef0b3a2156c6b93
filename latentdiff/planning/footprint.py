"""The memory and arithmetic of one training step, found by running it on fake tensors.

Fake tensors have shapes and types but no memory: every operator that would run is seen with what
it allocates, forward and backward, autocast's copies among them, and what Python and autograd free
is freed at the same moment as in a real step. So nothing here is a rule of thumb; what is left out
is what happens inside a single kernel and in the allocator. A sharded network (FSDP2) runs in a
fake process group of the full size: what its blocks all-gather and reduce-scatter is seen as well.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from latentdiff.planning.tally import Tally
from latentdiff.training.accelerator import Sharding
from latentdiff.training.adamw8bit import moment_bytes
from latentdiff.training.blocks import blocks, checkpoint_activations, local, shard
from latentdiff.training.deepspeed import BUCKET
from latentdiff.training.muon import hidden_matrices

Model = Callable[..., Any]
"""A network, called under the autocast of its training."""


@dataclass(frozen=True)
class Workload:
    """A training step as functions that make real tensors, or others in torch's modes."""

    model: Callable[[], nn.Module]
    """Parameters that need no gradient are frozen, as in `Learner`."""
    loss: Callable[[Model, Sequence[Model], int], Tensor]
    """`loss(model, frozen, n)`: () for n examples, which it makes up."""
    frozen: Callable[[], Sequence[nn.Module]] = tuple
    """Networks beside the model that are not trained, as the text encoder beside the UNet."""
    left_out: float = 0.0
    """Forward passes without gradients that `loss` leaves out, being like others that it has; in
    passes of the model, as `loss` evaluates it for n examples."""


@dataclass(frozen=True)
class Execution:
    """How the network is trained, in the words of the scripts' options."""

    precision: str = "no"
    """"no", "bf16" or "fp16"."""
    gradient_checkpointing: bool = False
    processes: int = 1
    sharding: Sharding = "none"
    """"none" in one process."""
    optimizer: str = "adamw"
    """"adamw", "adamw8bit" or "muon"."""
    gpu: bool = False
    """Autocast keeps norms and softmax in float32, as CUDA's does and the CPU's does not."""


@dataclass(frozen=True)
class Footprint:
    """Counts of one process's step; memory in bytes, arithmetic in FLOP (a product is two)."""

    execution: Execution
    num_parameters: int
    """Trainable parameters of the full model."""
    weights: int
    """Parameters and buffers of the full model."""
    local_weights: int
    """What this process holds of them between steps: its shard, or all."""
    averaged: int
    """What an average has of its own: all of `weights` but frozen parameters."""
    local_averaged: int
    optimizer_state: int
    """Of the full model: AdamW has two moments of each trained parameter, Muon one."""
    local_optimizer_state: int
    frozen: int
    """Parameters and buffers of the frozen networks."""
    num_frozen: int
    """Parameters that are not trained, of the model and of the frozen networks."""
    activations: int
    """What the forward pass saves for the backward pass, the batch included."""
    forward_allocated: int
    """All that the forward pass allocates, what it frees again included."""
    step_peak: int
    """The largest sum of activations, gradients and temporaries at any moment of the step."""
    forward_flop: int
    """The model's forward pass of one micro-batch, of which there is a backward pass."""
    step_flop: int
    """Forward and backward passes of one micro-batch, the frozen networks' forward passes, and the
    model's own without a backward pass."""

    def resident(self, *, averages: int) -> dict[str, int]:
        """What this process holds all the time, in bytes, by name; `averages`: the EMA and others.

        With several processes DDP holds the gradients once more, in the buckets that it reduces;
        ZeRO's buckets are smaller, and its partition of weights and gradients is a copy. A sharded
        network has its EMA in full as well. Frozen weights are in no average and have no moments.
        """
        full = 4 * self.num_parameters
        partition = -(-full // self.execution.processes)
        resident = {"weights": self.local_weights, "frozen networks": self.frozen}
        match self.execution.sharding:
            case "full":
                resident["optimizer state"] = self.local_optimizer_state
                resident["weight averages"] = self.averaged + averages * self.local_averaged
            case "none":
                resident["optimizer state"] = self.optimizer_state
                resident["weight averages"] = averages * self.averaged
                resident["gradient buckets"] = full if self.execution.processes > 1 else 0
            case "zero1" | "zero2":
                resident["optimizer state"] = 2 * partition
                resident["weight averages"] = averages * self.averaged
                resident["weight and gradient partition"] = 2 * partition
                resident["gradient buckets"] = min(full, 4 * BUCKET)
        return resident


def footprint(
    workload: Workload,
    micro_batch_size: int,
    *,
    accumulation: int = 1,
    execution: Execution = Execution(),
) -> Footprint:
    """Run a step of `accumulation` micro-batches on fake tensors.

    Two are enough for any number: from the second on each finds gradients already there. The
    arithmetic is that of one micro-batch.
    """
    fake = FakeTensorMode()
    with ExitStack() as stack:
        model, frozen = _fake_networks(workload, fake)
        weights, averaged = nbytes(model), _bytes_of(_averaged(model))
        optimizer_state = _optimizer_state(model, execution.optimizer)
        as_cuda = execution.gpu and execution.precision != "no"
        _prepare(model, execution, stack, as_cuda=as_cuda)
        tally = Tally([model, *frozen])
        forward = _CountedForward(autocast(model, execution.precision), tally)
        frozen_forwards = [autocast(network, execution.precision) for network in frozen]
        activations = allocated = flop = 0
        with fake, _Float32Norms() if as_cuda else nullcontext(), tally:
            for _ in range(min(accumulation, 2)):
                before, flop, forward.flop = tally.live, tally.flop, 0
                allocated = tally.allocated
                loss = workload.loss(forward, frozen_forwards, micro_batch_size) / accumulation
                activations = max(activations, tally.live - before)
                allocated = tally.allocated - allocated
                loss.backward()
                del loss
        return Footprint(
            execution=execution,
            num_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            weights=weights,
            local_weights=nbytes(model),
            averaged=averaged,
            local_averaged=_bytes_of(_averaged(model)),
            optimizer_state=optimizer_state,
            local_optimizer_state=_optimizer_state(model, execution.optimizer),
            frozen=sum(map(nbytes, frozen)),
            num_frozen=_num_frozen([model, *frozen]),
            activations=activations,
            forward_allocated=allocated,
            step_peak=tally.peak,
            forward_flop=forward.flop,
            step_flop=tally.flop - flop + round(workload.left_out * forward.flop),
        )


def _prepare(model: nn.Module, execution: Execution, stack: ExitStack, *, as_cuda: bool) -> None:
    """Checkpointing and sharding as `Learner` does them, for as long as `stack` is open."""
    if execution.gradient_checkpointing:
        for block in blocks(model) if as_cuda else ():
            block.forward = partial(_with_float32_norms, block.forward)
        checkpoint_activations(model)
    match execution.sharding:
        case "full":
            stack.enter_context(_fake_process_group(execution.processes))
            shard(model, "cpu", execution.processes)
        case "zero2":  # a gradient is reduced, and freed, as soon as it is there
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        case _:
            pass


def _fake_networks(
    workload: Workload, fake: FakeTensorMode
) -> tuple[nn.Module, Sequence[nn.Module]]:
    """The model and the frozen networks on fake tensors.

    peft converts what it adds to a layer, which fake tensors do not allow, unless that has no
    device yet.
    """
    with torch.device("meta"):
        model, frozen = workload.model(), workload.frozen()
    with fake:
        for network in (model, *frozen):
            network._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))
    return model, frozen


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
    """Bytes of the network's parameters and buffers in this process."""
    return _bytes_of([*network.parameters(), *network.buffers()])


def _averaged(network: nn.Module) -> list[Tensor]:
    """What an average of the network has of its own: `Learner` shares what is frozen."""
    return [*_trained(network), *network.buffers()]


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [p for p in network.parameters() if p.requires_grad]


def _num_frozen(networks: Sequence[nn.Module]) -> int:
    parameters = [p for network in networks for p in network.parameters()]
    return sum(p.numel() for p in parameters if not p.requires_grad)


def _optimizer_state(network: nn.Module, optimizer: str) -> int:
    """Bytes of what the optimizer keeps in this process."""
    trained = _trained(network)
    if optimizer == "adamw8bit":
        return sum(moment_bytes(p.numel()) for p in trained)
    matrices = hidden_matrices(network) if optimizer == "muon" else []
    return 2 * _bytes_of(trained) - _bytes_of(matrices)


def _bytes_of(tensors: Sequence[Tensor]) -> int:
    """What this process holds of the tensors."""
    held = (local(one) if isinstance(one, DTensor) else one for one in tensors)
    return sum(one.numel() * one.element_size() for one in held)


@contextmanager
def _fake_process_group(processes: int) -> Iterator[None]:
    """A process group in which this process has rank 0, and whose messages go nowhere."""
    # torch's own, for estimates such as this one, though it is not among the public modules.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _CountedForward:
    """The model, whose forward passes' arithmetic is counted on its own."""

    def __init__(self, model: Model, tally: Tally) -> None:
        self.model, self.tally, self.flop = model, tally, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = self.tally.flop
        output = self.model(*args, **kwargs)
        if torch.is_grad_enabled():  # not what a student's teacher does
            self.flop += self.tally.flop - before
        return output


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
    """The forward pass under `_Float32Norms`, which is off when the backward pass repeats it."""
    with _Float32Norms():
        return forward(*args, **kwargs)
