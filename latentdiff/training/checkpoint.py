"""Training checkpoints: a folder a step, whole and verified or absent; safetensors and JSON only.

A checkpoint holds a safetensors file a learner, or one a process where they share a network, and
`manifest.json`: every file's size and SHA-256, the step, the configuration, library versions and
fingerprints. There is no state of generators in it, since every random number of a run is a
function of (seed, step, purpose).
"""

import hashlib
import json
import os
import platform
import re
import shutil
import sys
import warnings
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
from latentdiff.training.learner import Learner
from latentdiff.training.processes import Processes

MANIFEST = "manifest.json"
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
    """Write `step-N/` beside its final name, verify it, rename it, then drop all but `keep`.

    Every process calls it, and they share the learners among them. At every moment at least one
    whole checkpoint is there once the first was: the older ones go when the new one has its name.
    `manifest` is what goes into manifest.json beside the files and the step.
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
    processes.on_main(lambda: _prune(folder, step, keep))


def load_checkpoint(
    folder: Path,
    learners: Mapping[str, Learner],
    *,
    manifest: Mapping[str, Any],
    path: Path | None = None,
    processes: Processes | None = None,
) -> int:
    """Restore the newest whole checkpoint, if there is one; returns the step to go on from, else 0.

    A damaged one is skipped with a warning that names the file. `path` asks for one checkpoint in
    place of the newest, and later ones are set aside under other names; once there are checkpoints
    that came of it (`resumed_from` of `manifest`), the newest of these is taken. Raises ValueError
    when that one is damaged, when there are checkpoints but none is whole, and when it is of other
    networks or other data (`fingerprints` of `manifest`).
    """
    processes = Processes() if processes is None else processes
    found = processes.on_main(lambda: find_checkpoint(folder, path))
    if found is None:
        return 0
    step = processes.on_all(lambda: _load(found, learners, manifest))
    for learner in learners.values():
        learner.gather()
    if path is not None and found == path:
        processes.on_main(lambda: _set_aside(folder, step))
    return step


def _load(found: Path, learners: Mapping[str, Learner], manifest: Mapping[str, Any]) -> int:
    content = load_json(found / MANIFEST)
    recorded, now = content.get("fingerprints", {}), manifest.get("fingerprints", {})
    changed = [name for name in recorded.keys() & now.keys() if recorded[name] != now[name]]
    if changed:
        raise ValueError(
            f"{found} was made with another {' and another '.join(sorted(changed))} than "
            "this run's; go back to that or choose another output_dir"
        )
    for name, learner in learners.items():
        try:
            learner.load_tensors(Stored(found, name), num_updates=content["num_updates"][name])
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{found} was made with another configuration ({error}); "
                "go back to that one or choose another output_dir"
            ) from error
    return content["step"]


class Stored(Mapping[str, Tensor]):
    """A learner's whole tensors, each read when it is asked for.

    Where processes shared the network, each has written its rows, under the same names; the first
    has also written what was not split.
    """

    def __init__(self, folder: Path, learner: str) -> None:
        whole = folder / f"{learner}.safetensors"
        shards = sorted(folder.glob(f"{learner}-*-of-*.safetensors"))
        if not whole.is_file() and not shards:
            raise ValueError(f"it has no {learner}")
        self._files = [
            safe_open(path, "pt") for path in (shards if not whole.is_file() else [whole])
        ]
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


def find_checkpoint(folder: Path, path: Path | None = None) -> Path | None:
    """The whole checkpoint to go on from; None if there is none.

    The newest one, or `path`, unless the newest came of that already. Raises ValueError as
    `load_checkpoint` does.
    """
    if path is not None and not _came_of(folder, path):
        verify(path)
        return path
    damaged = []
    for _, candidate in reversed(checkpoints(folder)):
        try:
            verify(candidate)
        except ValueError as error:
            damaged.append(str(error))
            continue
        for message in damaged:
            warnings.warn(f"{message}; going on from {candidate.name}", stacklevel=2)
        return candidate
    if damaged:
        raise ValueError(
            f"no checkpoint in {folder} is whole: {'; '.join(damaged)}; "
            "delete them to begin anew or choose another output_dir"
        )
    return None


def origin(folder: Path, path: Path) -> str:
    """How the manifests of the checkpoints in a folder name one that they came of."""
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def _came_of(folder: Path, path: Path) -> bool:
    """Whether the newest checkpoint is of a run that was taken back to `path`."""
    found = checkpoints(folder)
    try:
        return bool(found) and verify(found[-1][1]).get("resumed_from") == origin(folder, path)
    except ValueError:
        return False


def _set_aside(folder: Path, step: int) -> None:
    """Rename the checkpoints after a step to which the run was taken back: nothing is lost."""
    for number, path in checkpoints(folder):
        if number > step:
            name, count = f"abandoned-{path.name}", 1
            while (folder / name).exists():
                count += 1
                name = f"abandoned-{path.name}-{count}"
            os.replace(path, folder / name)


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints that were finished, oldest first: (step, path)."""
    found = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.glob("step-*")]
    return sorted((int(match[1]), path) for match, path in found if match)


def verify(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest; ValueError names the file that is missing, or not as written."""
    manifest = load_json(path / MANIFEST)
    recorded = manifest.pop("sha256", None)
    if recorded != _digest(manifest):
        raise ValueError(f"{path / MANIFEST} is damaged: it differs from its own SHA-256")
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        size = file.stat().st_size
        if size != expected["size"]:
            raise ValueError(f"{file} is damaged: {size} bytes, not {expected['size']}")
        if _sha256(file) != expected["sha256"]:
            raise ValueError(f"{file} is damaged: its SHA-256 differs from the manifest's")
    return manifest


def _begin(folder: Path, staging: Path) -> None:
    _sweep(folder)
    staging.mkdir(parents=True)


def _write(staging: Path, learners: Mapping[str, Learner], processes: Processes) -> None:
    # All of them first: processes make some together, and a full disk must not part them.
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
    """Seal what all have written, give it its name, and point at it."""
    content = {
        **manifest,
        "step": step,
        "num_updates": {name: learner.num_updates for name, learner in learners.items()},
        "versions": _versions(),
        "files": {
            file.name: {"size": file.stat().st_size, "sha256": _sha256(file)}
            for file in sorted(staging.iterdir())
        },
    }
    # JSON has no tuples: the digest is of what will be read.
    content = json.loads(json.dumps(content))
    save_json({**content, "sha256": _digest(content)}, staging / MANIFEST)
    _sync(staging)
    final = folder / f"step-{step}"
    if final.exists():  # a damaged one, which the run went back before
        os.replace(final, folder / f".step-{step}.old.tmp")
    os.replace(staging, final)
    _sync(folder)
    with replacing(folder / "latest") as temporary:
        temporary.write_text(f"{final.name}\n", encoding="utf-8")


def _prune(folder: Path, step: int, keep: int) -> None:
    # Newer ones stay: they are damaged, and the run will replace them.
    older = [path for number, path in checkpoints(folder) if number < step]
    for old in older[: max(0, len(older) - (keep - 1))]:
        os.replace(old, folder / f".{old.name}.tmp")  # at no moment half there
    _sweep(folder)


def _sweep(folder: Path) -> None:
    """Remove what is no checkpoint any more, and what killed runs have left."""
    for left in folder.glob(".*.tmp"):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def _versions() -> dict[str, str]:
    # Not imported by name: the package's own module leads to the floors above this one.
    ours = sys.modules["latentdiff"]
    found = {library.__name__: str(library.__version__) for library in (*LIBRARIES, ours)}
    return {"python": platform.python_version(), **found}


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Put a folder's list of names on disk, without which a power cut may undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
