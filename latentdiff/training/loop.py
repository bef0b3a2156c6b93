"""fit(): the one training loop; it owns cadence, resume and logging, a script owns its step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

from latentdiff.training.checkpoint import load_checkpoint, origin, save_checkpoint
from latentdiff.training.ema import save_snapshot
from latentdiff.training.finite import watching
from latentdiff.training.learner import Learner
from latentdiff.training.meter import Log, Meter, Metrics
from latentdiff.training.plots import plot_log
from latentdiff.training.processes import StopSignals
from latentdiff.training.randomness import Share
from latentdiff.training.report import write_data, write_report
from latentdiff.training.run_folder import RunFolder
from latentdiff.training.setup import LoopConfig
from latentdiff.training.trackers import finishing, start_trackers, track_image

STOPPED = 143
"""Exit code of a run that a signal stopped: 128 + 15, as shells and batch systems know SIGTERM."""
NOTABLE_WAIT = 0.02  # of the time: more is worth more of num_workers


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
    validate: Callable[[], Metrics] | None = None,
    fingerprints: Mapping[str, str] | None = None,
    summary: Mapping[str, Any] | None = None,
) -> None:
    """Train until `config.max_steps`, going on from the newest checkpoint of the run folder.

    `step(batch, number, share)` works on one part of the global batch, hands its loss to the
    learners and returns scalar tensors, `loss` among them. `data(number)` gives this process's
    parts from that step on. `save(folder)` writes the trained model and `preview(path)` an image
    grid; both are called on the main process alone. `validate()` is called in every process and
    returns scalar tensors for the log; like the others it finds each learner's `ema` up to date.
    `fingerprints` say what the data and frozen networks are: a checkpoint made with others is
    refused. `summary` is what data.json and the report say of the data.

    SIGTERM or SIGUSR1 in any process makes all write a checkpoint after the step that they are in
    and raise SystemExit(143). Raises ValueError when `max_bad_steps` steps in a row had no finite
    gradient, and for what cannot be read or written.
    """
    processes, folder = run.processes, run.path
    main = accelerator.is_main_process
    manifest = {"configuration": run.configuration, "fingerprints": dict(fingerprints or {})}
    if config.resume_from is not None:
        manifest["resumed_from"] = origin(run.checkpoints, config.resume_from)

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
        first = (places or ["in the loss"])[0]
        advice = "a lower learning_rate may help"
        if first.startswith("the input of"):
            advice = "the data or the latent cache may be damaged: make it anew"
        raise ValueError(
            f"step {number + 1}: the gradient was not finite for {config.max_bad_steps} steps in a "
            f"row, and the first number that was not is {first}; the weights are "
            f"those before these steps; {advice}"
        )

    def write(record: Mapping[str, float]) -> None:
        processes.on_first(lambda: log.write(record))
        accelerator.log({k: v for k, v in record.items() if k != "step"}, step=int(record["step"]))

    def gather() -> None:
        for learner in learners.values():
            learner.gather()

    def show(done: int, preview: Callable[[Path], None]) -> None:
        def draw() -> None:
            path = folder / "previews" / f"step-{done:07d}.png"
            path.parent.mkdir(exist_ok=True)
            preview(path)
            track_image(accelerator, path, done)

        gather()
        processes.on_first(draw)

    def score(done: int, validate: Callable[[], Metrics]) -> None:
        gather()
        write({"step": done} | {name: float(value) for name, value in validate().items()})

    def keep_averages(done: int) -> None:
        for name, learner in learners.items():
            if found := learner.snapshots():
                path = folder / "ema" / name
                processes.on_first(partial(save_snapshot, path, done, found))

    def keep(done: int, *, results: bool) -> None:
        if results:
            gather()
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
    with (
        run,
        StopSignals(processes) as stop,
        finishing(accelerator),
        tqdm(disable=not main, unit="step") as progress,
    ):
        start = load_checkpoint(
            run.checkpoints,
            learners,
            manifest=manifest,
            path=config.resume_from,
            processes=processes,
        )
        # After loading: a configuration that does not fit must not replace the one that does.
        processes.on_first(run.write_config)
        if summary is not None:
            processes.on_first(lambda: write_data(folder, summary))
        log = processes.on_first(lambda: Log(folder / "log.jsonl", start))
        progress.total, progress.initial, progress.n = config.max_steps, start, start
        if start:
            progress.write(f"going on from step {start}")
        meter = Meter(accelerator, learners, start, batch_size=config.batch_size)
        batches = data(start)
        if start < config.max_steps:  # after the data, whose workers should not be their children
            start_trackers(accelerator, run.configuration, start)
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
            with meter.paused():  # the rate is that of training alone
                if record is not None:
                    progress.set_postfix_str(_shown(record))
                    write(record)
                if done % config.snapshot_every == 0 or last:
                    keep_averages(done)
                if stopped and not last:  # whoever sent a signal may not wait for more
                    keep(done, results=False)
                if validate is not None and (done % config.validate_every == 0 or last):
                    score(done, validate)
                if preview is not None and (done % config.preview_every == 0 or last):
                    show(done, preview)
                if checkpoint and (last or not stopped):
                    keep(done, results=True)
        accelerator.wait_for_everyone()
    accelerator.end_training()
    if stopped and done < config.max_steps:
        accelerator.print(f"stopped by a signal after step {done}; the same command goes on there")
    else:
        accelerator.print(f"the model is in {folder / 'model'}")
    if stopped:
        raise SystemExit(STOPPED)


def _shown(record: Mapping[str, float]) -> str:
    """What the progress bar says of a record."""
    parts = [f"loss={record['loss']:.4f}"]
    if "grad_norm" in record:
        parts.append(f"grad_norm={record['grad_norm']:.2g}")
    parts.append(f"{record['samples_per_second']:.1f} images/s")
    if record["data_wait"] > NOTABLE_WAIT:
        parts.append(f"{record['data_wait']:.0%} waiting for data")
    parts.append(f"{record['memory'] / 2**30:.1f} GiB")
    return ", ".join(parts)
