"""What benchmarks/speed.py says of measured times."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from speed import moved
from speed_tables import SAME, Row, Table, Variant, gate, measure
from timing import interleave, ratio

CPU = torch.device("cpu")


def test_the_ratio_of_times_that_do_not_vary_is_exact() -> None:
    assert ratio([3.0] * 7, [2.0] * 7) == (1.5, 1.5, 1.5)


def test_the_interval_holds_the_true_ratio_about_as_often_as_it_says() -> None:
    """Of rounds whose speeds vary together by tens of percent, and apart by two."""
    held = 0
    draw = random.Random(0)
    for _ in range(40):
        slow = [draw.uniform(1, 1.5) for _ in range(15)]
        theirs = [2 * s * draw.gauss(1, 0.02) for s in slow]
        ours = [s * draw.gauss(1, 0.02) for s in slow]
        _, low, high = ratio(theirs, ours)
        held += low <= 2 <= high
        assert high - low < 1
    assert held >= 34


def test_every_round_has_every_call_once() -> None:
    called: list[str] = []
    seconds = interleave(
        {name: lambda name=name: called.append(name) for name in "abc"}, rounds=4, device=CPU
    )
    assert {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    rounds = np.array(called[6:]).reshape(4, 3)
    assert (np.sort(rounds, axis=1) == list("abc")).all()


def table(**found: float) -> Table:
    variants = {
        "ours, float32": Variant(lambda: 0.0, reference=True),
        "ours": Variant(lambda: found["ours"]),
        "diffusers, float32": Variant(lambda: found["same"]),
        "diffusers, bf16": Variant(lambda: found["theirs"]),
    }
    return Table("numbers", variants, "ours", error=lambda a, b: abs(a - b))


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        ({"ours": 1e-3, "same": SAME / 2, "theirs": 1e-3}, 0),
        ({"ours": 2e-3, "same": SAME / 2, "theirs": 1e-3}, 1),
        ({"ours": 1e-3, "same": SAME * 2, "theirs": 1e-3}, 1),
    ],
)
def test_what_is_further_from_float32_than_the_peers_fails(
    found: dict[str, float], wrong: int
) -> None:
    measured = table(**found)
    rows = measure(measured, rounds=3, device=CPU)
    assert rows["ours"].ratio == (1.0, 1.0, 1.0)
    assert rows["ours, float32"].error is None
    assert len(gate(measured, rows)) == wrong


def test_only_what_is_beyond_both_intervals_has_moved() -> None:
    before = {"machine": "a machine", "date": "2026-11-28", "ratios": {"t": {"x": [1.5, 1.4, 1.6]}}}
    row = Row(1.0, 0.1, 2.0, (1.7, 1.55, 1.8), None)
    assert moved({"t": {"x": row.ratio}}, before).endswith("nothing moved")
    assert moved({"t": {"x": (1.7, 1.65, 1.8)}}, before).endswith("1.50 -> 1.70, better")
    assert moved({"t": {"x": (1.2, 1.1, 1.3)}}, before).endswith("1.50 -> 1.20, worse")
    assert moved({"t": {"new": (1.2, 1.1, 1.3)}}, before).endswith("nothing moved")
