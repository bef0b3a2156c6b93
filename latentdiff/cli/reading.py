"""Says what is read before reading takes long, from the files' names, sizes and headers alone."""

import json
import sys
from pathlib import Path

LARGE = 200_000_000  # bytes, which take a second and more
MOST_HEADER = 100_000_000
HALF = {"F16": "float16", "BF16": "bfloat16"}


def say_reading(model: str, dtype: str) -> None:
    """Print a sentence to stderr for a large model on this machine, and whether its numbers grow.

    `dtype` is what the networks compute in. Imports no torch, since that takes seconds itself.
    """
    path = Path(model)
    files = [path] if path.is_file() else sorted(path.glob("*/*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    if size < LARGE:
        return
    said = f"latentdiff: reading {model}, {size / 1e9:.1f} GB"
    kept = HALF.get(_dtype(max(files, key=lambda file: file.stat().st_size)))
    if kept is not None and dtype == "float32":
        said += (
            f"; its {kept} weights become float32, which takes twice the memory: "
            f"--dtype {kept} keeps them"
        )
    print(said, file=sys.stderr, flush=True)


def _dtype(path: Path) -> str:
    """The dtype of most tensors of a safetensors file; "" if it is none, which loading tells."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < MOST_HEADER else {}
        dtypes = [entry["dtype"] for name, entry in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""
    return max(dtypes, key=dtypes.count, default="")
