"""Training checkpoints: one folder per step, complete and verified or absent; safetensors and JSON.

A checkpoint holds one safetensors file per learner, or per process if the learner is sharded, and
`manifest.json`: every file's size and SHA-256, the step, the configuration, library versions and
fingerprints. It holds no generator state, since every random number of a run is a function of
(seed, step, purpose).
"""

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import accelerate
import safetensors
import torch
from safetensors import safe_open
from torch import Tensor

from latentdiff.formats.weights import (
    load_json,
    replacing,
    save_json,
    save_safetensors,
)
from latentdiff.training.checkpoint_files import (
    MANIFEST,
    digest,
    file_digest,
    find_checkpoint,
    prune,
    set_aside,
    sweep,
    sync_folder,
)
from latentdiff.training.learner import Learner
from latentdiff.training.processes import Processes

LIBRARIES = (torch, accelerate, safetensors)


def save_checkpoint(
    folder: Path,
    step: int,
    learners: Mapping[str, Learner],
    *,
    keep: int,
    manifest: Mapping[str, Any],
    processes: Processes | None = None,
) -> None:
    """Write `step-N/` under a temporary name, rename it, then delete all but the newest `keep`.

    Every process must call it, and writes some of the files. Once there is a first checkpoint,
    there is a complete one at every moment: older ones are deleted after the new one is renamed.
    `manifest` goes into manifest.json beside the files and the step.
    Raises OSError, or in several processes ValueError, when it cannot be written; then nothing
    is left of it and the older checkpoints are as they were.
    """
    processes = Processes() if processes is None else processes
    staging = folder / f".step-{step}.tmp"
    try:
        processes.on_main(lambda: _begin(folder, staging))
        processes.on_all(lambda: _write(staging, learners, processes))
        processes.on_main(lambda: _finish(folder, staging, step, learners, manifest))
    except (ValueError, OSError):
        if processes.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    processes.on_main(lambda: prune(folder, step, keep))


def load_checkpoint(
    folder: Path,
    learners: Mapping[str, Learner],
    *,
    manifest: Mapping[str, Any],
    path: Path | None = None,
    processes: Processes | None = None,
) -> int:
    """Restore the newest intact checkpoint, if there is one; returns its step, else 0.

    A damaged one is skipped with a warning that names the file. `path` asks for that checkpoint in
    place of the newest, and later ones are renamed; once there are checkpoints that were resumed
    from it (`resumed_from` of `manifest`), the newest of these is taken. Raises ValueError when
    `path` is damaged, when there are checkpoints but none is intact, and when the checkpoint is of
    other networks or other data (`fingerprints` of `manifest`).
    """
    processes = Processes() if processes is None else processes
    newest = processes.on_main(lambda: find_checkpoint(folder, path))
    if newest is None:
        return 0
    step = processes.on_all(lambda: _load(newest, learners, manifest))
    for learner in learners.values():
        learner.gather()
    if path is not None and newest == path:
        processes.on_main(lambda: set_aside(folder, step))
    return step


def _load(path: Path, learners: Mapping[str, Learner], manifest: Mapping[str, Any]) -> int:
    content = load_json(path / MANIFEST)
    recorded, current = content.get("fingerprints", {}), manifest.get("fingerprints", {})
    both = recorded.keys() & current.keys()
    changed = [name for name in both if recorded[name] != current[name]]
    if changed:
        raise ValueError(
            f"{path} was made with another {' and another '.join(sorted(changed))} than "
            "this run's; go back to that or choose another output_dir"
        )
    for name, learner in learners.items():
        try:
            learner.load_tensors(
                StoredTensors(path, name), num_updates=content["num_updates"][name]
            )
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{path} was made with another configuration ({error}); "
                "go back to that one or choose another output_dir"
            ) from error
    return content["step"]


class StoredTensors(Mapping[str, Tensor]):
    """A learner's full tensors in a checkpoint, each of which is read when it is looked up.

    Each process of a sharded learner wrote its local rows under the same names, and the main
    process what was not sharded as well.
    """

    def __init__(self, folder: Path, learner: str) -> None:
        single = folder / f"{learner}.safetensors"
        shards = sorted(folder.glob(f"{learner}-*-of-*.safetensors"))
        if not single.is_file() and not shards:
            raise ValueError(f"it has no {learner}")
        self._files = [safe_open(path, "pt") for path in ([single] if single.is_file() else shards)]
        self._names = [set(file.keys()) for file in self._files]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names[0]))

    def __len__(self) -> int:
        return len(self._names[0])

    def __contains__(self, name: object) -> bool:
        return name in self._names[0]

    def __getitem__(self, name: str) -> Tensor:
        files = zip(self._files, self._names, strict=True)
        rows = [file.get_tensor(name) for file, names in files if name in names]
        if not rows:
            raise KeyError(name)
        return rows[0] if len(rows) == 1 else torch.cat(rows)


def _begin(folder: Path, staging: Path) -> None:
    sweep(folder)
    staging.mkdir(parents=True)


def _write(staging: Path, learners: Mapping[str, Learner], processes: Processes) -> None:
    # Gather all tensors before writing any: a process that fails here would leave others waiting.
    tensors = {name: learner.tensors() for name, learner in learners.items()}
    for number, (name, learner) in enumerate(learners.items()):
        if learner.sharded:
            path = staging / f"{name}-{processes.rank + 1:05d}-of-{processes.count:05d}.safetensors"
        elif number % processes.count == processes.rank:
            path = staging / f"{name}.safetensors"
        else:
            continue
        try:
            save_safetensors(tensors[name], path)
        except safetensors.SafetensorError as error:  # a full disk, seen from inside the library
            raise OSError(f"{path} cannot be written: {error}") from error


def _finish(
    folder: Path,
    staging: Path,
    step: int,
    learners: Mapping[str, Learner],
    manifest: Mapping[str, Any],
) -> None:
    """Write the manifest of all processes' files, rename the folder, and point `latest` at it."""
    content = {
        **manifest,
        "step": step,
        "num_updates": {name: learner.num_updates for name, learner in learners.items()},
        "versions": _versions(),
        "files": {
            file.name: {"size": file.stat().st_size, "sha256": file_digest(file)}
            for file in sorted(staging.iterdir())
        },
    }
    # JSON has no tuples: the digest is of what will be read.
    content = json.loads(json.dumps(content))
    save_json({**content, "sha256": digest(content)}, staging / MANIFEST)
    sync_folder(staging)
    final = folder / f"step-{step}"
    if final.exists():  # a damaged one, which the run went back before
        os.replace(final, folder / f".step-{step}.old.tmp")
    os.replace(staging, final)
    sync_folder(folder)
    with replacing(folder / "latest") as temporary:
        temporary.write_text(f"{final.name}\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    # Not imported by name: the package's own module leads to the floors above this one.
    ours = sys.modules["latentdiff"]
    libraries = {library.__name__: str(library.__version__) for library in (*LIBRARIES, ours)}
    return {"python": platform.python_version(), **libraries}
