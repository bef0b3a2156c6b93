"""How a run computes: the options of precision, memory and processes, and the accelerator."""

import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import GeneralTracker
from accelerate.utils import parse_flag_from_env

from latentdiff.models.precision import computes_bf16
from latentdiff.options import option

Sharding = Literal["none", "full", "zero1", "zero2"]
OFF = ("false", "0", "no", "n", "off", "f", "")
ELSEWHERE: Mapping[str, tuple[Sequence[str], str]] = {
    "ACCELERATE_USE_FSDP": (OFF, "--sharding full"),
    "ACCELERATE_USE_DEEPSPEED": (OFF, "--sharding zero2"),
    "ACCELERATE_USE_MEGATRON_LM": (OFF, "--sharding full"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (OFF, "--sharding full"),
    "ACCELERATE_DYNAMO_BACKEND": (("no",), "--compile true"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (("1",), "--gradient_accumulation_steps"),
    "ACCELERATE_MIXED_PRECISION": (("no", "bf16", "fp16"), "--mixed_precision"),
}
"""Variables by which accelerate would do what the scripts have an option for, or a second time: the
values that are allowed, and the option. docs/training.md says what becomes of all the others."""
DROPPED = {
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "gradient_clipping": "--max_grad_norm",
}
"""Options of `accelerate launch` that reach no script unless DeepSpeed is on, and the script's."""
MIN_COMPILED_STEPS = 4000
"""Shorter runs can end before they have won back the minutes that compiling takes."""


@dataclass(frozen=True)
class ComputeConfig:
    """Precision, and what trades memory for time; nothing here changes the loss function."""

    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """auto: bf16 where the processor computes in it, else no."""
    gradient_checkpointing: bool = option(False, may_change=True)
    """Recompute each block's activations in the backward pass instead of storing them."""
    compile: bool | Literal["auto", "network", "graph"] = option("auto", may_change=True)
    """true: compile the blocks of the network, each by itself (torch.compile), which are then in
    channels_last: minutes at the start, faster steps. network: compile it as a whole. graph: the
    same, and on a CUDA device its kernels are launched as one graph. auto: true in a run of 4,000
    steps or more that computes in bf16, on images of one size, where there are a C++ compiler and
    Python's headers."""
    in_memory: bool = option(False, may_change=True)
    """Hold all images, or all latents, on the device that trains, and all captions as tokens in
    memory: no step reads, decodes or tokenises anything, and num_workers only decode at first."""


@dataclass(frozen=True)
class ParallelConfig:
    """How a global batch is split into micro-batches, and a network sharded over processes."""

    gradient_accumulation_steps: int = option(1, may_change=True, former_name="accumulation")
    """Micro-batches that each process splits its batch into: less memory, the same step."""
    sharding: Sharding = option("none", may_change=True)
    """full: weights, gradients, moments and averages are sharded over the processes (FSDP2); zero1:
    the moments alone, zero2: the gradients too (DeepSpeed)."""
    timeout: int = option(1800, may_change=True)
    """Seconds for which a process waits for the others before the run ends with an error."""

    def __post_init__(self) -> None:
        for name in ("gradient_accumulation_steps", "timeout"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def make_accelerator(
    compute: ComputeConfig, parallel: ParallelConfig, trackers: Sequence[GeneralTracker] = ()
) -> Accelerator:
    """The accelerator of a run.

    Raises ValueError for what accelerate's variables must not ask for (see `check_environment`),
    and for fp16 on a CPU.
    """
    check_environment()
    cpu = uses_cpu()
    state = PartialState(cpu=cpu, timeout=timedelta(seconds=parallel.timeout))
    assert state.device is not None
    precision = choose_precision(compute.mixed_precision, state.device)
    accelerator = Accelerator(
        cpu=cpu, mixed_precision=precision, log_with=[*trackers] if trackers else None
    )
    if accelerator.num_processes == 1 and parallel.sharding != "none":
        accelerator.print(f"--sharding {parallel.sharding} shards nothing in one process")
    if (asked := asked_precision()) not in ("no", precision):
        accelerator.print(f"--mixed_precision {precision} goes before accelerate's {asked}")
    return accelerator


def exact_accelerator() -> Accelerator:
    """An accelerator for what is written once, and so in float32.

    Raises ValueError for what accelerate's variables must not ask for (see `check_environment`).
    """
    check_environment()
    return Accelerator(cpu=uses_cpu(), mixed_precision="no")


def check_environment() -> None:
    """Raise ValueError where accelerate's variables ask for what the script has an option for.

    `accelerate launch` sets them by its options and its configuration file. Options that it drops
    are refused too, where the system tells how it was called (Linux).
    """
    for name, (allowed, ours) in ELSEWHERE.items():
        value = os.environ.get(name, allowed[0])
        if value.lower() not in allowed:
            raise ValueError(
                f"{name}={value} must be {allowed[0]}: it is accelerate's own, from its options, "
                f"its configuration file or the environment; give the script {ours} in its place"
            )

    for name, ours in DROPPED.items():
        if name in _launchers_options():
            raise ValueError(
                f"accelerate launch --{name} does not reach the script; give {ours} after the "
                "script's name in its place"
            )


def _launchers_options() -> set[str]:
    """The names of the options that this process's `accelerate launch` has for itself."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").split("\0")
        words = words[: words.index(sys.argv[0])]
    except (OSError, ValueError):  # another system, or another launcher
        return set()
    if not any("accelerate" in word for word in words):
        return set()
    named = (word.partition("=")[0] for word in words if word.startswith("--"))
    return {name.removeprefix("--").replace("-", "_") for name in named}


def asked_precision() -> str:
    """The precision that accelerate was told, which is "no" too where it was told none."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()


def choose_precision(wanted: str, device: torch.device) -> str:
    """The precision that is asked for; for "auto" accelerate's, or what the device computes in.

    Raises ValueError for fp16 on a CPU, where accelerate would compute in float32 and not say so.
    """
    precision = asked_precision() if wanted == "auto" else wanted
    if wanted == "auto" and precision == "no" and computes_bf16(device):
        precision = "bf16"
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("mixed_precision=fp16 must be bf16 or no on a CPU, which has none of it")
    return precision


def decide_compile(
    compute: ComputeConfig,
    parallel: ParallelConfig,
    *,
    precision: str,
    max_steps: int,
    num_sizes: int,
) -> bool | Literal["network", "graph"]:
    """Whether a run that computes in `precision`, on images of so many sizes, is compiled, how."""
    if compute.compile != "auto":
        return compute.compile
    compiler, *_ = shlex.split(os.environ.get("CXX", "g++"))
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return (
        precision == "bf16"
        and max_steps >= MIN_COMPILED_STEPS
        and num_sizes == 1
        and parallel.sharding == "none"
        and shutil.which(compiler) is not None
        and headers.exists()
    )


def check_divisible(batch_size: int, parallel: ParallelConfig, num_processes: int) -> None:
    """Raise ValueError if a global batch cannot be split into micro-batches of one size."""
    count = num_processes * parallel.gradient_accumulation_steps
    if batch_size % count:
        raise ValueError(
            f"batch_size={batch_size} must be divisible by {count}: {num_processes} processes with "
            f"gradient_accumulation_steps={parallel.gradient_accumulation_steps}"
        )


def check_compile(compute: ComputeConfig, parallel: ParallelConfig) -> None:
    """Raise ValueError for ways of compiling that do not go with a sharding or micro-batches."""
    way = compute.compile
    if way in ("network", "graph") and parallel.sharding != "none":
        raise ValueError(
            f"compile={way!r} must be true or false with sharding={parallel.sharding!r}, which "
            "gathers weights block by block"
        )
    if way == "graph" and parallel.gradient_accumulation_steps > 1:
        raise ValueError(
            "compile='graph' must be 'network', true or false with gradient_accumulation_steps="
            f"{parallel.gradient_accumulation_steps}: the next micro-batch overwrites its gradients"
        )


def uses_cpu() -> bool:
    """Whether training is on CPUs; unless accelerate is told so, each process would train alone."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
