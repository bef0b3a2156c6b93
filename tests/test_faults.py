"""What a run survives: real processes, real signals, and the same bits in the end.

*The same* is: all weights, averages and moments of the last checkpoint have the bytes of an
uninterrupted run's, and so has the ordered list of sample ids. There is no generator's state to be
kept, since all random numbers are functions of (seed, step, purpose).
"""

import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from faulty import BATCH, SAMPLES, STEPS, Fault, Toy, ids, log, output, run, start, tensors, wait

from latentdiff.training.checkpoint import checkpoints, verify

pytestmark = pytest.mark.slow
all_of_them = pytest.mark.faults  # too long for `make test`, which has the others


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Uninterrupted runs, of one process and of two."""
    folders = {count: tmp_path_factory.mktemp(f"whole-{count}") for count in (1, 2)}
    for count, folder in folders.items():
        assert run(Toy(folder), count) == [0] * count, output(folder)
    return folders


def assert_same(folder: Path, reference: Path) -> None:
    found, expected = digests(folder), digests(reference)
    assert found == expected
    assert ids(folder) == ids(reference)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each learner's file in the last checkpoint, which is whole."""
    last = folder / "checkpoints" / f"step-{STEPS}"
    files = verify(last)["files"]
    return {name: entry["sha256"] for name, entry in files.items()}


@pytest.mark.parametrize("count", [1, 2])
def test_1_a_run_may_stop_after_any_step(
    tmp_path: Path, whole: dict[int, Path], count: int
) -> None:
    """After the first step, amid an epoch, at its end (5 steps are two epochs) and after it."""
    for step in (0, 3, 4, 5) if count == 1 else (0, 4):
        toy = Toy(tmp_path / str(step), fault=Fault("term", step=step))
        assert run(toy, count) == [143] * count
        assert run(toy, count, fault=Fault()) == [0] * count
        assert_same(toy.folder, whole[count])


def test_2_a_run_may_stop_thrice_in_an_epoch(tmp_path: Path, whole: dict[int, Path]) -> None:
    toy = Toy(tmp_path)
    for step in (0, 1, 2):
        assert run(toy, fault=Fault("term", step=step)) == [143]
    assert run(toy) == [0]
    assert_same(tmp_path, whole[1])
    found = [json.loads(line) for line in (tmp_path / "ids-0.jsonl").read_text().splitlines()]
    assert [number for number, _, _ in found] == list(range(STEPS))
    order = [sample for _, _, batch in found for sample in batch]
    for epoch in range(STEPS * BATCH // SAMPLES):
        assert sorted(order[epoch * SAMPLES : (epoch + 1) * SAMPLES]) == list(range(SAMPLES))


@all_of_them
def test_3_workers_change_nothing(tmp_path: Path, whole: dict[int, Path]) -> None:
    toy = Toy(tmp_path, workers=2)
    assert run(toy, fault=Fault("kill", step=7)) == [-signal.SIGKILL]
    assert run(toy) == [0], output(tmp_path)
    assert_same(tmp_path, whole[1])


@pytest.mark.parametrize("stride", [6, pytest.param(1, marks=all_of_them)])
def test_5_a_kill_at_any_file_operation_of_a_save_and_of_pruning(
    tmp_path: Path, whole: dict[int, Path], stride: int
) -> None:
    """Of the sixth step's, whose checkpoint replaces the fourth's, the only one: test 12 too."""
    base = Toy(tmp_path / "base", keep=1)
    assert run(base, fault=Fault("term", step=3)) == [143]
    operation, pruned = 0, False
    while not pruned:
        toy = replace(base, folder=tmp_path / f"at-{operation}")
        shutil.copytree(base.folder, toy.folder)
        fault = Fault("kill", step=5, operation=operation)
        assert run(toy, fault=fault) == [-signal.SIGKILL]
        found = [number for number, _ in checkpoints(toy.folder / "checkpoints")]
        assert found, f"no checkpoint is left after operation {operation}"
        verify(toy.folder / "checkpoints" / f"step-{found[-1]}")
        pruned = found == [6] and not list(toy.folder.rglob("*.tmp"))
        assert run(toy) == [0], output(toy.folder)
        assert_same(toy.folder, whole[1])
        assert not list(toy.folder.rglob("*.tmp"))
        operation += stride
    assert operation > 20


@all_of_them
@pytest.mark.parametrize("rank", [0, 1])
def test_5_in_two_processes(tmp_path: Path, whole: dict[int, Path], rank: int) -> None:
    base = Toy(tmp_path / "base", keep=1)
    assert run(base, 2, fault=Fault("term", step=3)) == [143, 143]
    for operation in range(0, 30 if rank == 0 else 5):
        folder = tmp_path / f"at-{operation}"
        shutil.copytree(base.folder, folder)
        toy = replace(base, folder=folder)
        codes = run(toy, 2, fault=Fault("kill", step=5, operation=operation, rank=rank))
        assert codes[rank] == -signal.SIGKILL
        assert codes[1 - rank] not in (0, None)
        assert run(toy, 2) == [0, 0], output(folder)
        assert_same(folder, whole[2])


@all_of_them
@pytest.mark.parametrize("count", [1, 2])
def test_6_kills_at_twenty_random_times(tmp_path: Path, whole: dict[int, Path], count: int) -> None:
    draw = random.Random(count)
    toy = Toy(tmp_path, fault=Fault("slow", seconds=0.05))
    kills = 0
    while kills < 20:
        before = newest(tmp_path)
        taken = len(ids(tmp_path))
        processes = start(toy, count)
        time.sleep(draw.uniform(0.2, 2.0))
        processes[draw.randrange(count)].kill()
        wait(processes)
        kills += 1
        after = newest(tmp_path)
        assert after >= before
        reached = max([number for number, _, _ in ids(tmp_path)], default=-1)
        assert reached + 1 - after <= 3 + 1, taken  # a save that was cut off loses its own interval
        if after == STEPS:
            assert_same(tmp_path, whole[count])
            shutil.rmtree(tmp_path)
    assert run(toy, count) == [0] * count
    assert_same(tmp_path, whole[count])


def newest(folder: Path) -> int:
    return max((step for step, _ in checkpoints(folder / "checkpoints")), default=0)


@pytest.mark.parametrize("kind", ["term", "usr1"])
@pytest.mark.parametrize("rank", [0, 1])
def test_7_a_signal_to_one_process_stops_all_after_the_same_step(
    tmp_path: Path, whole: dict[int, Path], kind: str, rank: int
) -> None:
    toy = Toy(tmp_path, checkpoint_every=100)
    assert run(toy, 2, fault=Fault(kind, step=6, rank=rank)) == [143, 143], output(tmp_path)
    taken = {path.name: len(path.read_text().splitlines()) for path in tmp_path.glob("ids-*")}
    assert taken["ids-0.jsonl"] == taken["ids-1.jsonl"] in (7, 8)
    assert newest(tmp_path) == taken["ids-0.jsonl"]
    assert run(toy, 2) == [0, 0]
    assert_same(tmp_path, whole[2])


def test_8_a_second_signal_while_saving_does_no_harm(
    tmp_path: Path, whole: dict[int, Path]
) -> None:
    """A signal of the same kind, or in the end a kill: the older checkpoint is whole."""
    for kind, code in (("term", 143), ("kill", -signal.SIGKILL)):
        for operation in (3, 8, 13):
            toy = Toy(tmp_path / f"{kind}-{operation}", checkpoint_every=100)
            assert run(toy, fault=Fault("term", step=2)) == [143]
            fault = Fault(kind, step=5, operation=operation, stop=5)
            assert run(toy, fault=fault) == [code], operation
            assert newest(toy.folder) == (6 if kind == "term" else 3)
            verify(toy.folder / "checkpoints" / f"step-{newest(toy.folder)}")
            assert run(toy) == [0]
            assert_same(toy.folder, whole[1])


@all_of_them
@pytest.mark.parametrize("kind", ["raise", "exit", "segv"])
def test_9_when_one_process_dies_all_end(tmp_path: Path, kind: str) -> None:
    begun = time.monotonic()
    processes = start(Toy(tmp_path, timeout=20, fault=Fault(kind, step=4, rank=1)), 2)
    codes = wait(processes)
    assert time.monotonic() - begun < 30
    assert 0 not in codes
    assert None not in codes


@all_of_them
def test_10_when_one_process_hangs_the_timeout_ends_the_run(tmp_path: Path) -> None:
    processes = start(Toy(tmp_path, timeout=10, fault=Fault("sleep", step=4, rank=1)), 2)
    processes[0].join(30)
    assert processes[0].exitcode not in (0, None)
    processes[1].kill()  # which a launcher does, once one of its processes has failed
    wait(processes)


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=all_of_them)])
def test_11_a_full_disk_is_said_and_leaves_the_older_checkpoint(
    tmp_path: Path, whole: dict[int, Path], stride: int
) -> None:
    base = Toy(tmp_path / "base", keep=1)
    assert run(base, fault=Fault("term", step=3)) == [143]
    for operation in range(0, 26, stride):
        folder = tmp_path / f"at-{operation}"
        shutil.copytree(base.folder, folder)
        toy = replace(base, folder=folder)
        assert run(toy, fault=Fault("full", step=5, operation=operation)) == [2], operation
        assert "error: " in output(folder)
        assert "No space left on device" in output(folder)
        assert "Traceback" not in output(folder)
        verify(folder / "checkpoints" / f"step-{newest(folder)}")
        assert run(toy) == [0]
        assert_same(folder, whole[1])
        assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("name", ["net.safetensors", "critic.safetensors", "manifest.json"])
def test_13_a_damaged_checkpoint_is_skipped_unless_it_was_asked_for(
    tmp_path: Path, whole: dict[int, Path], name: str
) -> None:
    toy = Toy(tmp_path)
    assert run(toy, fault=Fault("kill", step=7)) == [-signal.SIGKILL]
    file = tmp_path / "checkpoints" / "step-6" / name
    content = bytearray(file.read_bytes())
    content[-7] ^= 4
    file.write_bytes(content)
    assert run(toy, resume_from=file.parent) == [2]
    assert f"error: {file}" in output(tmp_path)
    assert run(toy) == [0]
    assert "going on from step-3" in output(tmp_path)
    assert_same(tmp_path, whole[1])


def test_15_one_two_and_one_process_are_one_run(tmp_path: Path, whole: dict[int, Path]) -> None:
    toy = Toy(tmp_path)
    for count, step in ((1, 2), (2, 6), (1, 9)):
        assert run(toy, count, fault=Fault("term", step=step)) == [143] * count
    assert run(toy) == [0]
    assert_equivalent(tmp_path, whole[1])


@pytest.mark.parametrize(("count", "accumulation"), [(1, 2), (2, 1), (2, 2)])
def test_16_processes_and_accumulation_change_only_the_order_of_sums(
    tmp_path: Path, whole: dict[int, Path], count: int, accumulation: int
) -> None:
    toy = Toy(tmp_path, accumulation=accumulation)
    assert run(toy, count) == [0] * count, output(tmp_path)
    assert_equivalent(tmp_path, whole[1])
    rates = [record["learning_rate"] for record in log(tmp_path)]
    assert rates == [record["learning_rate"] for record in log(whole[1])]
    assert rates == pytest.approx([1e-2 * min(1, (i + 1) / 4, (12 - i) / 4) for i in range(12)])


def assert_equivalent(folder: Path, reference: Path) -> None:
    """The same samples in each step, and losses and weights within 1e-5."""
    assert joined(folder) == joined(reference)
    found, expected = log(folder), log(reference)
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for name in ("loss", "critic", "grad_norm", "grad_norm_critic"):
        assert [r[name] for r in found] == pytest.approx([r[name] for r in expected], abs=1e-5)
    wanted = tensors(reference)
    for name, tensor in tensors(folder).items():
        assert (tensor - wanted[name]).abs().max() < 1e-4, name


def joined(folder: Path) -> list[list[int]]:
    """The sample ids of each step, of all parts in the order of the global batch."""
    steps: dict[int, list[int]] = {}
    taken: dict[int, int] = {}
    for path in sorted(folder.glob("ids-*.jsonl")):
        for line in path.read_text().splitlines():
            number, _, found = json.loads(line)
            steps.setdefault(number, []).extend(found)
            taken[number] = taken.get(number, 0) + len(found)
    assert set(taken.values()) == {BATCH}
    return [steps[number] for number in sorted(steps)]


@all_of_them
def test_17_looking_at_the_average_leaves_the_weights_alone(
    tmp_path: Path, whole: dict[int, Path]
) -> None:
    toy = Toy(tmp_path, preview=True)
    assert run(toy, fault=Fault("kill", step=6)) == [-signal.SIGKILL]
    assert run(toy) == [0]
    assert_same(tmp_path, whole[1])
    assert len(list((tmp_path / "previews").iterdir())) == 3


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
    assert [int(record["skipped"]) for record in log(tmp_path)].count(1) <= 2
    assert any(not before[name].equal(tensors(tmp_path, 7)[name]) for name in before)


def test_18_and_stops_the_run_when_it_stays(tmp_path: Path) -> None:
    toy = Toy(tmp_path, fault=Fault("nan", step=4, until=STEPS, rank=1))
    assert run(toy, 2) == [2, 2]
    assert "not finite for 3 steps in a row" in output(tmp_path)
    assert "the first number that was not is in the loss" in output(tmp_path)
    assert len((tmp_path / "ids-0.jsonl").read_text().splitlines()) == 4 + 3 + 1  # one again


def test_20_a_folder_takes_one_run_at_a_time(tmp_path: Path, whole: dict[int, Path]) -> None:
    first = start(Toy(tmp_path, fault=Fault("slow", seconds=0.2)))
    until = time.monotonic() + 30
    while not list(tmp_path.glob("ids-0.jsonl")) and time.monotonic() < until:
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


def test_20_a_folder_that_cannot_be_written_is_refused_early(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    from latentdiff.training.run_folder import RunFolder

    with pytest.raises(ValueError, match=r"output_dir=.*/file/run cannot be written: Not a dir"):
        RunFolder(tmp_path / "file" / "run", "seed: 1")
    if os.geteuid():
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(ValueError, match=r"output_dir=.* cannot be written: Permission"):
            RunFolder(tmp_path / "locked", "seed: 1")
