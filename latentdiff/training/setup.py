"""LoopConfig, what a script can be told of its training loop, and the accelerator it runs on."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env

from latentdiff.training.trackers import TrackerName, make_trackers


@dataclass(frozen=True)
class LoopConfig:
    """How long, how often, and where to."""

    output_dir: Path = Path("run")
    """The run folder; if it holds checkpoints, the run goes on from the newest."""
    max_steps: int = 1000
    batch_size: int = 32
    """Examples of one step, of all processes together."""
    accumulation: int = 1
    """Parts in which each process works through its share of the batch: less memory, same step."""
    seed: int = 0
    log_every: int = 20
    preview_every: int = 500
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """auto: bf16 where the processor computes in it, else no."""
    max_bad_steps: int = 10
    """The run stops after so many steps in a row whose gradient was not finite."""
    resume_from: Path | None = None
    """A checkpoint to go on from, such as run/checkpoints/step-500, in place of the newest."""
    timeout: int = 1800
    """Seconds for which a process waits for the others before the run ends with an error."""
    validate_every: int = 500
    snapshot_every: int = 500
    """Steps between two snapshots of the averages of `ema_lengths`."""
    report_to: Sequence[TrackerName] = ()
    """Trackers that get what log.jsonl gets, such as '[tensorboard]'; each must be installed."""

    def __post_init__(self) -> None:
        counts = ("max_steps", "batch_size", "log_every", "preview_every", "checkpoint_every")
        more = ("accumulation", "keep_checkpoints", "max_bad_steps", "timeout")
        for name in (*counts, *more, "validate_every", "snapshot_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")


def make_accelerator(config: LoopConfig) -> Accelerator:
    """The accelerator of this run, with its trackers.

    Raises ValueError for a tracker that is not installed, and if the processes cannot share the
    batch evenly.
    """
    for name, option in (("FSDP", "full"), ("DEEPSPEED", "zero2")):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise ValueError(
                f"accelerate's own {name} is on, from its options or its configuration file; "
                f"turn it off there and give the script --sharding {option}"
            )
    cpu = uses_cpu()
    state = PartialState(cpu=cpu, timeout=timedelta(seconds=config.timeout))
    precision = config.mixed_precision
    if precision == "auto":
        assert state.device is not None
        precision = "bf16" if computes_bf16(state.device) else "no"
    trackers = make_trackers(config.report_to, config.output_dir / "trackers")
    accelerator = Accelerator(
        cpu=cpu, mixed_precision=precision, log_with=[*trackers] if trackers else None
    )
    parts = accelerator.num_processes * config.accumulation
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size={config.batch_size} must be divisible by {parts}: "
            f"{accelerator.num_processes} processes with accumulation={config.accumulation}"
        )
    return accelerator


def uses_cpu() -> bool:
    """Whether training is on CPUs: what accelerate must be told, or else it joins no processes."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def computes_bf16(device: torch.device) -> bool:
    """Whether the device has bfloat16 arithmetic of its own."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
