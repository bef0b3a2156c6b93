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
from latentdiff.training.learner import Learner, OptimizerConfig
from latentdiff.training.meter import Metrics
from latentdiff.training.processes import Processes
from latentdiff.training.randomness import Share, generator
from latentdiff.training.run_folder import RunFolder
from latentdiff.training.setup import LoopConfig, make_accelerator
from support.scripts import without_curves

STEPS = 6


def small_run(
    folder: Path,
    *,
    until: int | None = None,
    validate: Callable[[Learner], Metrics] | None = None,
    ema_lengths: tuple[float, ...] = (),
    **fields: Any,
) -> Accelerator:
    """Train, logged at each step, with checkpoints at 3 and 6; Control-C comes in step `until`."""
    options: dict[str, Any] = {"log_every": 1, "preview_every": STEPS, "checkpoint_every": 3}
    config = LoopConfig(
        output_dir=folder, max_steps=STEPS, batch_size=2, mixed_precision="no", **(options | fields)
    )
    accelerator = make_accelerator(config)
    torch.manual_seed(0)
    optimizer = OptimizerConfig(
        learning_rate=1e-2, max_steps=STEPS, warmup_steps=1, ema_lengths=ema_lengths
    )
    learner = Learner(nn.Linear(3, 3), optimizer, accelerator)

    def step(batch: Tensor, number: int, share: Share) -> Metrics:
        if number == until:
            raise KeyboardInterrupt
        loss = (learner.model(batch) - batch).square().mean()
        return {"loss": loss, "grad_norm": learner.update(loss, share)}

    def data(start: int) -> Iterator[Tensor]:
        for number in range(start, STEPS):
            yield torch.randn(2, 3, generator=generator(0, number, "data"))

    with without_curves():
        loop.fit(
            step,
            data,
            {"net": learner},
            config,
            accelerator,
            RunFolder(folder, "seed: 0\nname: '<b>猫</b>'\n", Processes(accelerator)),
            save=lambda path: path.mkdir(exist_ok=True),
            preview=lambda path: Image.new("RGB", (6, 4), (255, 0, 0)).save(path),
            validate=None if validate is None else lambda: validate(learner),
        )
    return accelerator


def logged(folder: Path) -> list[dict[str, float]]:
    """The records of a run folder's log."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
