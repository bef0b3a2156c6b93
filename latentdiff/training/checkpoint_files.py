"""The checkpoint folders of a run: which are there and intact, and which a run goes on from.

A checkpoint is a folder `step-N`; its `manifest.json` has every file's size and SHA-256.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latentdiff.formats.weights import load_json

MANIFEST = "manifest.json"


def find_checkpoint(folder: Path, path: Path | None = None) -> Path | None:
    """The intact checkpoint to go on from; None if there is none.

    It is `path`, if given, unless the newest checkpoint was resumed from that already; else the
    newest. Raises ValueError as `load_checkpoint` does.
    """
    if path is not None and not _resumed_from(folder, path):
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
            f"no checkpoint in {folder} is intact: {'; '.join(damaged)}; "
            "delete them to begin anew or choose another output_dir"
        )
    return None


@contextmanager
def saying_what_is_kept(folder: Path) -> Iterator[None]:
    """Gives a KeyboardInterrupt a sentence: which checkpoint of the folder is kept, if any is."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        saved = checkpoints(folder)
        raise KeyboardInterrupt(
            f"interrupted; the same command goes on from step {saved[-1][0]}, which is saved"
            if saved
            else "interrupted; nothing was saved, and the same command begins again"
        ) from interrupt


def origin(folder: Path, path: Path) -> str:
    """A checkpoint's path as `resumed_from` has it in manifests: relative to their folder."""
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def _resumed_from(folder: Path, path: Path) -> bool:
    """Whether the newest checkpoint is of a run that was resumed from `path`."""
    saved = checkpoints(folder)
    try:
        return bool(saved) and verify(saved[-1][1]).get("resumed_from") == origin(folder, path)
    except ValueError:
        return False


def set_aside(folder: Path, step: int) -> None:
    """Rename the checkpoints after a step that the run goes back to; none is deleted."""
    for number, path in checkpoints(folder):
        if number > step:
            name, count = f"abandoned-{path.name}", 1
            while (folder / name).exists():
                count += 1
                name = f"abandoned-{path.name}-{count}"
            os.replace(path, folder / name)


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """The finished checkpoints, oldest first: (step, path)."""
    matches = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in folder.glob("step-*")]
    return sorted((int(match[1]), path) for match, path in matches if match)


def verify(path: Path) -> dict[str, Any]:
    """The manifest of an intact checkpoint; ValueError names a file that is missing or damaged."""
    manifest = load_json(path / MANIFEST)
    recorded = manifest.pop("sha256", None)
    if recorded != digest(manifest):
        raise ValueError(f"{path / MANIFEST} is damaged: it differs from its own SHA-256")
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise ValueError(f"{file} is missing")
        size = file.stat().st_size
        if size != expected["size"]:
            raise ValueError(f"{file} is damaged: {size} bytes, not {expected['size']}")
        if file_digest(file) != expected["sha256"]:
            raise ValueError(f"{file} is damaged: its SHA-256 differs from the manifest's")
    return manifest


def prune(folder: Path, step: int, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints up to a step."""
    # Newer ones stay: they are damaged, and the run will replace them.
    older = [path for number, path in checkpoints(folder) if number < step]
    for old in older[: max(0, len(older) - (keep - 1))]:
        os.replace(old, folder / f".{old.name}.tmp")  # never visible half deleted
    sweep(folder)


def sweep(folder: Path) -> None:
    """Delete what `prune` renamed, and what killed runs left half written."""
    for leftover in folder.glob(".*.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk; without it a power cut may undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
