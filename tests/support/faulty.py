"""A toy training run, and the faults that can be made to happen in it.

Every process notes, at each step, what it drew and what its networks were: two runs whose notes are
equal were the same run. As a script it is started as users start theirs:
`torchrun --nproc-per-node 2 tests/support/faulty.py --folder F --fault.kind raise --fault.step 4`.
"""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from accelerate.tracking import TensorBoardTracker
from datasets import config as datasets_config
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from latentdiff.data.batches import batches
from latentdiff.data.config import DataConfig
from latentdiff.data.dataset import CaptionedImages
from latentdiff.diffusion import Diffusion
from latentdiff.tasks.denoiser.loss import LossConfig
from latentdiff.training import loop
from latentdiff.training.command_line import parse_config, run_script
from latentdiff.training.logging.meter import Metrics
from latentdiff.training.logging.trackers import TrackerName
from latentdiff.training.loop import fit
from latentdiff.training.randomness import MicroBatch, choose, generator
from latentdiff.training.run import Run
from support.runs import options

STEPS, SAMPLES, BATCH = 12, 36, 8  # an epoch is four and a half steps
WIDTH = 3
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
REMOVING = ("os.remove", "os.rmdir", "shutil.rmtree")
FLOW = Diffusion("flow", "flow_prediction")

Kind = Literal[
    "none", "kill", "full", "int", "term", "usr1", "raise", "exit", "segv", "sleep", "worker",
    "nan", "slow", "tracker",
]  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """What goes wrong, in process `rank`, while step number `step` is worked on or written."""

    kind: Kind = "none"
    """kill, full (disk), int, term, usr1: at `operation`, else at the step; raise, exit, segv,
    sleep, worker (is killed): at the step; nan: in the loss of each step from `step` to `until`;
    slow: each step takes `seconds`; tracker: its log raises from the step on."""
    step: int = 0
    """-1: before the first."""
    until: int = 0
    rank: int = 0
    operation: int = -1
    """At this one of the file operations in the run folder after the step began; -1: at none."""
    seconds: float = 0.0
    stop: int = -2
    """Whatever the kind, SIGTERM comes in this step as well."""


@dataclass(frozen=True)
class Toy:
    """How the run is set up."""

    folder: Path
    steps: int = STEPS
    gradient_accumulation_steps: int = 1
    checkpoint_every: int = 3
    keep: int = 2
    workers: int = 0
    seed: int = 1
    max_nonfinite_steps: int = 3
    timeout: int = 60
    looked_at: bool = False
    """Whether previews are drawn and the average is validated."""
    report_to: Sequence[TrackerName] = ()
    resume_from: Path | None = None
    notes: Path | None = None
    """Where the notes and the output of processes go, if not into the folder."""
    images: Path | None = None
    """A folder of captioned images to train on, in place of made-up samples."""
    disturbed: int = 0
    """The seed of the global generators, and how often they are used in each step."""
    fault: Fault = Fault()


class Samples(Dataset[dict[str, Any]]):
    """Examples `{"x": (WIDTH + 2,), "id": int, "captions": [str, …]}`."""

    def __init__(self) -> None:
        self.x = torch.randn(SAMPLES, WIDTH + 2, generator=torch.Generator().manual_seed(7))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        captions = [f"{index} {word}" for word in ("one", "two", "three")]
        return {"x": self.x[index], "id": index, "captions": captions}


class Images(Dataset[dict[str, Any]]):
    """Such examples of real images, whose captions are their numbers."""

    def __init__(self, folder: Path) -> None:
        datasets_config.HF_DATASETS_CACHE = folder.parent / "cache"
        self.dataset = CaptionedImages(DataConfig(data=str(folder), image_size=4, max_bad=0.1))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.dataset[index]
        x = example["image"].flatten()[: WIDTH + 2] / 127.5 - 1
        return {"x": x, "id": int(example["captions"][0]), "captions": example["captions"]}


def together(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Examples -> `{"x": (B, WIDTH + 2), "ids": [int, …], "captions": [[str, …], …]}`."""
    return {
        "x": torch.stack([example["x"] for example in examples]),
        "ids": [example["id"] for example in examples],
        "captions": [example["captions"] for example in examples],
    }


class ToyTask:
    """Two networks of two layers each, that learn to undo noise, one of the other's output."""

    fingerprints: dict[str, str] = {"data": "toy"}  # noqa: RUF012 - nobody changes it
    data_summary = None

    def __init__(self, toy: Toy, run: Run, fault: "Trigger") -> None:
        self.toy, self.fault = toy, fault
        self.rank = run.processes.rank
        self.notes = toy.folder if toy.notes is None else toy.notes
        torch.manual_seed(toy.disturbed)  # of the first weights, which a checkpoint replaces
        self.learners = {
            name: run.learner(
                nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, WIDTH)),
            )
            for name in ("net", "critic")
        }

    def step(self, batch: dict[str, Any], step: int, micro_batch: MicroBatch) -> Metrics:
        """Note what was drawn, let the fault happen, and train both."""
        toy = self.toy

        def uniform(purpose: str) -> list[float]:
            source = generator(toy.seed, step, purpose)
            return micro_batch.rows(torch.rand(BATCH, generator=source)).tolist()

        crops, flips = uniform("crop"), uniform("flip")
        rows = zip(batch["x"], crops, flips, strict=True)
        x = torch.stack([cut(row, crop, flip) for row, crop, flip in rows])
        source = generator(toy.seed, step, "noise")
        noise = micro_batch.rows(torch.randn(BATCH, WIDTH, generator=source))
        t = micro_batch.rows(
            LossConfig().sample_t(FLOW, BATCH, generator=generator(toy.seed, step, "t"))
        )
        words = choose(batch["captions"], uniform("caption"))
        dropout = uniform("dropout")
        words = [word if u >= 0.25 else "" for word, u in zip(words, dropout, strict=True)]
        weights = 1.0 + 0.1 * torch.tensor([len(word) for word in words])
        drawn = {"batch": digest([x]), "noise": digest([noise]), "t": t.tolist()}
        drawn |= {"captions": words, "dropout": dropout}
        self._note(step, micro_batch, batch["ids"], drawn)
        disturb(toy, step)
        self.fault.at(step)
        net, critic = self.learners["net"], self.learners["critic"]
        guess = net.forward_model(x + t[:, None] / FLOW.num_timesteps * noise)
        loss = ((guess - x).square().mean(1) * weights).mean() * self.fault.factor(step)
        other = (critic.forward_model(guess.detach()) - noise).square().mean()
        norms = [net.update(loss, micro_batch), critic.update(other, micro_batch)]
        return {"loss": loss, "critic": other, "grad_norm": norms[0], "grad_norm_critic": norms[1]}

    def _note(
        self, step: int, micro_batch: MicroBatch, ids: list[int], drawn: dict[str, Any]
    ) -> None:
        learners = self.learners
        state = {
            "weights": {name: digest([*one.model.parameters()]) for name, one in learners.items()},
            "averages": {name: digest([*one.ema.parameters()]) for name, one in learners.items()},
            "updates": [one.num_updates for one in learners.values()],
        }
        with (self.notes / f"notes-{self.rank}.jsonl").open("a") as file:
            file.write(json.dumps([step, micro_batch.index, ids, drawn | state]) + "\n")
        workers = [worker.pid for worker in multiprocessing.active_children()]
        (self.notes / f"pids-{self.rank}.json").write_text(json.dumps([os.getpid(), *workers]))

    @torch.no_grad()
    def validate(self) -> Metrics:
        """The error of the average without noise, if this run is looked at."""
        if not self.toy.looked_at:
            return {}
        x = Samples().x[:, :WIDTH]
        return {"val_loss": (self.learners["net"].ema(x) - x).square().mean()}

    def preview(self, path: Path) -> None:
        """An image of one pixel, and beside it what validation says."""
        Image.new("RGB", (1, 1)).save(path)
        if self.toy.looked_at:
            path.with_suffix(".txt").write_text(f"{float(self.validate()['val_loss'])!r}")

    def save(self, folder: Path) -> None:
        """An empty folder."""
        folder.mkdir(exist_ok=True)


def train(toy: Toy) -> None:
    """The run."""
    config = options(
        output_dir=toy.folder,
        max_steps=toy.steps,
        batch_size=BATCH,
        gradient_accumulation_steps=toy.gradient_accumulation_steps,
        seed=toy.seed,
        log_every=1,
        preview_every=4,
        checkpoint_every=toy.checkpoint_every,
        keep_checkpoints=toy.keep,
        mixed_precision="no",
        max_nonfinite_steps=toy.max_nonfinite_steps,
        resume_from=toy.resume_from,
        timeout=toy.timeout,
        validate_every=4,
        report_to=toy.report_to,
        learning_rate=1e-2,
        warmup_steps=4,
        cooldown_steps=4,
        ema_decay=0.9,
    )
    run = Run(config, yaml.safe_dump({"seed": toy.seed, "max_steps": toy.steps, "workers": "any"}))
    images = toy.images
    dataset = run.processes.main_first(lambda: Samples() if images is None else Images(images))
    fault = Trigger(toy.fault, toy.folder, run.processes.rank)
    loop.plot_log = lambda log, out: None  # these take longer than all the rest
    loop.write_report = lambda folder: None

    def loader(start: int) -> Iterator[dict[str, Any]]:
        fault.at(-1)
        return batches(
            dataset,
            start,
            num_samples=len(dataset),
            batch_size=BATCH,
            seed=toy.seed,
            stop=toy.steps,
            rank=run.processes.rank,
            world_size=run.processes.count,
            num_workers=toy.workers,
            collate=together,
        )

    fit(ToyTask(toy, run, fault), loader, run)


def cut(row: Tensor, crop: float, flip: float) -> Tensor:
    """WIDTH of the numbers from a random place on, in half of the cases the other way round."""
    begin = int(3 * crop)
    piece = row[begin : begin + WIDTH]
    return piece.flip(0) if flip < 0.5 else piece


def digest(tensors: Sequence[Tensor]) -> str:
    """A hash of tensors."""
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()[:16]


def disturb(toy: Toy, number: int) -> None:
    """Make other use of the global generators than a run without `disturbed` makes."""
    if toy.disturbed:
        for _ in range(1 + number % toy.disturbed):
            torch.randn(3)
            np.random.rand(3)  # noqa: NPY002 - these are meant
            random.random()


class Trigger:
    """Makes a fault happen; file operations are seen through Python's audit events."""

    def __init__(self, fault: Fault, folder: Path, rank: int) -> None:
        self.fault = fault
        self.mine = fault.rank == rank
        self.folder = str(folder)
        self.operations = -1  # not counted before the step
        if fault.operation >= 0 and self.mine:
            sys.addaudithook(self._audit)
        if fault.kind == "tracker":
            TensorBoardTracker.log = self._log  # pyright: ignore[reportAttributeAccessIssue]

    def at(self, number: int) -> None:
        """Step `number` begins."""
        fault = self.fault
        if not self.mine:
            return
        if number == fault.stop:
            os.kill(os.getpid(), signal.SIGTERM)
        if fault.kind == "slow":
            time.sleep(fault.seconds)
        elif number == fault.step and self.operations < 0:
            self.operations = 0
            if fault.operation < 0:
                self._happen()

    def factor(self, number: int) -> float:
        """What the loss is multiplied by."""
        fault = self.fault
        bad = fault.kind == "nan" and self.mine and fault.step <= number <= fault.until
        return float("nan") if bad else 1.0

    def _log(self, values: Any, step: int, **options: Any) -> None:
        if step >= self.fault.step:
            raise RuntimeError("nobody answers")

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event in ("os.rename", "os.mkdir", *REMOVING)
        writes = writes or (event == "open" and bool(arguments[2] & WRITING))
        if self.fault.kind == "full":  # nobody needs room for these
            writes = writes and event not in REMOVING
            writes = writes and not (event == "os.mkdir" and Path(arguments[0]).exists())
        if self.operations < 0 or not writes or not str(arguments[0]).startswith(self.folder):
            return
        self.operations += 1
        if self.operations == self.fault.operation + 1:
            self._happen()

    def _happen(self) -> None:
        match self.fault.kind:
            case "kill" | "int" | "term" | "usr1" | "segv":
                os.kill(os.getpid(), signal.Signals[f"SIG{self.fault.kind.upper()}"])
            case "worker":
                multiprocessing.active_children()[0].kill()
            case "exit":
                os._exit(7)
            case "raise":
                raise RuntimeError("the toy broke")
            case "sleep":
                time.sleep(1000)
            case "full":
                raise OSError(28, "No space left on device")


def notes(folder: Path) -> list[tuple[int, int, list[int], dict[str, Any]]]:
    """(step, part, sample ids, what else was noted), in order; of a step that was taken again, the
    last time alone."""
    seen: dict[tuple[int, int], tuple[list[int], dict[str, Any]]] = {}
    for path in folder.glob("notes-*.jsonl"):
        for number, part, ids, note in every_note(path):
            seen[number, part] = ids, note
    return [(*place, *found) for place, found in sorted(seen.items())]


def every_note(path: Path) -> list[tuple[int, int, list[int], dict[str, Any]]]:
    """All that a process has noted, as it came; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def output(folder: Path) -> str:
    """All that the processes have written to the terminal."""
    return "".join(path.read_text() for path in sorted(folder.glob("out-*.txt")))


def log(folder: Path) -> list[dict[str, float]]:
    """The run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def tensors(folder: Path, step: int = STEPS) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    from latentdiff.formats.weights import load_safetensors

    return {
        f"{path.stem}.{name}": tensor
        for path in sorted((folder / "checkpoints" / f"step-{step}").glob("*.safetensors"))
        for name, tensor in load_safetensors(path).items()
    }


if __name__ == "__main__":
    run_script(lambda: train(parse_config(Toy)[0]))
