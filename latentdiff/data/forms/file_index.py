"""Random access to images that are files or members of tars, by a table of their captions."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import pyarrow.compute as pc

from latentdiff.data.decode import BadSample
from latentdiff.data.forms.form import FileRange, is_public
from latentdiff.data.forms.metadata import images_in


class FileIndex:
    """Samples 0 … len(rows) - 1: a memory-mapped table, and images read one at a time.

    `rows` has captions and other columns, and its `_fingerprint` is of the images as well;
    `columns` are those that a configuration may name, and `faults` the samples that are bad
    without a look at their images.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        root: Path,
        *,
        tars: Sequence[str] = (),
        described: Path | None = None,
    ) -> None:
        """Rows have a `file_name` and, within `tars`, `_shard`, `_offset` and `_bytes`.

        `described` is a folder whose images metadata describes.
        """
        self.rows, self.root, self.tars, self.described = rows, root, tars, described
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
        """What a sample is called in messages and in bad_samples.jsonl."""
        return self._files[index]["file_name"]

    def names(self) -> Iterator[str]:
        """All names, in order."""
        for chunk in self.rows.data.column("file_name").chunks:
            yield from chunk.to_pylist()

    def read(self, index: int, column: str) -> bytes:
        """The file of an image. Raises BadSample when there is none."""
        row = self._files[index]
        if not self.tars:
            return FileRange(self.root, row["file_name"]).read()
        tar = self.tars[int(row["_shard"])]
        return FileRange(self.root, tar, row["_offset"], row["_bytes"]).read()

    def unlisted(self) -> list[str]:
        """Image files that no row names."""
        if self.described is None:
            return []
        return sorted(set(images_in(self.described, self.root)) - set(self.names()))
