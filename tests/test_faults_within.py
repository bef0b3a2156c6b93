"""What goes wrong inside a run, in one of its processes or on its disk: real processes and signals.

A test's number is its row in docs/faults.md; test_faults.py has those in which a run is stopped.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.faulty import BATCH, STEPS, Fault, Kind, Toy, every_note, log, notes, output, tensors
from support.harness import assert_same, left_over, newest, references, run, start, wait

from latentdiff.training.checkpoint_files import verify

pytestmark = pytest.mark.processes
all_of_them = pytest.mark.faults  # too long for `make test`, which has the others


def later(*values: Any) -> Any:
    """Parameters that `make test-faults` alone has."""
    return pytest.param(*values, marks=all_of_them)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return references(tmp_path_factory.mktemp)


@pytest.mark.parametrize("kind", ["raise", later("exit"), later("segv")])
def test_9_when_one_process_dies_all_end(tmp_path: Path, kind: Kind) -> None:
    toy = Toy(tmp_path, timeout=20, workers=1, fault=Fault(kind, step=4, rank=1))
    codes = run(toy, 2)
    assert since_the_last_step(tmp_path, rank=1) < 20 + 10
    assert 0 not in codes
    assert None not in codes
    assert_gone(tmp_path)


@all_of_them
@pytest.mark.parametrize(
    ("kind", "timeout", "limit", "named"),
    [
        ("raise", 30, 40, "1"),
        ("exit", 30, 40, "1"),
        ("segv", 30, 40, "1"),
        # It notes torchrun's SIGTERM and sleeps on: torchrun waits 30 seconds before it kills it.
        ("sleep", 10, 10 + 30 + 30, "0"),
    ],
)
def test_9_and_10_torchrun_ends_all_and_names_the_process(
    tmp_path: Path, kind: Kind, timeout: int, limit: int, named: str
) -> None:
    """The first that failed: the one that went wrong, or the one that waited in vain."""
    here = Path(__file__).parent
    toy = {"folder": tmp_path, "timeout": timeout, "workers": 1}
    toy |= {"fault.kind": kind, "fault.step": 4, "fault.rank": 1}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(here / "support" / "faulty.py"), *(f"--{k}={v}" for k, v in toy.items())]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": f"{here}:{here.parent}"}
    ended = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert since_the_last_step(tmp_path, rank=1) < limit, ended.stderr
    assert ended.returncode != 0
    root_cause = ended.stderr.partition("Root Cause")[2]
    assert re.search(rf"rank +: {named} ", root_cause), ended.stderr
    assert_gone(tmp_path)


@pytest.mark.parametrize(
    "fault",
    [Fault("sleep", step=4, rank=1), Fault("sleep", step=5, rank=0, operation=4)],
    ids=["in a step", "in a save"],
)
def test_10_when_one_process_hangs_the_timeout_ends_the_others(
    tmp_path: Path, fault: Fault
) -> None:
    toy = Toy(tmp_path, timeout=10, fault=fault)
    processes = start(toy, 2)
    other = 1 - fault.rank
    processes[other].join(60)
    assert processes[other].exitcode not in (0, None)
    assert 5 < since_the_last_step(tmp_path, rank=fault.rank) < 20
    processes[fault.rank].kill()  # which a launcher does, once one of its processes has failed
    wait(processes)


def since_the_last_step(folder: Path, rank: int) -> float:
    """Seconds."""
    return time.time() - (folder / f"pids-{rank}.json").stat().st_mtime


def assert_gone(folder: Path) -> None:
    """No process of a run is there any more, nor a worker that reads data for it."""
    pids = [pid for path in folder.glob("pids-*.json") for pid in json.loads(path.read_text())]
    assert len(pids) == 4
    until = time.monotonic() + 15  # a worker looks every five seconds whether its parent lives
    while [pid for pid in pids if alive(pid)] and time.monotonic() < until:
        time.sleep(0.2)
    assert not [pid for pid in pids if alive(pid)]


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended may still be listed until somebody asks for it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize("stride", [7, later(1)])
def test_11_a_full_disk_is_said_and_leaves_the_older_checkpoint(
    tmp_path: Path, whole: dict[int, Path], stride: int
) -> None:
    """At each operation that takes room, of a step and of its save."""
    base = Toy(tmp_path / "base", keep=1)
    assert run(base, fault=Fault("term", step=3)) == [143]
    operation = 0
    while True:
        folder = tmp_path / f"at-{operation}"
        shutil.copytree(base.folder, folder)
        toy = replace(base, folder=folder)
        assert run(toy, fault=Fault("full", step=5, operation=operation)) == [2], operation
        if newest(folder) > 6:
            break
        assert_said(folder)
        verify(folder / "checkpoints" / f"step-{newest(folder)}")
        assert run(toy) == [0]
        assert_same(folder, whole[1])
        operation += stride
    assert operation > 15


def test_11_a_disk_that_is_really_full(tmp_path: Path, whole: dict[int, Path], disk: Path) -> None:
    """With one more page of room each time, until there is enough."""
    toy = Toy(disk / "run", keep=1, notes=tmp_path)
    assert run(toy, fault=Fault("term", step=3)) == [143]
    shutil.copytree(toy.folder, tmp_path / "base")
    pages, codes = 0, [2]
    while codes == [2]:
        fill(disk, pages)
        (tmp_path / "out-0.txt").unlink()
        codes = run(toy)
        (disk / "filler").unlink()
        if codes == [2]:
            assert_said(toy.folder, tmp_path)
            verify(toy.folder / "checkpoints" / f"step-{newest(toy.folder)}")
            assert run(toy) == [0]
        assert digests_of(toy.folder) == digests_of(whole[1])
        assert notes(tmp_path) == notes(whole[1])
        shutil.rmtree(toy.folder)
        shutil.copytree(tmp_path / "base", toy.folder)
        pages += 1
    assert codes == [0]
    assert pages > 4


def digests_of(folder: Path) -> dict[str, str]:
    files = verify(folder / "checkpoints" / f"step-{STEPS}")["files"]
    return {name: entry["sha256"] for name, entry in files.items()}


def assert_said(folder: Path, notes: Path | None = None) -> None:
    """One sentence for the user, and nothing half written."""
    said = output(folder if notes is None else notes)
    assert "error: " in said
    assert "No space left on device" in said
    assert "Traceback" not in said
    assert not left_over(folder)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not sys.platform.startswith("linux") or subprocess.run(command, check=False).returncode:
        pytest.skip("this user may not mount a disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, pages: int) -> None:
    """Leave so many pages free."""
    free = os.statvfs(disk)
    (disk / "filler").write_bytes(b"x" * (free.f_bfree - pages) * free.f_bsize)


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[random.Random(file.name).randrange(len(content))] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("count", [1, later(2)])
def test_13_a_damaged_checkpoint_is_skipped_unless_it_was_asked_for(
    tmp_path: Path, whole: dict[int, Path], damage: Callable[[Path], None], count: int
) -> None:
    base = Toy(tmp_path / "base")
    assert -signal.SIGKILL in run(base, count, fault=Fault("kill", step=7))
    names = [path.name for path in (base.folder / "checkpoints" / "step-6").iterdir()]
    assert len(names) >= 3
    for name in names:
        toy = replace(base, folder=tmp_path / name)
        shutil.copytree(base.folder, toy.folder)
        file = toy.folder / "checkpoints" / "step-6" / name
        damage(file)
        assert run(toy, count, resume_from=file.parent) == [2] * count
        assert re.search(f"error: .*{re.escape(str(file))}", output(toy.folder))
        assert run(toy, count) == [0] * count
        warning = rf"Warning: {re.escape(str(file))}.*; going on from step-3"
        assert re.search(warning, output(toy.folder)), output(toy.folder)
        assert_same(toy.folder, whole[count])


@pytest.mark.parametrize("rank", [0, 1])
def test_18_a_bad_loss_in_one_process_is_left_out_by_all(tmp_path: Path, rank: int) -> None:
    toy = Toy(tmp_path, checkpoint_every=1, keep=20)
    fault = Fault("nan", step=4, until=5, rank=rank)
    assert run(toy, 2, fault=fault) == [0, 0], output(tmp_path)
    before, after = tensors(tmp_path, 4), tensors(tmp_path, 6)
    assert {name for name in before if not before[name].equal(after[name])} == {
        name
        for name in before
        if name.startswith("critic.")  # whose own gradient was finite
    }
    assert any(not before[name].equal(tensors(tmp_path, 7)[name]) for name in before)
    found = [every_note(tmp_path / f"notes-{r}.jsonl") for r in range(2)]
    for what in ("weights", "averages"):
        of_both = [[note[what]["net"] for *_, note in of_rank] for of_rank in found]
        assert of_both[0] == of_both[1]
        assert [a == b for a, b in zip(of_both[0], of_both[0][1:], strict=False)] == [
            number in (4, 5) for number in range(STEPS - 1)
        ]


def test_18_and_stops_the_run_when_it_stays(tmp_path: Path) -> None:
    toy = Toy(tmp_path, fault=Fault("nan", step=4, until=STEPS, rank=1))
    assert run(toy, 2) == [2, 2]
    assert "not finite for 3 steps in a row" in output(tmp_path)
    assert "the first number that was not is in the loss" in output(tmp_path)
    assert len(every_note(tmp_path / "notes-0.jsonl")) == 4 + 3 + 1  # one again


def draw_images(folder: Path, count: int) -> Path:
    folder.mkdir()
    rows = [json.dumps({"file_name": f"{i:02}.png", "text": str(i)}) + "\n" for i in range(count)]
    (folder / "metadata.jsonl").write_text("".join(rows))
    for i in range(count):
        Image.new("RGB", (4, 4), (5 * i, 255 - 5 * i, i)).save(folder / f"{i:02}.png")
    return folder


def steps_taken(folder: Path) -> list[int]:
    return [len(every_note(folder / f"notes-{rank}.jsonl")) for rank in range(2)]


@pytest.mark.parametrize("workers", [0, later(1)])
def test_19_bad_samples_in_one_process_are_replaced(tmp_path: Path, workers: int) -> None:
    """Two images of process 1 are damaged: the next good ones stand in, and nobody waits."""
    images = draw_images(tmp_path / "images", 40)
    toy = Toy(tmp_path / "good", images=images, steps=5, workers=workers)  # an epoch
    assert run(toy, 2) == [0, 0], output(toy.folder)
    bad = every_note(toy.folder / "notes-1.jsonl")[2][2][1:3]
    for i in bad:
        (images / f"{i:02}.png").write_bytes(b"damaged")
    begun = time.monotonic()
    assert run(toy, 2, folder=tmp_path / "bad") == [0, 0], output(tmp_path / "bad")
    assert time.monotonic() - begun < 30
    assert steps_taken(tmp_path / "bad") == [5, 5]
    instead = {i: next(j % 40 for j in range(i, i + 3) if j % 40 not in bad) for i in range(40)}
    expected = [[instead[i] for i in ids] for _, _, ids, _ in notes(toy.folder)]
    assert [ids for _, _, ids, _ in notes(tmp_path / "bad")] == expected
    warned = [text.count("a sample is replaced by the next") for text in outputs(tmp_path / "bad")]
    assert warned == [0, 1]


def outputs(folder: Path) -> list[str]:
    return [(folder / f"out-{rank}.txt").read_text() for rank in range(2)]


def test_19_too_many_bad_samples_in_one_process_end_all(tmp_path: Path) -> None:
    images = draw_images(tmp_path / "images", 40)
    toy = Toy(tmp_path / "good", images=images, steps=5)
    assert run(toy, 2) == [0, 0], output(toy.folder)
    taken = [i for _, _, ids, _ in every_note(toy.folder / "notes-1.jsonl") for i in ids]
    for i in taken[8:14]:
        (images / f"{i:02}.png").write_bytes(b"damaged")
    begun = time.monotonic()
    codes = run(toy, 2, folder=tmp_path / "bad")
    assert time.monotonic() - begun < 30
    assert codes[1] == 2
    assert codes[0] not in (0, None)
    assert "5 of 40 samples turned out to be bad" in output(tmp_path / "bad")


@pytest.mark.parametrize("samples", [9, 15])
def test_19_fewer_samples_for_one_process_than_for_another(tmp_path: Path, samples: int) -> None:
    """Than two batches, and not divisible by the number of processes: all take the same steps."""
    images = draw_images(tmp_path / "images", samples)
    toy = Toy(tmp_path / "run", images=images)
    begun = time.monotonic()
    assert run(toy, 2) == [0, 0], output(toy.folder)
    assert time.monotonic() - begun < 30
    assert steps_taken(toy.folder) == [STEPS, STEPS]
    order = [every_note(toy.folder / f"notes-{rank}.jsonl") for rank in range(2)]
    seen = [i for step in zip(*order, strict=True) for _, _, ids, _ in step for i in ids]
    for epoch in range(STEPS * BATCH // samples):
        assert sorted(seen[epoch * samples : (epoch + 1) * samples]) == list(range(samples))


@pytest.mark.parametrize("count", [1, 2])
def test_19_a_reader_that_dies_ends_all_and_the_run_goes_on(
    tmp_path: Path, whole: dict[int, Path], count: int
) -> None:
    toy = Toy(tmp_path, workers=1)
    begun = time.monotonic()
    codes = run(toy, count, fault=Fault("worker", step=7, rank=count - 1))
    assert time.monotonic() - begun < 30
    assert 0 not in codes
    assert None not in codes
    assert run(toy, count) == [0] * count
    assert_same(tmp_path, whole[count])


def test_20_a_folder_takes_one_run_at_a_time(tmp_path: Path, whole: dict[int, Path]) -> None:
    first = start(Toy(tmp_path, fault=Fault("slow", seconds=0.3)))
    until = time.monotonic() + 60
    while not list(tmp_path.glob("notes-0.jsonl")) and time.monotonic() < until:
        time.sleep(0.05)
    assert run(Toy(tmp_path)) == [2]
    assert f"output_dir={tmp_path} is in use by another run" in output(tmp_path)
    assert wait(first) == [0]
    assert_same(tmp_path, whole[1])


def test_20_another_configuration_is_refused_by_its_keys(
    tmp_path: Path, whole: dict[int, Path]
) -> None:
    shutil.copytree(whole[2], tmp_path / "run")
    toy = Toy(tmp_path / "run", seed=5)
    assert run(toy, 2) == [2, 2]
    assert "another configuration: seed was 1 and is 5;" in output(tmp_path / "run")
    assert run(replace(toy, seed=1, steps=STEPS + 2), 2) == [0, 0]


def test_20_a_disk_that_cannot_be_written_is_refused_early(tmp_path: Path, disk: Path) -> None:
    (disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for folder in (disk / "run", disk / "new"):
        assert run(Toy(folder, notes=tmp_path)) == [2]
        assert f"error: output_dir={folder} cannot be written: Read-only" in output(tmp_path)
    assert not notes(tmp_path)  # not one step


def test_20_a_folder_that_cannot_be_one_is_refused_early(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    toy = Toy(tmp_path / "file" / "run", notes=tmp_path)
    assert run(toy, 2) == [2, 2]
    assert f"output_dir={toy.folder} cannot be written: Not a dir" in output(tmp_path)
    if os.geteuid():  # the superuser may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        assert run(Toy(tmp_path / "locked", notes=tmp_path)) == [2]
        assert "locked cannot be written: Permission denied" in output(tmp_path)
    assert not notes(tmp_path)


@pytest.mark.parametrize("count", [1, 2])
def test_20_a_tracker_that_raises_does_not_end_the_training(
    tmp_path: Path, whole: dict[int, Path], count: int
) -> None:
    pytest.importorskip("tensorboard")
    toy = Toy(tmp_path, report_to=("tensorboard",), fault=Fault("tracker", step=4))
    assert run(toy, count) == [0] * count, output(tmp_path)
    warning = "report_to=tensorboard is switched off, and training goes on without it: RuntimeError"
    assert output(tmp_path).count(warning) == 1
    assert len(log(tmp_path)) == STEPS
    assert_same(tmp_path, whole[count])
