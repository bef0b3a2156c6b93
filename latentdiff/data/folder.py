"""Writes captioned images as an image folder that `datasets` reads, all of it or nothing."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, NamedTuple, TextIO

from PIL import Image

Split = Literal["train", "test"]
LARGEST_SIDE = 4096  # of images; one is 48 MiB in memory
SPLITS: tuple[Split, ...] = ("train", "test")


class Example(NamedTuple):
    """An RGB image, the split and file name to write it to, and its fields in metadata.jsonl."""

    split: Split
    file_name: str
    image: Image.Image
    metadata: Mapping[str, object]


def check_side(size: int, *, least: int = 1, name: str = "size") -> None:
    """Raise ValueError for a side of images that no memory holds, or that is no side."""
    if not least <= size <= LARGEST_SIDE:
        raise ValueError(f"{name}={size} must be from {least} to {LARGEST_SIDE}")


def check_free(out: Path) -> None:
    """Refuse an output path that is not empty: nothing that exists is overwritten.

    Raises:
        ValueError: `out` is a file, or a folder with something in it.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"out={str(out)!r} exists already: name a folder that is new or empty")


def write_image_folder(
    out: Path,
    examples: Iterable[Example],
    *,
    card: Callable[[], str],
    notice: str | None = None,
) -> None:
    """Write `<split>/<file_name>`, `<split>/metadata.jsonl` and `README.md` under `out`.

    Everything is written to a temporary folder beside `out`, which is renamed at the end, so that
    `out` is always complete and an interruption leaves nothing behind. `card` returns the text of
    README.md; it is called after all examples are written, so that it can tell their number.
    `notice`, if there is one, is the text of the file NOTICE: whose work the images are.

    Raises:
        ValueError: `out` is a file, or a folder with something in it.
    """
    check_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _write_examples(staging, examples)
        (staging / "README.md").write_text(card(), encoding="utf-8")
        if notice is not None:
            (staging / "NOTICE").write_text(notice, encoding="utf-8")
        staging.chmod(0o755)  # mkdtemp's folders are readable by their owner alone
        if out.exists():
            out.rmdir()
        staging.rename(out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _write_examples(folder: Path, examples: Iterable[Example]) -> None:
    metadata: dict[Split, TextIO] = {}
    with ExitStack() as stack:
        for split, file_name, image, fields in examples:
            if split not in metadata:  # `datasets` refuses a split that has no image
                (folder / split).mkdir()
                file = (folder / split / "metadata.jsonl").open("w", encoding="utf-8")
                metadata[split] = stack.enter_context(file)
            image.save(folder / split / file_name)
            line = json.dumps({"file_name": file_name, **fields}, ensure_ascii=False)
            metadata[split].write(line + "\n")
