"""Run: an open training run, that is its configuration, processes, accelerator and folder."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from latentdiff.models.precision import SLOW_BF16, computes_bf16
from latentdiff.options import changeable, option
from latentdiff.training.accelerator import (
    ComputeConfig,
    ParallelConfig,
    check_compile,
    check_divisible,
    decide_compile,
    make_accelerator,
)
from latentdiff.training.ema import EMAConfig
from latentdiff.training.learner import Learner
from latentdiff.training.logging.trackers import TrackerName, make_trackers
from latentdiff.training.optimizer import OptimizerConfig
from latentdiff.training.processes import Processes
from latentdiff.training.run_folder import RunFolder


@dataclass(frozen=True)
class LoopConfig:
    """How long a run is, how often it logs, validates, previews and saves, and where."""

    output_dir: Path = option(Path("run"), may_change=True)
    """The run folder; if it holds checkpoints, the run goes on from the newest."""
    max_steps: int = option(1000, may_change=True)
    """Optimizer steps of the whole run."""
    batch_size: int = 32
    """Examples of one optimizer step, over all processes."""
    seed: int = 0
    log_every: int = option(20, may_change=True)
    validate_every: int = option(500, may_change=True)
    preview_every: int = option(500, may_change=True)
    checkpoint_every: int = option(500, may_change=True)
    keep_checkpoints: int = option(2, may_change=True)
    save_best: bool = option(False, may_change=True)
    """Also write `best`, a model as `model` is, whenever the loss on held-out images is the least
    so far."""
    license: str = option("unknown", may_change=True)
    """Licence of the model, for its card, by the hub's names such as apache-2.0 and cc-by-4.0."""
    max_nonfinite_steps: int = option(10, may_change=True, former_name="max_bad_steps")
    """The run stops after so many steps in a row without a finite gradient."""
    resume_from: Path | None = option(None, may_change=True)
    """A checkpoint to go on from, such as run/checkpoints/step-500, in place of the newest."""
    report_to: Sequence[TrackerName] = option((), may_change=True)
    """Trackers that get what log.jsonl gets, such as '[tensorboard]'; each must be installed."""

    def __post_init__(self) -> None:
        for name in (
            *("max_steps", "batch_size", "log_every", "validate_every", "preview_every"),
            *("checkpoint_every", "keep_checkpoints", "max_nonfinite_steps"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not re.fullmatch(r"[a-z0-9.-]+", self.license):
            raise ValueError(
                f"license={self.license!r} must be a name as the hub has it, such as apache-2.0"
            )
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")


class RunConfig(Protocol):
    """What every script's configuration has, beside its own options."""

    @property
    def loop(self) -> LoopConfig:
        """How long, how often, and where."""
        ...

    @property
    def optimizer(self) -> OptimizerConfig:
        """The optimizer of each learner."""
        ...

    @property
    def ema(self) -> EMAConfig:
        """The averages of the weights."""
        ...

    @property
    def compute(self) -> ComputeConfig:
        """Precision and memory."""
        ...

    @property
    def parallel(self) -> ParallelConfig:
        """Micro-batches and processes."""
        ...


class Run:
    """A run whose folder is locked and whose process group is initialised.

    Raises ValueError for a tracker that is not installed, for options of computing that exclude
    each other, for a batch that cannot be split evenly over the processes, and for a folder that
    cannot be used (see `RunFolder`).
    """

    def __init__(self, config: RunConfig, settings: str) -> None:
        """`settings` is the full configuration as YAML."""
        self.config = config
        loop = config.loop
        check_compile(config.compute, config.parallel)
        trackers = make_trackers(loop.report_to, loop.output_dir / "trackers")
        self.accelerator = make_accelerator(config.compute, config.parallel, trackers)
        self.device = self.accelerator.device
        if (note := config.optimizer.shortfall(loop.max_steps)) is not None:
            self.accelerator.print(note)
        self.processes = Processes(self.accelerator, timeout=config.parallel.timeout)
        check_divisible(loop.batch_size, config.parallel, self.processes.count)
        self.folder = RunFolder(
            loop.output_dir,
            settings,
            self.processes,
            may_change=changeable(type(config)),
        )

    def compiled(self, *, num_sizes: int = 1) -> ComputeConfig:
        """The options of computing for a network that gets images of so many sizes.

        What "auto" has come to is printed.
        """
        compute, precision = self.config.compute, self.accelerator.mixed_precision
        way = decide_compile(
            compute,
            self.config.parallel,
            precision=precision,
            max_steps=self.config.loop.max_steps,
            num_sizes=num_sizes,
        )
        if precision == "bf16" and not computes_bf16(self.device):
            given, instead = "--mixed_precision bf16", "--mixed_precision no"
            self.accelerator.print(SLOW_BF16.format(given, instead))
        if "auto" in (compute.mixed_precision, compute.compile):
            self.accelerator.print(
                f"chosen: --mixed_precision {precision} --compile {str(way).lower()}"
            )
        return replace(compute, compile=way)

    def learner(self, model: nn.Module, **changes: Any) -> Learner:
        """A learner with this run's options; `changes` replace some of them (see `Learner`)."""
        config = self.config
        options: dict[str, Any] = {
            "optimizer": config.optimizer,
            "max_steps": config.loop.max_steps,
            "ema": config.ema,
            "sharding": config.parallel.sharding,
        }
        return Learner(model, self.accelerator, **(options | changes))
