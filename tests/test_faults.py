"""What a run survives: real processes, real signals, and the same bits in the end.

*The same* is: all weights, averages and moments of the last checkpoint have the bytes of an
uninterrupted run's, and at every step each process had the same samples, drew the same numbers and
had the same networks. A test's number is its row in docs/faults.md; test_faults_within.py has those
in which something goes wrong inside a run.
"""

import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.faulty import (
    BATCH,
    SAMPLES,
    STEPS,
    Fault,
    Kind,
    Toy,
    every_note,
    log,
    notes,
    output,
    tensors,
)
from support.harness import assert_same, left_over, newest, references, run, start, wait

from latentdiff.formats.weights import load_json
from latentdiff.training.checkpoint_files import checkpoints, verify

pytestmark = pytest.mark.processes
all_of_them = pytest.mark.faults  # too long for `make test`, which has the others


def later(*values: Any) -> Any:
    """Parameters that `make test-faults` alone has."""
    return pytest.param(*values, marks=all_of_them)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return references(tmp_path_factory.mktemp)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("stop", [1, later(4), 9, later(10)])
def test_1_a_run_may_stop_after_any_step(
    tmp_path: Path, whole: dict[int, Path], count: int, stop: int
) -> None:
    """After the first step, amid an epoch, at its end (9 steps are two epochs) and after it."""
    toy = Toy(tmp_path)
    # Several processes agree at the beginning of a step on whether it is the last.
    assert run(toy, count, fault=Fault("term", step=stop - count)) == [143] * count
    assert newest(tmp_path) == stop
    assert run(toy, count) == [0] * count
    assert_same(tmp_path, whole[count])


@pytest.mark.parametrize("count", [1, later(2)])
def test_2_a_run_may_stop_thrice_in_an_epoch(
    tmp_path: Path, whole: dict[int, Path], count: int
) -> None:
    toy = Toy(tmp_path)
    for stop in (1, 2, 3):
        assert run(toy, count, fault=Fault("term", step=-1)) == [143] * count
        assert newest(tmp_path) == stop
        assert (stop + 1) * BATCH < SAMPLES  # the next resume is in the first epoch too
    assert run(toy, count) == [0] * count
    assert_same(tmp_path, whole[count])
    found = [every_note(tmp_path / f"notes-{rank}.jsonl") for rank in range(count)]
    for of_rank in found:
        assert [number for number, *_ in of_rank] == list(range(STEPS))
    order = [i for step in zip(*found, strict=True) for _, _, ids, _ in step for i in ids]
    for epoch in range(STEPS * BATCH // SAMPLES):
        assert sorted(order[epoch * SAMPLES : (epoch + 1) * SAMPLES]) == list(range(SAMPLES))


@pytest.mark.parametrize("workers", [(0, 2), (2, 0), later((2, 2))])
@pytest.mark.parametrize("count", [1, later(2)])
def test_3_workers_change_nothing(
    tmp_path: Path, whole: dict[int, Path], workers: tuple[int, int], count: int
) -> None:
    """With random crops and flips; the resumed run has nine steps before it."""
    toy = Toy(tmp_path, workers=workers[0])
    assert -signal.SIGKILL in run(toy, count, fault=Fault("kill", step=4))
    taken = len(notes(tmp_path))
    assert run(toy, count, workers=workers[1]) == [0] * count, output(tmp_path)
    assert taken <= 5 * count
    assert_same(tmp_path, whole[count])


@pytest.mark.parametrize("count", [1, 2])
def test_4_the_streams_of_random_numbers_go_on(
    tmp_path: Path, whole: dict[int, Path], count: int
) -> None:
    """Noise, timesteps, crops, flips, caption choice and dropout, each of them alone."""
    toy = Toy(tmp_path)
    assert run(toy, count, fault=Fault("term", step=4 - count)) == [143] * count
    before = [len(every_note(tmp_path / f"notes-{rank}.jsonl")) for rank in range(count)]
    assert run(toy, count) == [0] * count
    for rank in range(count):
        reference = every_note(whole[count] / f"notes-{rank}.jsonl")
        number, _, _, drawn = every_note(tmp_path / f"notes-{rank}.jsonl")[before[rank]]
        assert number == 4
        first, expected = reference[0][3], reference[4][3]
        for stream in ("batch", "noise", "t", "captions", "dropout"):
            assert drawn[stream] == expected[stream]
            assert drawn[stream] != first[stream]


@pytest.mark.parametrize("stride", [6, later(1)])
def test_5_and_12_a_kill_at_any_file_operation_of_a_save_and_of_pruning(
    tmp_path: Path, whole: dict[int, Path], stride: int
) -> None:
    """Of the sixth step's, whose checkpoint replaces the fourth's, the only one."""
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
        pruned = found == [6] and not left_over(toy.folder)
        taken = len(every_note(toy.folder / "notes-0.jsonl"))
        assert run(toy) == [0], output(toy.folder)
        assert every_note(toy.folder / "notes-0.jsonl")[taken][0] == found[-1]  # the newest
        assert_same(toy.folder, whole[1])
        assert not left_over(toy.folder)
        operation += stride
    assert operation > 20


@all_of_them
@pytest.mark.parametrize("rank", [0, 1])
def test_5_and_12_in_two_processes(tmp_path: Path, whole: dict[int, Path], rank: int) -> None:
    base = Toy(tmp_path / "base", keep=1)
    assert run(base, 2, fault=Fault("term", step=2)) == [143, 143]
    operation, pruned = 0, False
    while not pruned:
        folder = tmp_path / f"at-{operation}"
        shutil.copytree(base.folder, folder)
        toy = replace(base, folder=folder)
        codes = run(toy, 2, fault=Fault("kill", step=5, operation=operation, rank=rank))
        assert codes[rank] == -signal.SIGKILL
        assert codes[1 - rank] not in (0, None)
        found = [number for number, _ in checkpoints(folder / "checkpoints")]
        assert found
        verify(folder / "checkpoints" / f"step-{found[-1]}")
        pruned = found == [6] and not left_over(folder)
        taken = len(every_note(folder / "notes-0.jsonl"))
        assert run(toy, 2) == [0, 0], output(folder)
        assert every_note(folder / "notes-0.jsonl")[taken][0] == found[-1]
        assert_same(folder, whole[2])
        operation += 1
    assert operation > (20 if rank == 0 else 3)


@pytest.mark.parametrize("count", [1, later(2)])
def test_6_kills_at_twenty_random_times(tmp_path: Path, whole: dict[int, Path], count: int) -> None:
    """A kill loses no more than one interval between checkpoints, of three steps.

    Where it comes before the processes have met, the other waits for as long as the timeout.
    """
    toy = Toy(tmp_path / "run", timeout=20, fault=Fault("slow", seconds=0.03))
    begun = time.monotonic()
    assert run(replace(toy, folder=tmp_path / "timed"), count) == [0] * count
    lifetime = time.monotonic() - begun
    draw = random.Random(count)
    kills, folder = 0, toy.folder
    while kills < 20:
        before = newest(folder)
        path = folder / f"notes-{count - 1}.jsonl"
        taken = len(every_note(path))
        processes = start(toy, count)
        time.sleep(draw.uniform(0, lifetime))
        processes[draw.randrange(count)].kill()
        codes = wait(processes)
        assert None not in codes
        kills += -signal.SIGKILL in codes
        after = newest(folder)
        assert after >= before
        fresh = every_note(path)[taken:]
        if fresh:
            assert fresh[0][0] == before
            assert fresh[-1][0] + 1 - after <= 3  # all that may have been done, and what was kept
        if after == STEPS:
            assert_same(folder, whole[count])
            shutil.rmtree(folder)
    assert run(toy, count) == [0] * count, output(folder)
    assert_same(folder, whole[count])


@pytest.mark.parametrize(
    ("kind", "rank"),
    [("term", 0), later("term", 1), later("usr1", 0), ("usr1", 1), later("int", 1)],
)
def test_7_a_signal_to_one_process_stops_all_after_the_same_step(
    tmp_path: Path, whole: dict[int, Path], kind: Kind, rank: int
) -> None:
    toy, code = Toy(tmp_path, checkpoint_every=100), 130 if kind == "int" else 143
    assert run(toy, 2, fault=Fault(kind, step=6, rank=rank)) == [code, code], output(tmp_path)
    taken = [len(every_note(tmp_path / f"notes-{r}.jsonl")) for r in range(2)]
    assert taken[0] == taken[1] in (7, 8)
    assert newest(tmp_path) == taken[0]
    assert run(toy, 2) == [0, 0]
    assert_same(tmp_path, whole[2])


@pytest.mark.parametrize("stride", [7, later(1)])
@pytest.mark.parametrize(("kind", "code"), [("term", 143), ("int", 143), ("kill", -signal.SIGKILL)])
def test_8_a_second_signal_while_saving_does_no_harm(
    tmp_path: Path, whole: dict[int, Path], stride: int, kind: Kind, code: int
) -> None:
    """SIGTERM, and at each operation of the save that follows it another: older ones are whole."""
    base = Toy(tmp_path / "base", checkpoint_every=100)
    assert run(base, fault=Fault("term", step=2)) == [143]
    operation = 0
    while True:
        folder = tmp_path / f"at-{operation}"
        shutil.copytree(base.folder, folder)
        toy = replace(base, folder=folder)
        fault = Fault(kind, step=5, operation=operation, stop=5)
        codes = run(toy, fault=fault)
        verify(folder / "checkpoints" / "step-3")
        verify(folder / "checkpoints" / f"step-{newest(folder)}")
        assert newest(folder) == 6 or kind == "kill"
        assert run(toy) == [0], output(folder)
        assert_same(folder, whole[1])
        assert not left_over(folder)
        if codes == [143] and kind == "kill":
            break  # there are no more operations than that
        assert codes == [code], operation
        if operation > 30:
            break
        operation += stride
    assert operation > 10


@pytest.mark.parametrize("count", [1, 2])
def test_14_no_generator_has_a_state_that_counts(
    tmp_path: Path, whole: dict[int, Path], count: int
) -> None:
    """So none can be missing: global generators that everybody uses change no bit of a resume."""
    toy = Toy(tmp_path)
    assert run(toy, count, fault=Fault("term", step=3)) == [143] * count
    for _, checkpoint in checkpoints(tmp_path / "checkpoints"):
        assert {path.suffix for path in checkpoint.iterdir()} == {".json", ".safetensors"}
        names = {*tensors(tmp_path, newest(tmp_path)), *load_json(checkpoint / "manifest.json")}
        assert not [name for name in names if "rng" in name or "random" in name or "seed" in name]
    assert run(toy, count, disturbed=99) == [0] * count
    assert_same(tmp_path, whole[count])


MANY = [(1, 2), (2, 1), (2, 2), (4, 1), later(1, 1), later(1, 8), later(2, 4), later(4, 2)]


@pytest.mark.parametrize("workers", [0, later(2)])
@pytest.mark.parametrize(("count", "gradient_accumulation_steps"), MANY)
def test_15_and_16_processes_and_accumulation_change_only_the_order_of_sums(
    tmp_path: Path,
    whole: dict[int, Path],
    count: int,
    gradient_accumulation_steps: int,
    workers: int,
) -> None:
    """The learning rate at a step is the same too, and ends where it should."""
    toy = Toy(tmp_path, gradient_accumulation_steps=gradient_accumulation_steps, workers=workers)
    assert run(toy, count) == [0] * count, output(tmp_path)
    assert_equivalent(tmp_path, whole[1])
    rates = [record["learning_rate"] for record in log(tmp_path)]
    assert rates == [record["learning_rate"] for record in log(whole[1])]
    assert rates == pytest.approx([1e-2 * min(1, (i + 1) / 4, (12 - i) / 4) for i in range(12)])


@pytest.mark.parametrize("counts", [(1, 2, 1), later((4, 1, 2))])
def test_15_a_run_goes_on_with_another_number_of_processes(
    tmp_path: Path, whole: dict[int, Path], counts: tuple[int, int, int]
) -> None:
    toy = Toy(tmp_path)
    for count, step in zip(counts, (2, 5, 9), strict=True):
        assert run(toy, count, fault=Fault("term", step=step)) == [143] * count
    assert run(toy, counts[0]) == [0] * counts[0]
    assert_equivalent(tmp_path, whole[1])


def assert_equivalent(folder: Path, reference: Path) -> None:
    """The same samples in each step, and losses within 1e-5."""
    assert joined(folder) == joined(reference)
    found, expected = log(folder), log(reference)
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for name in ("loss", "critic", "grad_norm", "grad_norm_critic"):
        values = [record[name] for record in expected]
        assert [record[name] for record in found] == pytest.approx(values, rel=0, abs=1e-5)
    wanted = tensors(reference)
    for name, tensor in tensors(folder).items():
        assert (tensor - wanted[name]).abs().max() < 1e-4, name


def joined(folder: Path) -> list[list[tuple[int, float, str]]]:
    """What each step was made of, of all processes in the order of the global batch."""
    steps: dict[int, list[tuple[int, float, str]]] = {}
    for path in sorted(folder.glob("notes-*.jsonl")):
        for number, _, found, note in every_note(path):
            rows = zip(found, note["t"], note["captions"], strict=True)
            steps.setdefault(number, []).extend(rows)
    assert {len(found) for found in steps.values()} == {BATCH}
    return [steps[number] for number in sorted(steps)]


@pytest.mark.parametrize("count", [1, 2])
def test_17_looking_at_the_average_leaves_the_weights_alone(
    tmp_path: Path, whole: dict[int, Path], count: int
) -> None:
    """In what each step began with: weights, averages, number of updates."""
    toy = Toy(tmp_path, looked_at=True)
    assert -signal.SIGKILL in run(toy, count, fault=Fault("kill", step=6))
    assert run(toy, count) == [0] * count
    assert_same(tmp_path, whole[count])
    shown = [float(path.read_text()) for path in sorted((tmp_path / "previews").glob("*.txt"))]
    scored = {
        record["step"]: record["val_loss"] for record in log(tmp_path) if "val_loss" in record
    }
    assert list(scored) == [4, 8, 12]
    assert list(scored.values()) == shown
    assert len(set(shown)) == 3
