"""A network's repeated blocks, the units of activation checkpointing, compilation and sharding."""

import warnings
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from latentdiff.models.dit import CrossBlock, JointBlock
from latentdiff.models.group_norm import GroupNorm
from latentdiff.models.layers import ResnetBlock, SpatialAttention, SpatialTransformer

KINDS = (ResnetBlock, SpatialAttention, SpatialTransformer, CrossBlock, JointBlock)
MAX_SHAPES = 256  # of a class of blocks: widths, sizes of images, and batch sizes
CLIP_KIND = "CLIPEncoderLayer"  # a name, since importing transformers' CLIP takes seconds


def blocks(network: nn.Module) -> list[nn.Module]:
    """The residual, attention and transformer blocks of a UNet, a DiT, a VAE or a CLIP."""
    return [
        module
        for module in network.modules()
        if isinstance(module, KINDS) or type(module).__name__ == CLIP_KIND
    ]


def checkpoint_activations(network: nn.Module) -> None:
    """Gradient checkpointing (Chen et al. 2016): the backward pass runs each block forward again.

    A block saves its input alone, so that one block's activations are in memory at a time, for a
    third more arithmetic. The gradients have the same bits: dropout, too, is repeated as it was.
    """
    draws = any(isinstance(module, nn.Dropout) and module.p > 0 for module in network.modules())
    for block in blocks(network):
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=draws
        )


def compile_blocks(network: nn.Module) -> None:
    """Compile each block, and each norm that is in none, on its own: equal ones are compiled once.

    It needs a C++ compiler on a CPU.
    A class of blocks is compiled for each shape that occurs: code for any shape is slower, and in
    channels_last cannot always be made. torch keeps the compiled code on disk for later runs.
    """
    _allow_many_shapes()
    compiled = blocks(network)
    inside = {module for block in compiled for module in block.modules()}
    norms = [m for m in network.modules() if isinstance(m, GroupNorm) and m not in inside]
    # torch itself looks at the gradient of what a norm gets, and then warns of having looked.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    for module in (*compiled, *norms):
        module.compile(dynamic=False)


def compile_network(network: nn.Module, *, graph: bool) -> None:
    """Compile the whole forward pass, and with it the backward pass.

    `graph`: on a CUDA device the kernels of each are recorded and launched at once (CUDA graphs),
    so that the host has next to nothing to do. What the network returns is then overwritten when it
    is called again. On a CPU there is no difference.
    """
    _allow_many_shapes()
    mode = "reduce-overhead" if graph else None
    network.forward = torch.compile(network.forward, dynamic=False, mode=mode)


def _allow_many_shapes() -> None:
    from torch._dynamo import config  # importing it takes seconds

    config.recompile_limit = max(MAX_SHAPES, config.recompile_limit)


def shard(network: nn.Module, device_type: str, processes: int) -> None:
    """FSDP2: shard weights, gradients and moments over all processes by rows.

    Each block's weights are all-gathered for as long as it runs, and its gradients are
    reduce-scattered (ZeRO stage 3, Rajbhandari et al. 2020). Raises ValueError for a network with a
    parameter that has no rows.
    """
    for name, parameter in network.named_parameters():
        if parameter.ndim == 0:
            raise ValueError(f"sharding='full' must be 'none' here: {name} cannot be split")
    mesh = init_device_mesh(device_type, (processes,))
    for block in blocks(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def local(tensor: Tensor) -> Tensor:
    """This process's rows of a sharded tensor; any other tensor as it is."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_rows(full: Tensor, like: Tensor) -> Tensor:
    """This process's rows of a full tensor, sharded as `like` is; all of them if `like` is not."""
    if not isinstance(like, DTensor):
        return full
    # As torch.chunk cuts, but for the last processes, which may have none.
    size = -(-len(full) // like.device_mesh.size())
    start = like.device_mesh.get_local_rank() * size
    return full[start : start + size]


def gathered(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `local_rows`: the full tensor. Every process must call it."""
    return as_dtensor(rows, like).full_tensor() if isinstance(like, DTensor) else rows


def as_dtensor(rows: Tensor, like: DTensor) -> DTensor:
    """The sharded tensor of which every process passes its local rows."""
    return DTensor.from_local(
        rows,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
