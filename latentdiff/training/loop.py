"""fit(): the one training loop. It owns cadence, resume and logging; a task owns its step."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from tqdm.auto import tqdm

from latentdiff.formats.weights import load_json
from latentdiff.training.by_heart import ERRORS_FILE, HeldOutErrors
from latentdiff.training.checkpoint import load_checkpoint, save_checkpoint
from latentdiff.training.checkpoint_files import MANIFEST, origin, saying_what_is_kept
from latentdiff.training.ema_synthesis import save_snapshot
from latentdiff.training.learner import Learner
from latentdiff.training.logging.card import write_card
from latentdiff.training.logging.log import Log
from latentdiff.training.logging.meter import Meter, Metrics
from latentdiff.training.logging.plots import plot_log
from latentdiff.training.logging.report import write_data, write_report
from latentdiff.training.logging.trackers import finishing, start_trackers, track_image
from latentdiff.training.nonfinite import first_nonfinite_module
from latentdiff.training.processes import STOPPED, StopSignals
from latentdiff.training.randomness import MicroBatch, micro_batches
from latentdiff.training.run import Run
from latentdiff.training.validation import VAL_ERRORS

NOTABLE_WAIT = 0.02  # fraction of the time; above it more num_workers help


class Task(Protocol):
    """What `fit` trains: the learners of one module, their step, validation, preview and saving."""

    @property
    def learners(self) -> Mapping[str, Learner]:
        """The learners by name, which their checkpoint files have."""
        ...

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Digests of the data and the frozen networks: a checkpoint made with others is refused."""
        ...

    @property
    def data_summary(self) -> Mapping[str, Any] | None:
        """What data.json and the report say of the data."""
        ...

    def step(self, batch: Any, step: int, micro_batch: MicroBatch) -> Metrics:
        """Update the learners on one micro-batch; returns scalar metrics, `loss` among them."""
        ...

    def validate(self) -> Metrics:
        """Scalar metrics, or none, and VAL_ERRORS, by which it is noticed that images are learned
        by heart; called in every process, with each `ema` up to date."""
        ...

    def preview(self, path: Path) -> None:
        """Write an image grid; called in the main process alone, with each `ema` up to date."""
        ...

    def save(self, folder: Path) -> None:
        """Write the trained model; called in the main process alone, with each `ema` up to date."""
        ...


def fit(task: Task, loader: Callable[[int], Iterator[Any]], run: Run) -> None:
    """Train until `max_steps`, going on from the newest checkpoint of the run folder.

    `loader(step)` returns this process's batches from that step on.

    After SIGTERM, SIGUSR1 or Control-C in any process all finish their step, write a checkpoint and
    raise SystemExit(143), or 130. Raises ValueError when `max_nonfinite_steps` steps in a row had
    no finite gradient, and when a file cannot be read or written.
    """
    loop, config, accelerator = _Loop(task, run), run.config.loop, run.accelerator
    stopped = 0
    # The bar is closed in any case, so that messages begin on a line of their own.
    with (
        run.folder,
        saying_what_is_kept(run.folder.checkpoints),
        StopSignals(run.processes) as signals,
        finishing(accelerator),
        tqdm(disable=not accelerator.is_main_process, unit="step") as progress,
    ):
        begun = done = loop.resume()
        progress.total, progress.initial, progress.n = config.max_steps, done, done
        if done:
            progress.write(f"going on from step {done}")
        meter = Meter(accelerator, task.learners, done, batch_size=config.batch_size)
        batches = loader(done)
        if done < config.max_steps:  # after the data, whose workers should not be their children
            start_trackers(accelerator, run.folder.configuration, done)
        while done < config.max_steps and not stopped:
            signals.ask()
            with meter.waiting():
                batch = next(batches)
            meter.add(loop.take_step(batch, done))
            progress.update()
            done += 1
            stopped = signals.answer()
            last = done == config.max_steps
            checkpoint = done % config.checkpoint_every == 0 or last or stopped > 0
            # Before a checkpoint too: a resumed run could not know the means since the last log.
            log = done % config.log_every == 0 or checkpoint
            # Reading a number makes the host wait for the device, which costs nothing on a CPU.
            if log or accelerator.device.type == "cpu":
                loop.check_finite(batch, done - 1)
            record = meter.read(done) if log else None
            with meter.paused():  # the rate is that of training alone
                if record is not None:
                    progress.set_postfix_str(_shown(record))
                    loop.log(record)
                loop.act(done, checkpoint=checkpoint, stopped=stopped > 0)
        if begun == done:
            loop.end(done)
        accelerator.wait_for_everyone()
    accelerator.end_training()
    if stopped and done < config.max_steps:
        by = "Control-C" if stopped == STOPPED["SIGINT"] else "a signal"
        accelerator.print(f"stopped by {by} after step {done}; the same command goes on there")
    else:
        accelerator.print(f"the model is in {run.folder.path / 'model'}")
    if stopped:
        raise SystemExit(stopped)


class _Loop:
    """What `fit` does in a step and between steps; `done` is the number of finished steps."""

    def __init__(self, task: Task, run: Run) -> None:
        self.task, self.run = task, run
        self.processes, self.folder = run.processes, run.folder.path
        self.manifest: dict[str, Any] = {
            "configuration": run.folder.configuration,
            "fingerprints": dict(task.fingerprints),
        }
        if (path := run.config.loop.resume_from) is not None:
            self.manifest["resumed_from"] = origin(run.folder.checkpoints, path)
        self._start, self._held_out = 0, None

    def resume(self) -> int:
        """Load the newest checkpoint and open the log there; returns its step, or 0."""
        start = load_checkpoint(
            self.run.folder.checkpoints,
            self.task.learners,
            manifest=self.manifest,
            path=self.run.config.loop.resume_from,
            processes=self.processes,
        )
        # After loading: a configuration that does not fit must not replace the one that does.
        self.processes.on_main(self.run.folder.write_config)
        if (summary := self.task.data_summary) is not None:
            self.processes.on_main(lambda: write_data(self.folder, summary))
        self._log = self.processes.on_main(lambda: Log(self.folder / "log.jsonl", start))
        self._start = start
        return start

    def take_step(self, batch: Any, step: int) -> Metrics:
        """One optimizer step; returns the task's metrics, averaged over the local micro-batches."""
        batches = micro_batches(batch, self.run.config.parallel.gradient_accumulation_steps)
        count, means = len(batches), Metrics()
        for number, micro_batch in enumerate(batches):
            index = self.processes.rank * count + number
            with ExitStack() as stack:
                if number + 1 < count:  # gradients are all-reduced once per step
                    for learner in self.task.learners.values():
                        stack.enter_context(self.run.accelerator.no_sync(learner.forward_model))
                metrics = self.task.step(
                    micro_batch, step, MicroBatch(index, self.processes.count * count)
                )
            for name, value in metrics.items():
                # A gradient norm is that of the full step, and comes with the last micro-batch.
                weight = 1.0 if name.startswith("grad_norm") else 1.0 / count
                means[name] = means.get(name, 0) + weight * value.detach().float()
        return means

    def check_finite(self, batch: Any, step: int) -> None:
        """Raise ValueError if the last steps were all skipped; repeating one shows the reason."""
        learners, limit = self.task.learners, self.run.config.loop.max_nonfinite_steps
        if all(int(learner.skipped_in_a_row) < limit for learner in learners.values()):
            return
        networks = {name: learner.model for name, learner in learners.items()}
        with first_nonfinite_module(networks) as phrases:
            self.take_step(batch, step)
        first = next((p for local in self.processes.gather(phrases) for p in local), "in the loss")
        advice = "a lower learning_rate may help"
        if first.startswith("the input of"):
            advice = "the data or the latent cache may be damaged: make it anew"
        raise ValueError(
            f"step {step + 1}: the gradient was not finite for {limit} steps in a row, and the "
            f"first number that was not is {first}; the weights are those before these steps; "
            f"{advice}"
        )

    def log(self, record: Mapping[str, float]) -> None:
        """Write a record into log.jsonl and to the trackers."""
        self.processes.on_main(lambda: self._log.write(record))
        numbers = {name: value for name, value in record.items() if name != "step"}
        self.run.accelerator.log(numbers, step=int(record["step"]))

    def act(self, done: int, *, checkpoint: bool, stopped: bool) -> None:
        """Do what is due after a step; after a signal, which leaves little time, a checkpoint only.

        The checkpoint comes last: a run that is killed before that resumes from an older one, and
        does the rest again.
        """
        config, snapshot_every = self.run.config.loop, self.run.config.ema.snapshot_every
        last = done == config.max_steps
        if done % snapshot_every == 0 or last:
            self._snapshot(done)
        if stopped and not last:
            self._checkpoint(done, stopped=True)
        if done % config.validate_every == 0 or last:
            self._validate(done)
        if done % config.preview_every == 0 or last:
            self._preview(done)
        if checkpoint and (last or not stopped):
            self._save()
            self._checkpoint(done)

    def end(self, done: int) -> None:
        """Of a run with no step left: save the model, if a signal left no time for it."""
        checkpoint = self.run.folder.checkpoints / f"step-{done}" / MANIFEST
        if checkpoint.is_file() and load_json(checkpoint).get("stopped"):
            self._save()
        if done > self.run.config.loop.max_steps:
            self.run.accelerator.print(
                f"max_steps={self.run.config.loop.max_steps} is behind: the model is step {done}'s"
            )

    def _snapshot(self, done: int) -> None:
        for name, learner in self.task.learners.items():
            if snapshots := learner.snapshots():
                path = self.folder / "ema" / name
                self.processes.on_main(partial(save_snapshot, path, done, snapshots))

    def _validate(self, done: int) -> None:
        self._gather()
        metrics = self.task.validate()
        errors = metrics.pop(VAL_ERRORS, None)
        if metrics:
            self.log({"step": done} | {name: float(value) for name, value in metrics.items()})
        if errors is not None:
            self.processes.on_main(lambda: self._watch(done, errors))

    def _watch(self, done: int, errors: Tensor) -> None:
        """Say it if the held-out examples have become worse, and save a model that is the best.

        The bar is not broken by what is said.
        """
        if self._held_out is None:
            self._held_out = HeldOutErrors(self.folder / ERRORS_FILE, self._start)
        if sentence := self._held_out.add(done, errors):
            tqdm.write(sentence)
        if self.run.config.loop.save_best and self._held_out.best_step == done:
            self.task.save(self.folder / "best")

    def _preview(self, done: int) -> None:
        path = self.folder / "previews" / f"step-{done:07d}.png"

        def draw() -> None:
            path.parent.mkdir(exist_ok=True)
            self.task.preview(path)
            track_image(self.run.accelerator, path, done)

        self._gather()
        self.processes.on_main(draw)

    def _save(self) -> None:
        self._gather()
        self.processes.on_main(lambda: self.task.save(self.folder / "model"))
        log = self.folder / "log.jsonl"
        self.processes.on_main(lambda: plot_log(log, self.folder / "loss.png"))
        self.processes.on_main(lambda: write_report(self.folder))
        self.processes.on_main(lambda: write_card(self.folder))

    def _checkpoint(self, done: int, *, stopped: bool = False) -> None:
        save_checkpoint(
            self.run.folder.checkpoints,
            done,
            self.task.learners,
            keep=self.run.config.loop.keep_checkpoints,
            manifest=self.manifest | ({"stopped": True} if stopped else {}),
            processes=self.processes,
        )

    def _gather(self) -> None:
        for learner in self.task.learners.values():
            learner.gather()


def _shown(record: Mapping[str, float]) -> str:
    """A record as the progress bar shows it."""
    phrases = [f"loss={record['loss']:.4f}"]
    if "grad_norm" in record:
        phrases.append(f"grad_norm={record['grad_norm']:.2g}")
    phrases.append(f"{record['samples_per_second']:.1f} images/s")
    if record["data_wait"] > NOTABLE_WAIT:
        phrases.append(f"{record['data_wait']:.0%} waiting for data")
    phrases.append(f"{record['memory'] / 2**30:.1f} GiB")
    return ", ".join(phrases)
