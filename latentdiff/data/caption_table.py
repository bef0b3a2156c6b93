"""CaptionTable: all captions of a data set, each text once, to draw one of a row in no time.

A row's captions are a list, which may repeat a text, see `CaptionRules`. The table holds the number
of each entry, so that drawing is an index, however many captions a row has.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

CHUNK = 10_000  # texts that are tokenised at a time


class CaptionTable:
    """The distinct texts of all rows, the empty text first, and each row's captions by number."""

    def __init__(self, rows: Iterable[Sequence[str]]) -> None:
        """Take the captions of each row in turn."""
        numbers: dict[str, int] = {"": 0}
        of_row = [[numbers.setdefault(text, len(numbers)) for text in row] for row in rows]
        self.texts = list(numbers)
        """The texts by number."""
        self._lengths = np.array([len(row) for row in of_row], dtype=np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._numbers = np.fromiter(chain.from_iterable(of_row), dtype=np.int32)

    @property
    def nbytes(self) -> int:
        """The memory of the rows' numbers, in bytes."""
        return self._lengths.nbytes + self._starts.nbytes + self._numbers.nbytes

    def choose(self, rows: np.ndarray, u: Tensor) -> np.ndarray:
        """Return the number of one caption of each row, which u in [0, 1) chooses: (b,).

        rows (b,) are indices of rows that have a caption. Each u (b,) chooses what it chooses of
        the row's list: the caption at u times its length, rounded down.
        """
        position = (u.double().numpy() * self._lengths[rows]).astype(np.int64)
        return self._numbers[self._starts[rows] + position]


class CaptionTokens:
    """The token ids of a table's captions, made once: `tokens(rows, u)`."""

    def __init__(self, table: CaptionTable, tokenize: Callable[[list[str]], Tensor]) -> None:
        """`tokenize` maps b texts to ids (b, L)."""
        self.table = table
        texts = table.texts
        chunks = (texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK))
        self.ids = torch.cat([tokenize(chunk).int() for chunk in chunks])

    @property
    def nbytes(self) -> int:
        """The memory of the ids and of the rows' numbers, in bytes."""
        return self.ids.nbytes + self.table.nbytes

    def summary(self) -> str:
        """Say how much there is, and the memory that it takes."""
        return f"{len(self.ids)} captions, {self.nbytes / 2**20:.1f} MiB of the host"

    def __call__(self, rows: np.ndarray, u: Tensor, *, empty: np.ndarray | None = None) -> Tensor:
        """Return the ids (b, L) of one caption of each row, or of "" where `empty` (b,) is true."""
        numbers = self.table.choose(rows, u)
        if empty is not None:
            numbers[empty] = 0
        return self.ids[torch.from_numpy(numbers)].long()
