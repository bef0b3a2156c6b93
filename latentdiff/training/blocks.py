"""A network's repeated blocks: what is recomputed, compiled and split over processes one by one."""

from functools import partial

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from latentdiff.models.dit import CrossBlock, JointBlock
from latentdiff.models.layers import ResnetBlock, SpatialAttention, SpatialTransformer

KINDS = (ResnetBlock, SpatialAttention, SpatialTransformer, CrossBlock, JointBlock)
CLIP_KIND = "CLIPEncoderLayer"  # by name: importing transformers' CLIP takes seconds


def blocks(network: nn.Module) -> list[nn.Module]:
    """The residual, attention and transformer blocks of a UNet, a DiT, a VAE or a CLIP."""
    return [
        module
        for module in network.modules()
        if isinstance(module, KINDS) or type(module).__name__ == CLIP_KIND
    ]


def recompute(network: nn.Module) -> None:
    """Gradient checkpointing: a block keeps its input alone and runs again in the backward pass.

    A third more arithmetic for the memory of one block's activations in place of all blocks'
    (Chen et al. 2016). The gradients have the same bits: no block draws random numbers.
    """
    for block in blocks(network):
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )


def compile_blocks(network: nn.Module) -> None:
    """Compile block by block, so that equal blocks are compiled once; needs a C++ compiler."""
    for block in blocks(network):
        block.compile()


def shard(network: nn.Module, device_type: str, processes: int) -> None:
    """FSDP2: split weights, gradients and moments over all processes by rows.

    Each block's weights are put together for as long as it runs, and its gradients are summed and
    split again (ZeRO stage 3, Rajbhandari et al. 2020). Raises ValueError for a network with a
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
    """What this process has of a tensor: its rows if it is split, else all of it."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_rows(whole: Tensor, like: Tensor) -> Tensor:
    """The rows of a whole tensor that this process has of `like`."""
    if not isinstance(like, DTensor):
        return whole
    # As torch.chunk cuts, but for the last processes, which may have none.
    size = -(-len(whole) // like.device_mesh.size())
    start = like.device_mesh.get_local_rank() * size
    return whole[start : start + size]


def joined(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `own_rows`, which every process must call."""
    return split(rows, like).full_tensor() if isinstance(like, DTensor) else rows


def split(rows: Tensor, like: DTensor) -> DTensor:
    """A tensor that is split as `like` is, from the rows of every process."""
    return DTensor.from_local(
        rows,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
