"""Training checkpoints: a folder a step, complete or absent; safetensors and JSON only."""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from latentdiff.formats.weights import load_json, load_safetensors, save_json, save_safetensors
from latentdiff.training.learner import Learner


def save_checkpoint(folder: Path, step: int, learners: Mapping[str, Learner], *, keep: int) -> None:
    """Write `step-N/` beside its final name, rename it, then drop all but the newest `keep`."""
    staging = folder / f".step-{step}.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for name, learner in learners.items():
        save_safetensors(learner.tensors(), staging / f"{name}.safetensors")
    updates = {name: learner.num_updates for name, learner in learners.items()}
    save_json({"step": step, "num_updates": updates}, staging / "state.json")
    final = folder / f"step-{step}"
    shutil.rmtree(final, ignore_errors=True)
    os.replace(staging, final)
    for _, old in checkpoints(folder)[:-keep]:
        doomed = old.rename(folder / f".{old.name}.tmp")  # at no moment half there
        shutil.rmtree(doomed)


def load_checkpoint(folder: Path, learners: Mapping[str, Learner]) -> int:
    """Restore the newest checkpoint, if there is one; returns the step to go on from, else 0.

    Raises ValueError when it is damaged or of other networks than these.
    """
    found = checkpoints(folder)
    if not found:
        return 0
    step, newest = found[-1]
    state = load_json(newest / "state.json")
    for name, learner in learners.items():
        tensors = load_safetensors(newest / f"{name}.safetensors")
        try:
            learner.load_tensors(tensors, num_updates=state["num_updates"][name])
        except ValueError as error:
            raise ValueError(
                f"{newest} was made with another configuration ({error}); "
                "go back to that one or choose another output_dir"
            ) from error
    return step


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints, oldest first: (step, path)."""
    found = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.glob("step-*")]
    return sorted((int(match[1]), path) for match, path in found if match)
