"""Starts the processes of a toy run, from a server that has the imports behind it, and waits."""

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from latentdiff.training.checkpoint_files import checkpoints, verify
from latentdiff.training.command_line import run_script
from support.faulty import STEPS, Toy, notes, output, train

# The first optimizer of a process imports torch._dynamo, which takes longer than a toy run.
PRELOADED = ["support.harness", "torch._dynamo"]


def _process(toy: Toy, rank: int, count: int, port: int) -> None:
    """What a process of a run does; its output goes beside its notes."""
    notes = toy.folder if toy.notes is None else toy.notes
    notes.mkdir(parents=True, exist_ok=True)
    output = os.open(notes / f"out-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    multiprocessing.set_start_method("fork", force=True)  # not the one that this process came by
    os.environ |= {"ACCELERATE_USE_CPU": "true", "MPLBACKEND": "Agg"}
    if count > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run_script(lambda: train(toy))


def start(toy: Toy, count: int = 1) -> list[ForkServerProcess]:
    """Start the processes of a run."""
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    here = [str(folder) for folder in Path(__file__).parents[1:3]]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*here, *filter(None, known)]))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
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


def references(make_folder: Callable[[str], Path]) -> dict[int, Path]:
    """Uninterrupted runs, of one process and of two."""
    folders = {count: make_folder(f"whole-{count}") for count in (1, 2)}
    for count, folder in folders.items():
        assert run(Toy(folder), count) == [0] * count, output(folder)
    return folders


def assert_same(folder: Path, reference: Path) -> None:
    """The last checkpoint has the same bytes, and at every step the same was drawn and learned."""
    assert digests(folder) == digests(reference)
    assert notes(folder) == notes(reference)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of weights, averages and moments in the last checkpoint, a whole one."""
    files = verify(folder / "checkpoints" / f"step-{STEPS}")["files"]
    return {name: entry["sha256"] for name, entry in files.items()}


def newest(folder: Path) -> int:
    """The step of the last checkpoint that was finished; 0 without one."""
    return max((step for step, _ in checkpoints(folder / "checkpoints")), default=0)


def left_over(folder: Path) -> list[Path]:
    """What was meant to be there for a moment only."""
    return list(folder.rglob("*.tmp"))
