"""The precisions that a device computes in."""

from typing import Literal

import torch

from latentdiff.formats.header import short_repr

Precision = torch.dtype | Literal["auto"] | None
"""What weights become: a dtype, `choose_dtype`'s with "auto", or with None what they are."""

SLOW_BF16 = "{}: this device does not compute in bfloat16 and takes many times as long; {} does not"


def choose_dtype(precision: Precision, device: str | torch.device | None) -> torch.dtype | None:
    """The dtype of a precision; "auto" is bfloat16 where the device computes in it, else float32.

    Without a device it is the CPU. Raises ValueError for another word.
    """
    if precision is None or isinstance(precision, torch.dtype):
        return precision
    if precision != "auto":
        raise ValueError(
            f"dtype={short_repr(precision)} must be a dtype such as torch.float16, 'auto' or None"
        )
    device = torch.device("cpu" if device is None else device)
    return torch.bfloat16 if computes_bf16(device) else torch.float32


def computes_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 natively; CPUs with AMX have avx512_bf16 too."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def one_dtype(dtype: Precision, torch_dtype: Precision) -> Precision:
    """The dtype by either of its names; ValueError if both are given and differ."""
    if torch_dtype is None:
        return dtype
    if dtype not in (torch.float32, torch_dtype):
        raise ValueError(
            f"dtype={dtype} and torch_dtype={torch_dtype} are two names of one option; give one"
        )
    return torch_dtype
