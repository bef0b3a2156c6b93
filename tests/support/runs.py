"""Runs and learners for tests, made from flat options as on a command line."""

from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch import nn

from latentdiff.options import compose, group
from latentdiff.training.accelerator import ComputeConfig, ParallelConfig
from latentdiff.training.ema import EMAConfig
from latentdiff.training.learner import Learner
from latentdiff.training.optimizer import OptimizerConfig
from latentdiff.training.run import LoopConfig


@dataclass(frozen=True)
class Options:
    """What every script's configuration has."""

    loop: LoopConfig = group(LoopConfig)
    optimizer: OptimizerConfig = group(OptimizerConfig)
    ema: EMAConfig = group(EMAConfig)
    compute: ComputeConfig = group(ComputeConfig)
    parallel: ParallelConfig = group(ParallelConfig)


def options(**flat: Any) -> Options:
    """A configuration of options that stand in any of its groups."""
    return compose(Options, flat)


def make_learner(
    model: nn.Module,
    accelerator: Accelerator | None = None,
    *,
    ema: bool = True,
    kind: type[Learner] = Learner,
    **flat: Any,
) -> Learner:
    """A learner by the options of any group; without `ema` it tracks no average."""
    config = options(**flat)
    return kind(
        model,
        Accelerator(cpu=True, mixed_precision="no") if accelerator is None else accelerator,
        optimizer=config.optimizer,
        max_steps=config.loop.max_steps,
        ema=config.ema if ema else None,
        compute=config.compute,
        sharding=config.parallel.sharding,
    )
