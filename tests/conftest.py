"""What every test runs under: no network, one thread, fixed seeds, deterministic operators."""

import os

# Before any test module imports the libraries that read them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads and a test's child processes deadlock
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products

import gc
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.interchange_table import Measured, Row, write

from latentdiff import device

torch.set_num_threads(1)  # tiny networks lose more by waiting for a second thread than they gain
os.fsync = lambda _: None  # a test's files need not survive the machine; a flush takes 4 ms
gc.disable()  # the million objects that imports make stay: walking them takes half of collection


QUICK_CASES = 2
"""Of each parametrized test so many cases are quick; the others are marked exhaustive."""
ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--interchange_table", type=Path, help="write what was measured into FILE")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_collection_finish() -> None:
    gc.freeze()  # so that neither a test nor the end of the process walks them
    gc.enable()


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--interchange_table")
    if path is not None:
        write(session.config.stash[ROWS], path)


@pytest.fixture(autouse=True, scope="session")
def _load_on_the_cpu() -> Iterator[None]:
    """A pipeline that is loaded without a device is on the CPU in tests, on whatever machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "accelerator", lambda: None)
        yield


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Measured:
    """Call with the fields of a Row: it goes into docs/interchange.md."""
    return lambda *row: request.config.stash[ROWS].append(Row(*row))


@pytest.hookimpl(tryfirst=True)  # before marks are selected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    cases = Counter[str]()
    for item in items:
        law = item.nodeid.partition("[")[0]
        cases[law] += 1
        if cases[law] > QUICK_CASES:
            item.add_marker(pytest.mark.exhaustive)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test starts from the same seeds and default dtype, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global generator is the one that must not leak
    torch.manual_seed(0)
    # Also fills torch.empty with NaN, so that memory read before it is written cannot pass. Some
    # CUDA kernels have no deterministic form, so that tests on a GPU compare within a tolerance.
    torch.use_deterministic_algorithms(request.node.get_closest_marker("gpu") is None)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float32)
    if "accelerate" in sys.modules:  # it keeps the first precision that it is told of
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)
