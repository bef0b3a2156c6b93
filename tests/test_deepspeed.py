"""ZeRO by DeepSpeed, in two real processes: the training and checkpoints of one plain process."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentdiff.training.deepspeed import MOMENTS, Zero

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
    ),
]
STEPS, BATCH, LIMIT = 8, 8, 0.5
OPTIMIZER = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.01, "fused": True}


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))


def loss_of(model: Any, step: int, rows: slice, *, bad: bool = False) -> Tensor:
    """Of some rows of the step's global batch: ()."""
    x = torch.randn(BATCH, 3, 6, 6, generator=torch.Generator().manual_seed(step))[rows]
    return (model(x) - x.flip(1)).square().mean() * (float("nan") if bad else 1.0)


def rate(step: int) -> float:
    return 1e-2 / (1 + step)


def process(folder: Path, options: dict[str, Any]) -> None:
    """One of the processes: two networks, as a VAE and its critic, each with a Zero of its own."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    networks = [network(seed) for seed in range(2)]
    zeros = []
    for net in networks:
        adamw = torch.optim.AdamW(net.parameters(), **OPTIMIZER)
        zero = Zero(net, adamw, stage=options["stage"], max_grad_norm=LIMIT)
        zeros.append((net, adamw, zero))
    start = options.get("start", 0)
    if start:
        state = load_file(folder / f"step-{start}.safetensors")
        for number, (net, _, zero) in enumerate(zeros):
            net.load_state_dict({name: state[f"{number}.{name}"] for name in net.state_dict()})
            zero.load(moments_of(state, number, net))
    parts = options.get("parts", 1)
    size = BATCH // (count * parts)
    for step in range(start, options["steps"]):
        record: list[float] = []
        for _, adamw, zero in zeros:
            total = torch.zeros(())
            for part in range(parts):
                first = (rank * parts + part) * size
                bad = step == options.get("bad") and rank == 1
                with zero.model.no_sync():  # as the loop has it, but for the last part
                    rows = slice(first, first + size)
                    loss = loss_of(zero.model, step, rows, bad=bad) / parts
                    zero.backward(loss, last=part + 1 == parts)
                total += loss.detach() / count
            for group in adamw.param_groups:
                group["lr"] = rate(step)
            norm = zero.step()
            dist.all_reduce(total)
            record += [float(total), float(norm)]
        if rank == 0:
            with (folder / "log.jsonl").open("a") as file:
                file.write(json.dumps([step, *record]) + "\n")
        tensors = {}
        for number, (net, _, zero) in enumerate(zeros):
            tensors |= {f"{number}.{name}": t.clone() for name, t in net.state_dict().items()}
            for name, moments in zero.moments().items():
                tensors |= {f"{number}.{name}.{key}": value for key, value in moments.items()}
        if rank == 0:
            save_file(tensors, folder / f"step-{step + 1}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


def moments_of(state: dict[str, Tensor], number: int, net: nn.Module) -> dict[str, Any]:
    keys = ("step", *MOMENTS)
    names = [name for name, _ in net.named_parameters()]
    return {name: {key: state[f"{number}.{name}.{key}"] for key in keys} for name in names}


def plain(steps: int, *, start: dict[str, Tensor] | None = None, at: int = 0) -> list[list[float]]:
    """The same training in this process alone; (loss, norm) of both networks a step."""
    networks = [network(seed) for seed in range(2)]
    optimizers = [torch.optim.AdamW(net.parameters(), **OPTIMIZER) for net in networks]
    if start is not None:
        for number, (net, adamw) in enumerate(zip(networks, optimizers, strict=True)):
            net.load_state_dict({name: start[f"{number}.{name}"] for name in net.state_dict()})
            kept = dict(enumerate(moments_of(start, number, net).values()))
            adamw.load_state_dict({**adamw.state_dict(), "state": kept})
    records = []
    for step in range(at, steps):
        record = []
        for net, adamw in zip(networks, optimizers, strict=True):
            loss = loss_of(net, step, slice(None))
            loss.backward()
            for group in adamw.param_groups:
                group["lr"] = rate(step)
            norm = nn.utils.clip_grad_norm_(net.parameters(), LIMIT)
            adamw.step()
            adamw.zero_grad()
            record += [float(loss.detach()), float(norm)]
        records.append([step, *record])
    return records


def run(folder: Path, *, stage: int = 2, steps: int = STEPS, **options: Any) -> list[list[float]]:
    """Two processes; what they logged."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = json.dumps({"stage": stage, "steps": steps, **options})
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), settings],
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    printed = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(printed)[-4000:]
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", params=[1, 2])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run without a stop: its folder, its records and its stage."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, stage=request.param), request.param


def test_two_processes_with_zero_train_as_one_plain_process(whole: Any) -> None:
    _, records, _ = whole
    for record, expected in zip(records, plain(STEPS), strict=True):
        assert record == pytest.approx(expected, abs=1e-5)
    assert max(record[2] for record in records) > LIMIT  # clipping is at work


def test_a_resumed_run_has_the_same_bits(whole: Any, tmp_path: Path) -> None:
    folder, records, stage = whole
    shutil.copy(folder / "step-3.safetensors", tmp_path)
    assert run(tmp_path, stage=stage, start=3) == records[3:]
    last = f"step-{STEPS}.safetensors"
    assert (tmp_path / last).read_bytes() == (folder / last).read_bytes()


def test_checkpoints_go_from_zero_to_a_plain_process(whole: Any) -> None:
    folder, records, _ = whole
    state = load_file(folder / "step-3.safetensors")
    for record, expected in zip(records[3:], plain(STEPS, start=state, at=3), strict=True):
        assert record == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_parts_of_a_batch_make_the_same_steps(tmp_path: Path, stage: int) -> None:
    for record, expected in zip(run(tmp_path, stage=stage, parts=2), plain(STEPS), strict=True):
        assert record == pytest.approx(expected, abs=1e-5)


def test_a_gradient_that_is_not_finite_in_one_process_moves_nothing(tmp_path: Path) -> None:
    records = run(tmp_path, bad=3, steps=5)
    assert records[3][2] == float("inf")
    before, after, later = (load_file(tmp_path / f"step-{n}.safetensors") for n in (3, 4, 5))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not all(torch.equal(later[name], after[name]) for name in before)


if __name__ == "__main__":
    process(Path(sys.argv[1]), json.loads(sys.argv[2]))
