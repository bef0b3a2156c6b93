"""Timing side by side: interleaved rounds, ratios of paired medians, the machine's own ceiling."""

import random
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from latentdiff.models.precision import choose_dtype

RESAMPLES = 2000
WARMUPS = 2


@dataclass(frozen=True)
class Ceiling:
    """The best rates that this machine reached in this run: GFLOP/s, and GB/s copied."""

    product: float
    convolution: float
    copied: float
    precision: str

    def __str__(self) -> str:
        return (
            f"ceiling: products {self.product:.0f}, 3x3 convolutions {self.convolution:.0f} "
            f"GFLOP/s in {self.precision}, {self.copied:.0f} GB/s copied"
        )


def measure_ceiling(device: torch.device) -> Ceiling:
    """The rates of large products, of channels_last 3×3 convolutions, and of copies.

    In bf16, or in float32 where the device does not compute in that.
    """
    name, dtype = native(device)
    a = torch.randn(2048, 2048, dtype=dtype, device=device)
    x = torch.randn(64, 256, 16, 16, dtype=dtype, device=device)
    x = x.to(memory_format=torch.channels_last)
    weight = torch.randn(256, 256, 3, 3, dtype=dtype, device=device)
    weight = weight.to(memory_format=torch.channels_last)
    source = torch.empty(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Ceiling(
        product=2 * 2048**3 / _best(lambda: a @ a, device) / 1e9,
        convolution=2
        * x.numel()
        * 256
        * 9
        / _best(lambda: F.conv2d(x, weight, padding=1), device)
        / 1e9,
        copied=source.numel() / _best(lambda: target.copy_(source), device) / 1e9,
        precision=name,
    )


def native(device: torch.device) -> tuple[str, torch.dtype]:
    """The precision that is fast on the device, and its name in the tables' rows."""
    dtype = choose_dtype("auto", device)
    return ("bf16", torch.bfloat16) if dtype == torch.bfloat16 else ("float32", torch.float32)


def _best(call: Callable[[], Any], device: torch.device) -> float:
    return min(seconds_of(call, device) for _ in range(10))


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of a call, until the device has done all of it."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def interleave(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each call in each round: a round has each once, in an order of its own.

    What slows the machine down for a while slows all of them, and no call always follows the same.
    """
    for call in calls.values():
        for _ in range(WARMUPS):
            call()
    order = random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        names = list(calls)
        order.shuffle(names)
        for name in names:
            seconds[name].append(seconds_of(calls[name], device))
    return seconds


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> tuple[float, float, float]:
    """How many times as long theirs take: the ratio of medians, and its 95 % interval.

    The rounds are drawn again with replacement, theirs and ours of a round together (Efron 1979).
    """
    draw = random.Random(0)
    pairs = list(zip(theirs, ours, strict=True))

    def of(rounds: Sequence[tuple[float, float]]) -> float:
        return statistics.median(a for a, _ in rounds) / statistics.median(b for _, b in rounds)

    found = sorted(of(draw.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES))
    return of(pairs), found[int(0.025 * RESAMPLES)], found[int(0.975 * RESAMPLES)]


def peak_memory(device: torch.device) -> int:
    """Bytes that this process had at most: of the GPU, or of the machine on a CPU (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def machine(device: torch.device) -> str:
    """The processor or GPU, and what computes."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        name = f"{torch.get_num_threads()} threads, {found[1] if found else 'CPU'}"
    return f"{name}, torch {torch.__version__}"
