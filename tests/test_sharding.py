"""A sharded network trains as an unsharded one, and its checkpoints fit any number of processes.

Real processes on gloo; the network is a small UNet, with its averages and gradient checkpointing.
"""

import faulthandler
import importlib.util
import multiprocessing
import os
import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from support.runs import make_learner
from support.tiny import UNET, randomise
from torch import Tensor

from latentdiff.models.unet import UNet
from latentdiff.training.checkpoint import StoredTensors, load_checkpoint, save_checkpoint
from latentdiff.training.checkpoint_files import checkpoints
from latentdiff.training.processes import Processes
from latentdiff.training.randomness import MicroBatch

pytestmark = pytest.mark.processes

BATCH, STEPS = 4, 4
deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
OPTIONS: dict[str, Any] = {
    **{"learning_rate": 1e-2, "warmup_steps": 2, "ema_decay": 0.8, "ema_lengths": (0.1,)},
    "gradient_checkpointing": True,
}


def zero(stage: str) -> Any:
    return pytest.param(stage, 2, 2, marks=deepspeed)


@dataclass(frozen=True)
class Job:
    """Train to step `stop`, from the folder's newest checkpoint on, and write one at the end."""

    folder: Path
    stop: int = STEPS
    sharding: str = "full"
    gradient_accumulation_steps: int = 1
    optimizer: str = "adamw"


def work(job: Job) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    processes = Processes(accelerator)
    torch.manual_seed(0)
    network = UNet(UNET).double()  # Adam makes steps of gradients that are rounding alone
    randomise(network)
    options = {**OPTIONS, "sharding": job.sharding, "optimizer": job.optimizer}
    learner = make_learner(network, accelerator, **options)
    start = load_checkpoint(job.folder, {"unet": learner}, manifest={}, processes=processes)
    count = processes.count * job.gradient_accumulation_steps
    with (job.folder / "norms.txt").open("a") as file:
        for step in range(start, job.stop):
            draw = torch.Generator().manual_seed(step)
            x = torch.randn(BATCH, 4, 8, 8, generator=draw).double()
            context = torch.randn(BATCH, 5, 16, generator=draw).double()
            for number in range(job.gradient_accumulation_steps):
                index = processes.rank * job.gradient_accumulation_steps + number
                micro_batch = MicroBatch(index, count)
                t, target = micro_batch.rows(torch.arange(BATCH)), micro_batch.rows(x)
                output = learner.forward_model(target, t, micro_batch.rows(context))
                norm = learner.update((output - target).square().mean(), micro_batch)
            if processes.rank == 0:
                file.write(f"{float(norm)!r}\n")
    save_checkpoint(
        job.folder, job.stop, {"unet": learner}, keep=9, manifest={}, processes=processes
    )
    if not learner.sharded:
        weights = torch.cat([p.detach().flatten() for p in learner.model.parameters()])
        everywhere: Any = accelerator.gather(weights[None])
        assert torch.equal(everywhere, weights.expand_as(everywhere))
    learner.gather()
    full = {f"ema.{name}": p for name, p in learner.ema.named_parameters()}
    snapshots = learner.snapshots()
    if processes.rank == 0:
        full |= {f"ema-0.1.{name}": p for name, p in snapshots["0.1"].items()}
        stored = StoredTensors(checkpoints(job.folder)[-1][1], "unet")
        assert [name for name, tensor in full.items() if not tensor.equal(stored[name])] == []


def _process(job: Job, rank: int, count: int, port: int) -> None:
    faulthandler.enable()  # a crash inside a library says where
    torch.set_num_threads(1)
    os.environ |= {"ACCELERATE_USE_CPU": "true"}
    if count > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        work(job)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def run(job: Job, count: int) -> dict[str, Tensor]:
    """Run the job in `count` processes; all tensors of its last checkpoint."""
    job.folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_sharding"])
    processes = [context.Process(target=_process, args=(job, r, count, port)) for r in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * count
    return dict(StoredTensors(job.folder / f"step-{job.stop}", "unet"))


def norms(folder: Path) -> list[float]:
    return [float(line) for line in (folder / "norms.txt").read_text().split()]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, run(Job(folder), 1)


def assert_equivalent(
    found: dict[str, Tensor], expected: dict[str, Tensor], *, atol: float = 1e-6
) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        # DeepSpeed's moments are float32 whatever the network is.
        torch.testing.assert_close(tensor.double(), expected[name].double(), rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("sharding", "count", "gradient_accumulation_steps"),
    [("full", 2, 1), ("full", 4, 1), ("full", 2, 2), zero("zero1"), zero("zero2")],
)
def test_a_sharded_network_trains_as_an_unsharded_one(
    tmp_path: Path,
    plain: tuple[Path, dict[str, Tensor]],
    sharding: str,
    count: int,
    gradient_accumulation_steps: int,
) -> None:
    folder, expected = plain
    found = run(
        Job(tmp_path, sharding=sharding, gradient_accumulation_steps=gradient_accumulation_steps),
        count,
    )
    zero = sharding != "full"  # DeepSpeed sums norms and steps in float32
    assert norms(tmp_path) == pytest.approx(norms(folder), rel=1e-6 if zero else 1e-9)
    assert_equivalent(found, expected, atol=1e-4 if zero else 1e-6)
    names = sorted(path.name for path in (tmp_path / f"step-{STEPS}").glob("*.safetensors"))
    if sharding == "full":
        assert names == [f"unet-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    else:
        assert names == ["unet.safetensors"]


@pytest.fixture(scope="module")
def plain_muon(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The run of one process with Muon."""
    return run(Job(tmp_path_factory.mktemp("plain"), optimizer="muon"), 1)


@pytest.mark.parametrize("sharding", ["full", "none"])
def test_with_muon_two_processes_train_as_one(
    tmp_path: Path, plain_muon: dict[str, Tensor], sharding: str
) -> None:
    """The updates are rounded to bfloat16, and so is what another order of a sum changes."""
    found = run(Job(tmp_path, sharding=sharding, optimizer="muon"), 2)
    assert_equivalent(found, plain_muon, atol=1e-3)
    assert len([name for name in found if name.endswith("momentum_buffer")]) > 20


@pytest.mark.parametrize(
    ("sharding", "optimizer"),
    [("full", "adamw"), ("full", "muon"), pytest.param("zero2", "adamw", marks=deepspeed)],
)
def test_its_processes_resume_bit_for_bit(tmp_path: Path, sharding: str, optimizer: str) -> None:
    job = Job(tmp_path / "full", sharding=sharding, optimizer=optimizer)
    expected = run(job, 2)
    run(replace(job, folder=tmp_path / "stopped", stop=2), 2)
    found = run(replace(job, folder=tmp_path / "stopped"), 2)
    assert {n: t.equal(expected[n]) for n, t in found.items()} == dict.fromkeys(expected, True)


def test_its_checkpoints_load_in_any_number_of_processes(
    tmp_path: Path, plain: tuple[Path, dict[str, Tensor]]
) -> None:
    """One process, two and four with shards, two with copies: each resumes from the last one's."""
    _, expected = plain
    ways = [(1, "none"), (2, "full"), (4, "full"), (2, "none")]
    before: dict[str, Tensor] = {}
    for step, (count, sharding) in enumerate(ways, 1):
        if before:  # nothing is trained: what was loaded is written again, split in another way
            again = run(Job(tmp_path, stop=step - 1, sharding=sharding), count)
            assert {n: t.equal(before[n]) for n, t in again.items()} == dict.fromkeys(before, True)
        before = run(Job(tmp_path, stop=step, sharding=sharding), count)
    assert_equivalent(before, expected)
