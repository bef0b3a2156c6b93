"""fit(): the one training loop; it owns cadence, resume and logging, a script owns its step."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor
from tqdm.auto import tqdm

from latentdiff.training.checkpoint import load_checkpoint, save_checkpoint
from latentdiff.training.config import write_config
from latentdiff.training.learner import Learner
from latentdiff.training.plots import plot_log

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class LoopConfig:
    """How long, how often, and where to."""

    output_dir: Path = Path("run")
    """The run folder; if it holds checkpoints, the run goes on from the newest."""
    max_steps: int = 1000
    batch_size: int = 32
    """Examples of one step, of all processes together."""
    seed: int = 0
    log_every: int = 20
    preview_every: int = 500
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """auto: bf16 where the processor computes in it, else no."""

    def __post_init__(self) -> None:
        counts = ("max_steps", "batch_size", "log_every", "preview_every", "checkpoint_every")
        for name in (*counts, "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")


def make_accelerator(config: LoopConfig) -> Accelerator:
    """The accelerator of this run; ValueError if the processes cannot share the batch evenly."""
    precision = config.mixed_precision
    if precision == "auto":
        device = PartialState().device
        assert device is not None
        precision = "bf16" if computes_bf16(device) else "no"
    accelerator = Accelerator(mixed_precision=precision)
    if config.batch_size % accelerator.num_processes:
        raise ValueError(
            f"batch_size={config.batch_size} must be divisible by the "
            f"{accelerator.num_processes} processes"
        )
    return accelerator


def computes_bf16(device: torch.device) -> bool:
    """Whether the device has bfloat16 arithmetic of its own."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def fit(
    step: Callable[[Any, int], Metrics],
    data: Callable[[int], Iterator[Any]],
    learners: Mapping[str, Learner],
    config: LoopConfig,
    accelerator: Accelerator,
    *,
    settings: str,
    save: Callable[[Path], None],
    preview: Callable[[Path], None] | None = None,
) -> None:
    """Train until `config.max_steps`, going on from the newest checkpoint of the run folder.

    `step(batch, number)` updates the learners and returns scalar tensors, `loss` among them.
    `settings` is the script's configuration as YAML, kept in the run folder as config.yaml.
    `data(number)` gives the batches from that step on. `save(folder)` writes the trained model
    and `preview(path)` a picture grid; both are called on the main process alone.
    """
    folder = config.output_dir
    start = load_checkpoint(folder / "checkpoints", learners)
    main = accelerator.is_main_process
    if main:  # after loading: a configuration that does not fit must not replace the one that does
        write_config(settings, folder)
    log = Log(folder / "log.jsonl", start) if main else None
    progress = tqdm(
        total=config.max_steps, initial=start, disable=not main, unit="step", dynamic_ncols=True
    )
    sums: Metrics = {}
    since, clock = start, time.perf_counter()
    batches = data(start)
    with progress:  # closed in any case: messages begin on a line of their own
        for number in range(start, config.max_steps):
            metrics = step(next(batches), number)
            # Sums stay on the device: reading one here would wait for it in every step.
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0) + value.detach().float()
            progress.update()
            done = number + 1
            last = done == config.max_steps
            checkpoint = done % config.checkpoint_every == 0 or last
            # Before a checkpoint too: no mean reaches back over a place where runs are resumed.
            if done % config.log_every == 0 or checkpoint:
                sums = accelerator.reduce(sums, "mean")  # pyright: ignore[reportAssignmentType]
                means = {name: float(value) / (done - since) for name, value in sums.items()}
                record = {"step": done, **means}
                learner = next(iter(learners.values()))
                record["learning_rate"] = learner.config.learning_rate_at(learner.num_updates - 1)
                seconds = time.perf_counter() - clock
                record["samples_per_second"] = config.batch_size * (done - since) / seconds
                progress.set_postfix_str(
                    f"loss={record['loss']:.4f}, {record['samples_per_second']:.1f} pictures/s"
                )
                if log is not None:
                    log.write(record)
                sums, since, clock = {}, done, time.perf_counter()
            pause = time.perf_counter()
            if main and preview is not None and (done % config.preview_every == 0 or last):
                (folder / "previews").mkdir(exist_ok=True)
                preview(folder / "previews" / f"step-{done:07d}.png")
            if main and checkpoint:
                save(folder / "model")
                plot_log(folder / "log.jsonl", folder / "loss.png")
                # Last: a run that is cut off before it is resumed before it and writes all of them.
                save_checkpoint(
                    folder / "checkpoints", done, learners, keep=config.keep_checkpoints
                )
            clock += time.perf_counter() - pause  # the rate is that of training alone
    accelerator.wait_for_everyone()
    accelerator.end_training()


class Log:
    """`log.jsonl`: one JSON object a logged step; what a crash left after the checkpoint goes."""

    def __init__(self, path: Path, start: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        with path.open("rb+") as file:
            size = 0
            for line in file:
                if _step(line) > start:
                    break
                size += len(line)
            file.truncate(size)
        self.path = path

    def write(self, record: dict[str, float]) -> None:
        """Append one record."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _step(line: bytes) -> float:
    """The step of a logged line; infinite for a line that a crash cut short."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except ValueError:
        return math.inf
