"""AdamW with moments of eight bits (Dettmers et al. 2021, https://arxiv.org/abs/2110.02861).

bitsandbytes computes it: a moment is a byte a number, an index into a table of 256 values, times
the largest of its block of 256. Here it is only made, and its state brought into the form of a
checkpoint.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

MIN_SIZE = 4096
"""Smaller parameters, such as biases and norms, keep moments in float32."""
BLOCK = 256  # bitsandbytes' own


def make_adamw8bit(
    parameters: Sequence[nn.Parameter],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW8bit; raises ValueError where bitsandbytes is not installed."""
    try:
        library: Any = import_module("bitsandbytes.optim")
    except ImportError as error:
        raise ValueError(
            "optimizer='adamw8bit' needs bitsandbytes (pip install bitsandbytes); "
            "optimizer='adamw' does not"
        ) from error
    return library.AdamW8bit(
        parameters, lr=lr, betas=betas, weight_decay=weight_decay, min_8bit_size=MIN_SIZE
    )


def moment_bytes(n: int) -> int:
    """Bytes of both moments of a parameter with n numbers, and of their blocks' largest."""
    return 2 * 4 * n if n < MIN_SIZE else 2 * (n + 4 * -(-n // BLOCK))


def to_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A parameter's state as tensors that share no memory with another's.

    The number of steps is none, and the tables are the same two tensors for all parameters.
    """
    tensors = {key: torch.as_tensor(value) for key, value in state.items()}
    return {key: t.clone() if key.startswith("qmap") else t for key, t in tensors.items()}


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The inverse of `to_tensors`."""
    return {key: int(value) if key == "step" else value for key, value in tensors.items()}
