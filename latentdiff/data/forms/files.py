"""Finds the files of a data set: images, captions beside them, and captions without an image.

Names are relative to the data's root, with `/`. Hidden files and folders are passed over. A linked
folder is followed if it stays inside the root; each folder is read once, so that links cannot lead
in circles.
"""

import os
import unicodedata
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from latentdiff.data.decode import SUFFIXES
from latentdiff.data.forms.form import is_inside, on_disk

CAPTION = ".txt"


def walk(folder: Path, root: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield a folder and those below it, relative to it ("" is itself), with their files' names.

    Linked folders come last, if they have not been read under their own name. One that leads out of
    `root` is passed over with a warning, since images outside are bad samples. Raises OSError for
    a folder that cannot be read.
    """
    seen, starts = set[str](), deque([""])
    while starts:
        start = starts.popleft()
        if start and not is_inside(folder / start, root):
            warnings.warn(
                f"data={str(root)!r}: the folder {str(folder / start)!r} is a link that leads out "
                "of the data and is not read; put the folder itself there",
                stacklevel=1,  # of one place, so that walking again does not repeat it
            )
            continue
        for path, folders, names in os.walk(folder / start, onerror=_raise):
            real = os.path.realpath(path)
            folders[:] = sorted(name for name in folders if name[0] != "." and real not in seen)
            if real in seen:
                continue
            seen.add(real)
            inside = os.path.relpath(path, folder).replace(os.sep, "/")
            inside = "" if inside == "." else inside
            starts += [_join(inside, n) for n in folders if os.path.islink(os.path.join(path, n))]
            yield inside, sorted(name for name in names if name[0] != ".")


def find_files(folder: Path, root: Path, wanted: Callable[[str], bool]) -> list[str]:
    """List the files below a folder whose base name is `wanted`, relative to the root, sorted."""
    above = "" if folder == root else folder.relative_to(root).as_posix()
    return sorted(
        _join(above, inside, name)
        for inside, names in walk(folder, root)
        for name in names
        if wanted(name)
    )


def images_in(folder: Path, root: Path) -> list[str]:
    """List the image files below a folder, relative to the root, sorted by name."""
    return find_files(folder, root, is_image)


def is_image(name: str) -> bool:
    """Whether a base name has an image's suffix and is not hidden."""
    return name[0] != "." and os.path.splitext(name)[1].lower() in SUFFIXES


def caption_beside(root: Path, name: str) -> Path | None:
    """Return the text file with an image's caption, or None if there is none."""
    stem = os.path.splitext(name)[0]
    paths = (root / on_disk(root, stem + suffix) for suffix in (CAPTION, CAPTION.upper()))
    return next((path for path in paths if path.is_file()), None)


def captions_of_images(folder: Path, root: Path) -> list[str]:
    """List the text files below a folder that have the stem of an image, sorted."""
    above = "" if folder == root else folder.relative_to(root).as_posix()
    found = list[str]()
    for inside, names in walk(folder, root):
        stems = {os.path.splitext(name)[0] for name in names if is_image(name)}
        found += [_join(above, inside, n) for n in names if _is_caption(n) and n[:-4] in stems]
    return sorted(map(printable, found))


def captions_without_image(folder: Path, root: Path) -> list[str]:
    """List what has a caption and is no image that can be read, else the captions, sorted.

    Of a caption that no image has, these are the other files of its stem or, if there are none, the
    caption itself.
    """
    above = "" if folder == root else folder.relative_to(root).as_posix()
    found = list[str]()
    for inside, names in walk(folder, root):
        stems = {unicodedata.normalize("NFC", os.path.splitext(n)[0]) for n in names if is_image(n)}
        lonely = dict[str, list[str]]()
        for name in names:
            stem = os.path.splitext(name)[0]
            if _is_caption(name) and unicodedata.normalize("NFC", stem) not in stems:
                lonely[stem] = []
        for name in names:
            stem = os.path.splitext(name)[0]
            if stem in lonely and not _is_caption(name):
                lonely[stem].append(name)
        for stem, others in lonely.items():
            found += [_join(above, inside, n) for n in others or [stem + CAPTION]]
    return sorted(map(printable, found))


def _is_caption(name: str) -> bool:
    return name.lower().endswith(CAPTION)


def printable(name: str) -> str:
    """Return a name with what UTF-8 cannot hold, such as a wrong byte on disk, as an escape."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def is_utf8(name: str) -> bool:
    """Whether a file's name is UTF-8 on disk: Python reads other bytes as lone surrogates."""
    return printable(name) == name


def _raise(error: OSError) -> None:
    raise error


def _join(*parts: str) -> str:
    return "/".join(filter(None, parts))
