"""Whether a run is compiled."""

from pathlib import Path
from typing import Literal

import pytest

from latentdiff.training.accelerator import (
    MIN_COMPILED_STEPS,
    ComputeConfig,
    ParallelConfig,
    Sharding,
    decide_compile,
)


def compiles(
    compiled: bool | Literal["auto"],
    *,
    precision: str = "bf16",
    max_steps: int = MIN_COMPILED_STEPS,
    sharding: Sharding = "none",
    num_sizes: int = 1,
) -> bool | str:
    compute, parallel = ComputeConfig(compile=compiled), ParallelConfig(sharding=sharding)
    return decide_compile(
        compute, parallel, precision=precision, max_steps=max_steps, num_sizes=num_sizes
    )


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "sh")  # anything that is installed


def test_long_runs_in_bf16_are_compiled_where_there_is_a_compiler(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert compiles("auto")
    monkeypatch.setenv("CXX", "sh -c")
    assert compiles("auto")
    assert not compiles("auto", max_steps=MIN_COMPILED_STEPS - 1)
    assert not compiles("auto", num_sizes=2)
    assert not compiles("auto", sharding="full")
    assert not compiles("auto", precision="no")
    monkeypatch.setenv("CXX", str(Path("no") / "such" / "compiler"))
    assert not compiles("auto")


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_what_is_asked_for_is_done(precision: str, *, compiled: bool) -> None:
    assert compiles(compiled, precision=precision, max_steps=1) == compiled
