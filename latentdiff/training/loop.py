"""fit(): the one training loop; it owns cadence, resume and logging, a script owns its step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env
from tqdm.auto import tqdm

from latentdiff.training.checkpoint import load_checkpoint, save_checkpoint
from latentdiff.training.finite import watching
from latentdiff.training.learner import Learner
from latentdiff.training.meter import Log, Meter, Metrics
from latentdiff.training.plots import plot_log
from latentdiff.training.processes import StopSignals
from latentdiff.training.randomness import Share
from latentdiff.training.report import write_report
from latentdiff.training.run_folder import RunFolder

STOPPED = 143
"""Exit code of a run that a signal stopped: 128 + 15, as shells and batch systems know SIGTERM."""


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

    def __post_init__(self) -> None:
        counts = ("max_steps", "batch_size", "log_every", "preview_every", "checkpoint_every")
        more = ("accumulation", "keep_checkpoints", "max_bad_steps", "timeout")
        for name in (*counts, *more):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")


def make_accelerator(config: LoopConfig) -> Accelerator:
    """The accelerator of this run; ValueError if the processes cannot share the batch evenly."""
    cpu = uses_cpu()
    state = PartialState(cpu=cpu, timeout=timedelta(seconds=config.timeout))
    precision = config.mixed_precision
    if precision == "auto":
        assert state.device is not None
        precision = "bf16" if computes_bf16(state.device) else "no"
    accelerator = Accelerator(cpu=cpu, mixed_precision=precision)
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


def fit(
    step: Callable[[Any, int, Share], Metrics],
    data: Callable[[int], Iterator[Any]],
    learners: Mapping[str, Learner],
    config: LoopConfig,
    accelerator: Accelerator,
    run: RunFolder,
    *,
    save: Callable[[Path], None],
    preview: Callable[[Path], None] | None = None,
    fingerprints: Mapping[str, str] | None = None,
) -> None:
    """Train until `config.max_steps`, going on from the newest checkpoint of the run folder.

    `step(batch, number, share)` works on one part of the global batch, hands its loss to the
    learners and returns scalar tensors, `loss` among them. `data(number)` gives this process's
    parts from that step on. `save(folder)` writes the trained model and `preview(path)` a picture
    grid; both are called on the main process alone. `fingerprints` say what the data and frozen
    networks are: a checkpoint made with others is refused.

    SIGTERM or SIGUSR1 in any process makes all write a checkpoint after the step that they are in
    and raise SystemExit(143). Raises ValueError when `max_bad_steps` steps in a row had no finite
    gradient, and for what cannot be read or written.
    """
    processes, folder = run.processes, run.path
    main = accelerator.is_main_process
    manifest = {"configuration": run.configuration, "fingerprints": dict(fingerprints or {})}

    def take_step(parts: Sequence[Any], number: int) -> Metrics:
        """One step of the optimizers: means of what `step` gives over this process's parts."""
        sums: Metrics = {}
        for part, batch in enumerate(parts):
            index = processes.rank * len(parts) + part
            with ExitStack() as stack:
                if part + 1 < len(parts):  # the processes join their gradients once a step
                    for learner in learners.values():
                        stack.enter_context(accelerator.no_sync(learner.model))
                metrics = step(batch, number, Share(index, processes.count * len(parts)))
            for name, value in metrics.items():
                # A gradient's norm is one of the whole step, and comes with its last part.
                weight = 1.0 if name.startswith("grad_norm") else 1.0 / len(parts)
                sums[name] = sums.get(name, 0) + weight * value.detach().float()
        return sums

    def check_finite(parts: Sequence[Any], number: int) -> None:
        """Stop if the last steps were all left out; taken again, the step shows what was wrong."""
        if all(int(one.skipped_in_a_row) < config.max_bad_steps for one in learners.values()):
            return
        with watching({name: learner.raw for name, learner in learners.items()}) as found:
            take_step(parts, number)
        places = [place for all_found in processes.gather(found) for place in all_found]
        raise ValueError(
            f"step {number}: the gradient was not finite for {config.max_bad_steps} steps in a "
            f"row, and the first number that was not is {(places or ['in the loss'])[0]}; "
            "the weights are those before these steps; a lower learning_rate may help"
        )

    def draw(path: Path) -> None:
        assert preview is not None
        path.parent.mkdir(exist_ok=True)
        preview(path)

    def keep(done: int, *, results: bool) -> None:
        if results:
            processes.on_first(lambda: save(folder / "model"))
            processes.on_first(lambda: plot_log(folder / "log.jsonl", folder / "loss.png"))
            processes.on_first(lambda: write_report(folder))
        # Last: a run that is cut off before it is resumed before it and writes all of them.
        save_checkpoint(
            run.checkpoints,
            done,
            learners,
            keep=config.keep_checkpoints,
            manifest=manifest,
            processes=processes,
        )

    stopped = False
    # The bar is closed in any case, so that messages begin on a line of their own.
    with run, StopSignals(processes) as stop, tqdm(disable=not main, unit="step") as progress:
        start = load_checkpoint(
            run.checkpoints,
            learners,
            manifest=manifest,
            path=config.resume_from,
            processes=processes,
        )
        # After loading: a configuration that does not fit must not replace the one that does.
        processes.on_first(run.write_config)
        log = Log(folder / "log.jsonl", start) if main else None
        progress.total, progress.initial, progress.n = config.max_steps, start, start
        meter = Meter(accelerator, learners, start, batch_size=config.batch_size)
        batches = data(start)
        done = start
        while done < config.max_steps and not stopped:
            stop.ask()
            with meter.waiting():
                parts = [next(batches) for _ in range(config.accumulation)]
            meter.add(take_step(parts, done))
            progress.update()
            done += 1
            last = done == config.max_steps
            stopped = stop.answer()
            checkpoint = done % config.checkpoint_every == 0 or last or stopped
            logging = done % config.log_every == 0 or checkpoint
            # Reading a number makes the host wait for the device, which costs nothing on a CPU.
            if logging or accelerator.device.type == "cpu":
                check_finite(parts, done - 1)
            # Before a checkpoint too: no mean reaches back over a place where runs are resumed.
            record = meter.read(done) if logging else None
            if record is not None and log is not None:
                progress.set_postfix_str(
                    f"loss={record['loss']:.4f}, {record['samples_per_second']:.1f} pictures/s"
                )
                log.write(record)
            with meter.paused():  # the rate is that of training alone
                if preview is not None and (done % config.preview_every == 0 or last):
                    path = folder / "previews" / f"step-{done:07d}.png"
                    processes.on_first(lambda path=path: draw(path))
                if checkpoint:
                    # Whoever sent a signal may not wait for more than the checkpoint.
                    keep(done, results=not stopped or last)
        accelerator.wait_for_everyone()
    accelerator.end_training()
    if stopped:
        raise SystemExit(STOPPED)
