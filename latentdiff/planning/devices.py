"""What processors can do at most, and how much memory they have."""

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter

import torch


@dataclass(frozen=True)
class Device:
    """What a processor can do at most: FLOP/s by precision, and its memory in bytes."""

    flops: Mapping[str, float]
    memory: float | None = None

    @property
    def precision(self) -> str:
        """What mixed_precision "auto" is there."""
        return "bf16" if "bf16" in self.flops else "no"


def _gpu(memory: int, fp32: float, fp16: float, *, bf16: bool = True) -> Device:
    peaks = {"no": fp32 * 1e12, "fp16": fp16 * 1e12}
    return Device(peaks | ({"bf16": fp16 * 1e12} if bf16 else {}), memory * 2**30)


DEVICES = {
    "t4": _gpu(16, 8.1, 65, bf16=False),
    "v100-32gb": _gpu(32, 15.7, 125, bf16=False),
    "rtx-3090": _gpu(24, 35.6, 71),
    "rtx-4090": _gpu(24, 82.6, 165.2),
    "l4": _gpu(24, 30.3, 121),
    "l40s": _gpu(48, 91.6, 362),
    "a100-40gb": _gpu(40, 19.5, 312),
    "a100-80gb": _gpu(80, 19.5, 312),
    "h100": _gpu(80, 67, 989),
    "h200": _gpu(141, 67, 989),
}
"""GiB and peak TFLOP/s (float32 without tensor cores; half precision with float32 sums, dense).

What NVIDIA states for T4, V100 (SXM), L4, L40S, A100 (SXM), H100 (SXM), H200 (SXM) and the RTX
cards, half of it where that is with sparsity. Of the half-precision peaks those of A100, H100 and
RTX 4090 were compared with published pages, the others not."""


def measure_cpu(precision: str | None = None) -> Device:
    """This machine's processor: the rate of a product of two matrices, in a second or so."""
    names = {"no": torch.float32}
    if precision == "bf16" or (precision is None and torch.cpu._is_avx512_bf16_supported()):
        names["bf16"] = torch.bfloat16
    rates = {}
    for name, dtype in names.items():
        a = torch.ones(1024, 1024, dtype=dtype)
        torch.mm(a, a)  # the first call also chooses its kernel
        seconds = []
        for _ in range(5):
            start = perf_counter()
            torch.mm(a, a)
            seconds.append(perf_counter() - start)
        rates[name] = 2 * 1024**3 / min(seconds)
    return Device(rates)
