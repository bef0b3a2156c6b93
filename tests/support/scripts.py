"""The programs of a training: run in this process or in others, and their configuration classes."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from latentdiff.training import loop
from latentdiff.training.command_line import run_script

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
CONFIGS = {
    "train_clip": "TrainCLIP",
    "train_vae": "TrainVAE",
    "cache_latents": "CacheLatents",
    "train_unet": "TrainUNet",
    "distill": "Distill",
}
"""The scripts, and the configuration that each imports or defines."""


def script(name: str) -> ModuleType:
    """The module of which train/<name>.py runs `main`."""
    return importlib.import_module(f"latentdiff.scripts.{name}")


def launch(launcher: Sequence[str], name: str, *args: str) -> None:
    """Run train/<name>.py in processes of its own, by LAUNCH or TWO."""
    command = [*launcher, str(ROOT / "train" / f"{name}.py"), *args]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.getenv("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr


def run_here(name: str, *args: str) -> None:
    """Run train/<name>.py in this process, which has its imports behind it."""
    with without_curves() as patch:
        patch.setattr(sys, "argv", [f"train/{name}.py", *args])
        run_script(script(name).main)


@contextmanager
def without_curves() -> Iterator[pytest.MonkeyPatch]:
    """Train without drawing curves at each checkpoint, which takes longer than a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "plot_log", lambda log, out: None)
        patch.setattr(loop, "write_report", lambda folder: None)
        yield patch


def config_class(name: str) -> Any:
    """The dataclass that train/<name>.py is configured by."""
    return getattr(script(name), CONFIGS[name])
