"""A run of six steps of a network of twelve numbers, for what a loop does around its steps."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from latentdiff.training import loop
from latentdiff.training.learner import Learner
from latentdiff.training.logging.meter import Metrics
from latentdiff.training.randomness import MicroBatch, generator
from latentdiff.training.run import Run
from support.runs import options
from support.scripts import without_curves

STEPS = 6


class SmallTask:
    """Makes the output of a linear layer its input."""

    fingerprints: dict[str, str] = {}  # noqa: RUF012 - nobody changes it
    data_summary = None

    def __init__(
        self, run: Run, until: int | None, validate: Callable[[Learner], Metrics] | None
    ) -> None:
        torch.manual_seed(0)
        self.learner = run.learner(nn.Linear(3, 3))
        self.learners = {"net": self.learner}
        self.until, self._validate = until, validate

    def step(self, batch: Tensor, step: int, micro_batch: MicroBatch) -> Metrics:
        if step == self.until:
            raise KeyboardInterrupt
        loss = (self.learner.forward_model(batch) - batch).square().mean()
        return {"loss": loss, "grad_norm": self.learner.update(loss, micro_batch)}

    def validate(self) -> Metrics:
        return {} if self._validate is None else self._validate(self.learner)

    def preview(self, path: Path) -> None:
        Image.new("RGB", (6, 4), (255, 0, 0)).save(path)

    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)


def small_run(
    folder: Path,
    *,
    until: int | None = None,
    validate: Callable[[Learner], Metrics] | None = None,
    **fields: Any,
) -> Accelerator:
    """Train, logged at each step, with checkpoints at 3 and 6; Control-C comes in step `until`."""
    defaults: dict[str, Any] = {"log_every": 1, "preview_every": STEPS, "checkpoint_every": 3}
    defaults |= {"max_steps": STEPS, "batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 1}
    config = options(output_dir=folder, mixed_precision="no", **(defaults | fields))
    run = Run(config, "seed: 0\nname: '<b>猫</b>'\n")

    def loader(start: int) -> Iterator[Tensor]:
        for step in range(start, STEPS):
            yield torch.randn(2, 3, generator=generator(0, step, "data"))

    with without_curves():
        loop.fit(SmallTask(run, until, validate), loader, run)
    return run.accelerator


def logged(folder: Path) -> list[dict[str, float]]:
    """The records of a run folder's log."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
