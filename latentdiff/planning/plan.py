"""The plan of a training run: its arithmetic, memory, time and disk, before anything starts.

It follows from the configuration of train_unet.py, train_vae.py, train_clip.py or distill.py,
complete as --print_config writes it; of the data only the number of images matters.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

from latentdiff.planning.devices import Device
from latentdiff.planning.fitting import Fitting, find_fitting
from latentdiff.planning.footprint import Execution, Footprint, footprint
from latentdiff.planning.settings import network_config, positive_int
from latentdiff.planning.workload import cache_bytes_per_image, kept_state_bytes, make_workload
from latentdiff.training.accelerator import ParallelConfig, Sharding, check_divisible
from latentdiff.training.optimizer import Optimizer, check_sharding

HEAP_OF_ALLOCATED, HEAP_OF_WEIGHTS = 0.22, 0.1
"""On a CPU: bytes that glibc's heap keeps beside tensors, for each byte that a forward pass
allocates (what is freed leaves gaps), and for each of the weights (which kernels copy into another
order for a moment). Measured with torch 2.12.1 on Linux; docs/scaling.md has the runs."""
MARGIN = 0.1
"""Fraction of a GPU's memory that is left to driver, workspaces and fragmentation: assumed."""


@dataclass(frozen=True)
class Plan:
    """What was counted for one process, and what follows for the run; bytes, FLOP and seconds."""

    kind: str
    """The network: "unet", "dit", "vae" or "clip"."""
    micro_batch_size: int
    """Examples of one process's micro-batch."""
    footprint: Footprint
    resident: Mapping[str, int]
    peak: float
    """Of one process; on the CPU with the heap's overhead, without Python and its libraries."""
    read_peak: int
    """On a CPU, while `init` is read, all of whose networks are then in float32."""
    memory_limit: float | None
    """The memory that a process may take, or None if that of the device is not known."""
    max_micro_batch_size: int | None
    """The largest that stays under the limit, 0 if none does, None without a limit."""
    forward_flop: float
    """The model's forward pass, per image."""
    training_flop: float
    """Forward, backward and the frozen networks, per image."""
    images_per_second: float
    """Of all processes together."""
    cache_bytes_per_image: int | None
    """In the latent cache, at most; None for a network that is not trained on latents."""
    checkpoint_bytes: int
    """Weights, averages and moments of one checkpoint, of all processes together."""
    snapshot_bytes: int
    """The averages of `ema_lengths` in float16, as one step's snapshots keep them."""

    @property
    def fits(self) -> bool:
        """Whether the peak is within the limit, as it is where none is known."""
        return self.memory_limit is None or max(self.peak, self.read_peak) <= self.memory_limit


def make_plan(
    settings: Mapping[str, Any],
    *,
    device: Device,
    gpu: bool,
    processes: int = 1,
    memory: float | None = None,
    efficiency: float = 0.4,
    images: int | None = None,
) -> Plan:
    """Run the configured training step on fake tensors, and say what follows.

    `memory` (bytes) replaces that of the device; `efficiency` is the fraction of the device's peak
    FLOP/s that training reaches; `images` are those of the data set, None for many. Raises
    ValueError, naming the key, for settings that are missing or do not fit together.
    """
    for name, value in (("processes", processes), ("efficiency", efficiency), ("memory", memory)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value} must be positive")
    kind, _ = network_config(settings)
    micro_batch_size = _micro_batch_size(settings, processes)
    execution = _execution(settings, device=device, gpu=gpu, processes=processes)
    num_lengths = len(settings.get("ema_lengths") or ())
    estimate = partial(_estimate, settings, execution, images)
    measured, resident, peak = estimate(micro_batch_size)
    limit = device.memory if memory is None else memory
    largest = None
    if limit is not None:
        limit *= 1 - MARGIN if gpu else 1.0
        largest = _largest(lambda n: estimate(n)[2], micro_batch_size, peak, limit)
    read_peak = _read_peak(settings, measured)
    if limit is not None and read_peak > limit:
        largest = 0
    training_flop = measured.step_flop / micro_batch_size
    flops = processes * efficiency * device.flops[execution.precision]
    return Plan(
        kind=kind,
        micro_batch_size=micro_batch_size,
        footprint=measured,
        resident=resident,
        peak=peak,
        read_peak=read_peak,
        memory_limit=limit,
        max_micro_batch_size=largest,
        forward_flop=measured.forward_flop / micro_batch_size,
        training_flop=training_flop,
        images_per_second=flops / training_flop,
        cache_bytes_per_image=cache_bytes_per_image(settings),
        checkpoint_bytes=measured.averaged
        + 4 * measured.num_parameters * (1 + num_lengths)
        + measured.optimizer_state,
        snapshot_bytes=2 * measured.num_parameters * num_lengths,
    )


def find_fitting_options(
    settings: Mapping[str, Any],
    plan: Plan,
    *,
    device: Device,
    gpu: bool,
    processes: int = 1,
    images: int | None = None,
) -> Fitting | None:
    """The options that make the planned run fit, or None where it does; each is planned with."""
    if plan.memory_limit is None or plan.fits:
        return None

    def peak(settings: Mapping[str, Any]) -> float:
        execution = _execution(settings, device=device, gpu=gpu, processes=processes)
        micro_batch_size = _micro_batch_size(settings, processes)
        measured, _, peak = _estimate(settings, execution, images, micro_batch_size)
        return max(peak, _read_peak(settings, measured))

    half = next((name for name in ("bf16", "fp16") if name in device.flops), None)
    return find_fitting(
        settings, plan.footprint.execution, peak_of=peak, limit=plan.memory_limit, half=half
    )


def _estimate(
    settings: Mapping[str, Any], execution: Execution, images: int | None, micro_batch_size: int
) -> tuple[Footprint, dict[str, int], float]:
    """What is counted, what one process holds all the time, and its peak; both in bytes."""
    workload = make_workload(
        settings,
        processes=execution.processes,
        gpu=execution.gpu,
        precision=execution.precision,
    )
    measured = footprint(
        workload,
        micro_batch_size,
        accumulation=positive_int(settings, "gradient_accumulation_steps", 1),
        execution=execution,
    )
    resident = measured.resident(averages=1 + len(settings.get("ema_lengths") or ()))
    resident["text states"] = kept_state_bytes(settings, images)
    return measured, *_memory(measured, resident)


def _micro_batch_size(settings: Mapping[str, Any], processes: int) -> int:
    batch_size = positive_int(settings, "batch_size")
    accumulation = positive_int(settings, "gradient_accumulation_steps", 1)
    check_divisible(batch_size, ParallelConfig(gradient_accumulation_steps=accumulation), processes)
    return batch_size // (processes * accumulation)


def _execution(
    settings: Mapping[str, Any], *, device: Device, gpu: bool, processes: int
) -> Execution:
    """How the settings have the network run; ValueError for a value that they cannot have."""
    precision = settings.get("mixed_precision", "auto")
    precision = device.precision if precision == "auto" else precision
    sharding = settings.get("sharding", "none")
    gradient_checkpointing = settings.get("gradient_checkpointing", False)
    optimizer = settings.get("optimizer", "adamw")
    for name, value, allowed in (
        ("mixed_precision", precision, sorted(device.flops)),
        ("sharding", sharding, get_args(Sharding)),
        ("gradient_checkpointing", gradient_checkpointing, (True, False)),
        ("optimizer", optimizer, get_args(Optimizer)),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(map(str, allowed))} here")
    if processes > 1 and sharding != "none" and precision == "fp16":
        raise ValueError(f"mixed_precision='fp16' must be bf16 or no with sharding={sharding!r}")
    check_sharding(optimizer, sharding)
    return Execution(
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        processes=processes,
        sharding=sharding if processes > 1 else "none",
        optimizer=optimizer,
        gpu=gpu,
    )


def _memory(measured: Footprint, resident: dict[str, int]) -> tuple[dict[str, int], float]:
    """What one process holds all the time, by name, and its peak; both in bytes."""
    execution = measured.execution
    peak = sum(resident.values()) + measured.step_peak
    if execution.gpu:
        return resident, peak
    if execution.sharding == "full":  # the network is complete at first, and the heap keeps that
        resident["weights before sharding"] = measured.weights
        peak += measured.weights
    heap = HEAP_OF_ALLOCATED * measured.forward_allocated
    heap += HEAP_OF_WEIGHTS * (measured.weights + measured.frozen)
    return resident, peak + heap


def _read_peak(settings: Mapping[str, Any], measured: Footprint) -> int:
    if settings.get("init") is None or measured.execution.gpu:
        return 0
    of_lora = settings.get("lora") is not None
    return 4 * (measured.num_frozen + (0 if of_lora else measured.num_parameters))


def _largest(peak_of: Callable[[int], float], n: int, peak: float, limit: float) -> int:
    """The most examples whose peak stays under the limit, from the peak of n.

    The peak is the largest of linear functions of the number of examples, and so convex: a line
    through two points is above it between them, and below it beyond them.
    """
    other = n + 1 if n == 1 else 1
    peaks = {n: peak, other: peak_of(other)}
    if peaks[1] > limit:
        return 0

    def crossing(a: int, b: int) -> int:
        """Where the line through two points comes to the limit."""
        return a + int((limit - peaks[a]) * (b - a) / (peaks[b] - peaks[a]))

    while max(peaks.values()) <= limit:
        more = 1 + crossing(*sorted(peaks)[-2:])
        peaks[more] = peak_of(more)
    while True:
        fit = sorted(n for n in peaks if peaks[n] <= limit)
        a, b = fit[-1], min(n for n in peaks if peaks[n] > limit)
        if b == a + 1:
            return a
        # Each of the lines moves one end alone, and little where the peak is far from a line.
        tries = [crossing(a, b), (a + b) // 2, *(1 + crossing(c, a) for c in fit[-2:-1])]
        n = min(max(tries[len(peaks) % len(tries)], a + 1), b - 1)
        peaks[n] = peak_of(n)
