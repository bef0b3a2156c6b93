"""A toy training run in real processes, and the faults that can be made to happen in it."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import Dataset

from latentdiff.data.batches import batches
from latentdiff.training import loop
from latentdiff.training.config import run_script
from latentdiff.training.learner import Learner, OptimizerConfig
from latentdiff.training.loop import LoopConfig, fit, make_accelerator
from latentdiff.training.meter import Metrics
from latentdiff.training.processes import Processes
from latentdiff.training.randomness import Share, generator, parts
from latentdiff.training.run_folder import RunFolder

STEPS, SAMPLES, BATCH = 12, 20, 8  # an epoch is two and a half steps
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Fault:
    """What goes wrong, in process `rank`, while step number `step` is worked on or written."""

    kind: str = "none"
    """kill, full (disk), term, usr1: at `operation`, else at the step; raise, exit, segv, sleep:
    at the step; nan: in the loss of each step from `step` to `until`; slow: each step takes
    `seconds`."""
    step: int = 0
    until: int = 0
    rank: int = 0
    operation: int = -1
    """At this one of the file operations in the run folder after the step began; -1: at none."""
    seconds: float = 0.0
    stop: int = -1
    """Whatever the kind, SIGTERM comes in this step as well."""


@dataclass(frozen=True)
class Toy:
    """How the run is set up."""

    folder: Path
    steps: int = STEPS
    accumulation: int = 1
    checkpoint_every: int = 3
    keep: int = 2
    workers: int = 0
    seed: int = 1
    max_bad_steps: int = 3
    timeout: int = 60
    preview: bool = False
    resume_from: Path | None = None
    fault: Fault = Fault()


class Samples(Dataset[dict[str, Any]]):
    """Examples `{"x": (3,), "id": int}`."""

    def __init__(self) -> None:
        self.x = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(7))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.x[index], "id": index}


def together(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Examples -> `{"x": (B, 3), "ids": [int, …]}`."""
    return {"x": torch.stack([e["x"] for e in examples]), "ids": [e["id"] for e in examples]}


def train(toy: Toy) -> None:
    """Two networks of two layers each, that learn to undo noise, one of the other's output."""
    config = LoopConfig(
        output_dir=toy.folder,
        max_steps=toy.steps,
        batch_size=BATCH,
        accumulation=toy.accumulation,
        seed=toy.seed,
        log_every=1,
        preview_every=4,
        checkpoint_every=toy.checkpoint_every,
        keep_checkpoints=toy.keep,
        mixed_precision="no",
        max_bad_steps=toy.max_bad_steps,
        resume_from=toy.resume_from,
        timeout=toy.timeout,
    )
    optimizer = OptimizerConfig(
        learning_rate=1e-2, max_steps=toy.steps, warmup_steps=4, cooldown_steps=4, ema_decay=0.9
    )
    accelerator = make_accelerator(config)
    rank = accelerator.process_index
    settings = yaml.safe_dump({"seed": toy.seed, "max_steps": toy.steps, "workers": "any"})
    run = RunFolder(toy.folder, settings, Processes(accelerator))
    torch.manual_seed(0)
    learners = {
        name: Learner(
            nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)), optimizer, accelerator
        )
        for name in ("net", "critic")
    }
    fault = Trigger(toy.fault, toy.folder, rank)
    loop.plot_log = lambda log, out: None  # these take longer than all the rest
    loop.write_report = lambda folder: None

    def step(batch: dict[str, Any], number: int, share: Share) -> Metrics:
        with (toy.folder / f"ids-{rank}.jsonl").open("a") as file:
            file.write(json.dumps([number, share.index, batch["ids"]]) + "\n")
        fault.at(number)
        noise = share.rows(torch.randn(BATCH, 3, generator=generator(toy.seed, number, "noise")))
        noisy = batch["x"] + 0.3 * noise
        guess = learners["net"].model(noisy)
        loss = (guess - batch["x"]).square().mean() * fault.factor(number)
        other = (learners["critic"].model(guess.detach()) - noise).square().mean()
        norms = [learners["net"].update(loss, share), learners["critic"].update(other, share)]
        return {"loss": loss, "critic": other, "grad_norm": norms[0], "grad_norm_critic": norms[1]}

    def data(start: int) -> Iterator[dict[str, Any]]:
        shares = batches(
            Samples(),
            start,
            num_samples=SAMPLES,
            batch_size=BATCH,
            seed=toy.seed,
            stop=toy.steps,
            rank=rank,
            world_size=accelerator.num_processes,
            num_workers=toy.workers,
            collate=together,
        )
        return parts(shares, toy.accumulation)

    def save(folder: Path) -> None:
        folder.mkdir(exist_ok=True)

    @torch.no_grad()
    def preview(path: Path) -> None:
        x = Samples().x
        error = (learners["net"].ema(x) - x).square().mean()
        path.with_suffix(".txt").write_text(f"{float(error)!r}")

    fit(
        step,
        data,
        learners,
        config,
        accelerator,
        run,
        save=save,
        preview=preview if toy.preview else None,
        fingerprints={"data": "toy"},
    )


class Trigger:
    """Makes a fault happen; file operations are seen through Python's audit events."""

    def __init__(self, fault: Fault, folder: Path, rank: int) -> None:
        self.fault = fault
        self.mine = fault.rank == rank
        self.folder = str(folder)
        self.operations = -1  # not counted before the step
        if fault.operation >= 0 and self.mine:
            sys.addaudithook(self._audit)

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

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
        writes = writes or (event == "open" and bool(arguments[2] & WRITING))
        if self.operations < 0 or not writes or not str(arguments[0]).startswith(self.folder):
            return
        self.operations += 1
        if self.operations == self.fault.operation + 1:
            self._happen()

    def _happen(self) -> None:
        match self.fault.kind:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "term":
                os.kill(os.getpid(), signal.SIGTERM)
            case "usr1":
                os.kill(os.getpid(), signal.SIGUSR1)
            case "segv":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "exit":
                os._exit(7)
            case "raise":
                raise RuntimeError("the toy broke")
            case "sleep":
                time.sleep(1000)
            case "full":
                raise OSError(28, "No space left on device")


def _process(toy: Toy, rank: int, count: int, port: int) -> None:
    """What a process of a run does; its output goes into the run folder."""
    toy.folder.mkdir(parents=True, exist_ok=True)
    output = os.open(toy.folder / f"out-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "MPLBACKEND": "Agg"}
    if count > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run_script(lambda: train(toy))


def start(toy: Toy, count: int = 1) -> list[ForkServerProcess]:
    """Start the processes of a run; they are forked from one that has the imports behind it."""
    here = Path(__file__).parent
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faulty", "matplotlib.figure"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=_process, args=(toy, r, count, port)) for r in range(count)]
    for process in processes:
        process.start()
    return processes


def wait(processes: Sequence[ForkServerProcess], seconds: float = 60.0) -> list[int | None]:
    """Exit codes, negative for a signal; None for a process that had to be killed in the end."""
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.exitcode is None:
            process.kill()
            process.join()
    return codes


def run(toy: Toy, count: int = 1, **changes: Any) -> list[int | None]:
    """Run to the end or to the fault; exit codes of the processes."""
    return wait(start(replace(toy, **changes), count))


def output(folder: Path) -> str:
    """All that the processes have written to the terminal."""
    return "".join(path.read_text() for path in sorted(folder.glob("out-*.txt")))


def ids(folder: Path) -> list[tuple[int, int, list[int]]]:
    """(step, part, sample ids), in order; of a step that was taken again, the last time alone."""
    seen: dict[tuple[int, int], list[int]] = {}
    for path in folder.glob("ids-*.jsonl"):
        for line in path.read_text().splitlines():
            number, part, found = json.loads(line)
            seen[number, part] = found
    return [(number, part, found) for (number, part), found in sorted(seen.items())]


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
