"""Converted and compiled networks on disk: beside their model, or in the user's cache folder.

An entry is a folder, named by what its files follow from. It appears whole or not at all, and can
be deleted at any time.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE

SIZES = "sizes.json"
"""The sizes of an entry's other files, by which a copy that was cut short is known."""
COMPILED = "compiled"
MOST_BYTES = 2 * 2**30
"""The largest size of all the compiled networks of a folder, which each have weights of their own:
the oldest are deleted. Of a large network reading the weights is most of the time in any case."""
PACKAGE = Path(__file__).parents[1]


def folders(model: str | Path) -> list[Path]:
    """Where converted networks of a model are looked for, and written to the first that can be.

    That is `openvino/` in the model's folder, or `NAME.openvino/` beside a single file, and then
    the user's cache. What is part of this package or of the Hugging Face Hub's cache is not written
    into, nor is there a folder of a name on the hub.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    users = cache / "latentdiff" / "openvino"
    path = Path(model).absolute()
    if not path.exists() or any(path.is_relative_to(at) for at in (PACKAGE, HF_HUB_CACHE)):
        return [users]
    beside = path / "openvino" if path.is_dir() else path.with_name(f"{path.stem}.openvino")
    return [beside, users]


def find(folders: Sequence[Path], name: str) -> Path | None:
    """The entry of this name, in the first folder that has it whole."""
    return next((folder / name for folder in folders if _is_whole(folder / name)), None)


def store(folders: Sequence[Path], name: str, write: Callable[[Path], None]) -> Path | None:
    """Let `write` write an entry's files into a folder, and return the entry.

    It is in the first of the folders that can be written; None where there is none. Of several
    processes at once, one has its files kept.
    """
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _sweep(folder)
            with tempfile.TemporaryDirectory(prefix=".", dir=folder) as scratch:
                staged = Path(scratch) / name
                staged.mkdir()
                write(staged)
                _seal(staged)
                if (folder / name).exists() and not _is_whole(folder / name):
                    (folder / name).rename(Path(scratch) / "damaged")
                if not (folder / name).exists():
                    staged.rename(folder / name)
        except OSError:  # it cannot be written, or another process was faster
            if not _is_whole(folder / name):
                continue
        return folder / name
    return None


def make_room(folder: Path, size: int) -> bool:
    """Whether a compiled network of `size` bytes may be kept; the oldest are deleted for it."""
    entries = sorted(folder.glob(f"{COMPILED}-*"), key=lambda entry: entry.stat().st_mtime)
    used = {entry: sum(file.stat().st_size for file in entry.iterdir()) for entry in entries}
    while used and size + sum(used.values()) > MOST_BYTES >= size:
        oldest = next(iter(used))
        shutil.rmtree(oldest, ignore_errors=True)
        del used[oldest]
    return size <= MOST_BYTES


def _seal(entry: Path) -> None:
    """Write the sizes of an entry's files, and have them all on the disk."""
    files = sorted(entry.iterdir())
    sizes = {file.name: file.stat().st_size for file in files}
    (entry / SIZES).write_text(json.dumps(sizes), encoding="utf-8")
    for file in (*files, entry / SIZES):
        with file.open("rb+") as written:
            os.fsync(written.fileno())


def _is_whole(entry: Path) -> bool:
    try:
        sizes = json.loads((entry / SIZES).read_text(encoding="utf-8"))
        return all((entry / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _sweep(folder: Path) -> None:
    """Remove what processes left that were killed while they wrote, a day ago or longer."""
    for scratch in folder.glob(".*"):
        if time.time() - scratch.stat().st_mtime > 24 * 60 * 60:
            shutil.rmtree(scratch, ignore_errors=True)
