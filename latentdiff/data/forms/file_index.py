"""FileIndex: random access to images that are files or members of tars."""

import unicodedata
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import datasets
import pyarrow.compute as pc

from latentdiff.data.decode import BadSample
from latentdiff.data.forms.files import (
    CAPTION,
    captions_without_image,
    images_in,
    printable,
)
from latentdiff.data.forms.form import FileRange, is_public


class FileIndex:
    """Random access to samples 0 … len(rows) - 1; the table is memory-mapped, images are files.

    `rows` has captions and other columns; its `_fingerprint` covers the images' sizes and times as
    well. `columns` are those that a configuration may name, and `faults` maps the row of each
    sample that is bad by its metadata to what is wrong with it.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        root: Path,
        *,
        tars: Sequence[str] = (),
        folder: Path | None = None,
        listed: bool = False,
    ) -> None:
        """Take rows with a `file_name` and, for `tars`, `_shard`, `_offset` and `_bytes`.

        `folder` is that of the images, None for `tars`; `listed`: metadata files list them.
        """
        self.rows, self.root, self.tars = rows, root, tars
        self.folder, self.listed = folder, listed
        self.image_columns = ["image"]
        self.columns = ["image", *filter(is_public, rows.column_names)]
        within_tars = ["_shard", "_offset", "_bytes"] if tars else []
        self._files = rows.select_columns(["file_name", *within_tars])
        self.faults: dict[int, BadSample] = {}
        if "_fault" in rows.column_names:
            noted = rows.data.column("_fault").is_valid()
            for row in pc.call_function("indices_nonzero", [noted]).to_pylist():
                self.faults[row] = BadSample(rows[row]["_fault"], rows[row]["_detail"] or "")

    def name(self, index: int) -> str:
        """Return a sample's name in messages and in bad_samples.jsonl."""
        return self._files[index]["file_name"]

    def names(self) -> Iterator[str]:
        """Yield all names, in order."""
        for chunk in self.rows.data.column("file_name").chunks:
            yield from chunk.to_pylist()

    def read(self, index: int, column: str) -> bytes:
        """Return the bytes of an image file. Raises BadSample when there is none."""
        row = self._files[index]
        if not self.tars:
            return FileRange(self.root, row["file_name"]).read()
        tar = self.tars[int(row["_shard"])]
        return FileRange(self.root, tar, row["_offset"], row["_bytes"]).read()

    def unlisted(self) -> list[str]:
        """List the files that no row uses: images without metadata, captions without an image.

        What has a caption and is no image by its name counts as an image.
        """
        if self.folder is None:
            return []
        captions = captions_without_image(self.folder, self.root)
        if not self.listed:
            return captions
        captioned = (name for name in captions if not name.endswith(CAPTION))
        composed = partial(unicodedata.normalize, "NFC")
        known = set(map(composed, self.names()))
        images = map(printable, images_in(self.folder, self.root))
        return sorted(name for name in (*images, *captioned) if composed(name) not in known)
