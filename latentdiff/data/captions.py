"""The captions of a table's rows, which stay on disk and are formatted when a row is read."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, overload

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentdiff.data.decode import BadSample

MAX_REPEATED = 100  # largest length that is tried for a row's list of repeated captions
WEIGHT_ERROR = 1e-3  # a longer list must come nearer to the weights by this much


@dataclass(frozen=True, kw_only=True)
class CaptionRules:
    """How the columns of a row become its captions: every text, in every template of its column.

    The result repeats captions so that a uniform draw from it follows their weights. A caption
    without a weight has weight 1, and the templates of a caption share its weight equally.
    `weights` maps a column of captions to the column with their weights.
    """

    columns: Sequence[str]
    templates: Mapping[str, Sequence[str]] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    allow_empty: bool = False

    def named(self) -> list[str]:
        """Return the columns that the rules read."""
        return list(dict.fromkeys((*self.columns, *self.weights.values())))

    def of(self, row: Mapping[str, Any]) -> list[str]:
        """Return the captions of a row; the list is empty for a row without one.

        Raises BadSample for impossible weights, ValueError for a value that is not text.
        """
        pairs = list(self._weighted(row))
        if not pairs and self.allow_empty:
            return [""]
        return _repeated(pairs) if self.weights else [text for text, _ in pairs]

    def _weighted(self, row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
        for name in self.columns:
            texts, weights = as_list(row.get(name)), None
            if name in self.weights:
                weights = as_list(row.get(self.weights[name]))
                if len(weights) != len(texts):
                    raise BadSample(
                        "weights do not fit", f"{len(weights)} for {len(texts)} captions"
                    )
            templates = self.templates.get(name, ("{}",))
            for text, weight in zip(texts, weights or [1.0] * len(texts), strict=True):
                if text is not None and not isinstance(text, str):
                    raise ValueError(
                        f"the column {name!r} must hold texts or lists of them, not {text!r}"
                    )
                if text and not text.isspace():
                    for template in templates:
                        yield template.replace("{}", text), weight / len(templates)


class Captions(Sequence[list[str]]):
    """`captions[i]` is the list of row i's captions, see `CaptionRules`."""

    def __init__(self, rows: datasets.Dataset, rules: CaptionRules) -> None:
        """Take a table. Raises ValueError for captions that are not texts, weights not numbers."""
        self.rules = rules
        self.rows = rows.select_columns(rules.named())
        for name in rules.columns:
            _check(rows, name, "texts", (pa.types.is_string, pa.types.is_large_string))
        for name in rules.weights.values():
            _check(rows, name, "numbers", (pa.types.is_floating, pa.types.is_integer))

    def __len__(self) -> int:
        return len(self.rows) if self.rules.columns else 0

    @overload
    def __getitem__(self, index: int) -> list[str]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[str]]: ...
    def __getitem__(self, index: int | slice) -> list[str] | list[list[str]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.rules.of(self.rows[index])

    def __iter__(self) -> Iterator[list[str]]:
        if not self.rules.columns:
            return
        for batch in self.rows.iter(batch_size=1000):
            assert isinstance(batch, dict)
            for values in zip(*batch.values(), strict=True):
                yield self.rules.of(dict(zip(batch, values, strict=True)))

    def present(self) -> np.ndarray:
        """Tell which rows have a caption, (N,) bool; the table must not be a selection of rows."""
        assert self.rows._indices is None
        present = np.zeros(len(self.rows), dtype=bool)
        for name in self.rules.columns:
            start = 0
            for chunk in self.rows.data.column(name).chunks:
                present[start : start + len(chunk)] |= _nonempty(chunk)
                start += len(chunk)
        return present


def _repeated(pairs: Sequence[tuple[str, float]]) -> list[str]:
    """Repeat each text in proportion to its weight, so that a uniform draw follows the weights."""
    counts = _counts(tuple(weight for _, weight in pairs))
    return [text for (text, _), n in zip(pairs, counts, strict=True) for _ in range(n)]


@lru_cache(maxsize=1000)  # a hundred lengths are tried, and most data has few sets of weights
def _counts(weights: tuple[float, ...]) -> list[int]:
    """Return how often to repeat each item of a short list to approximate the weights."""
    total = sum(weights)
    if weights and (min(weights) < 0 or not 0 < total < math.inf):
        raise BadSample("weights do not fit", f"{list(weights)} must not be negative, nor all 0")
    fractions = [weight / total for weight in weights]
    best, counts = math.inf, list[int]()
    for length in range(1, MAX_REPEATED + 1):
        tried = [max(1, round(fraction * length)) if fraction > 0 else 0 for fraction in fractions]
        pairs = zip(tried, fractions, strict=True)
        error = max((abs(n / sum(tried) - fraction) for n, fraction in pairs), default=0.0)
        if error < best - WEIGHT_ERROR:
            best, counts = error, tried
    return counts


def as_list(value: Any) -> list[Any]:
    """Return a cell as a list: a list as it is, None as an empty one, any other value in one."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _check(
    rows: datasets.Dataset, name: str, what: str, fits: Sequence[Callable[[pa.DataType], bool]]
) -> None:
    kind = rows.data.schema.field(name).type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if not any(fit(kind) for fit in (*fits, pa.types.is_null)):
        raise ValueError(f"the column {name!r} must hold {what} or lists of them, not {kind}")


def _nonempty(chunk: pa.Array) -> np.ndarray:
    """Tell which texts are not blank, and which lists contain such a text, (N,) bool."""
    if pa.types.is_null(chunk.type):
        return np.zeros(len(chunk), dtype=bool)
    if pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type):
        nonempty = np.zeros(len(chunk), dtype=bool)
        parents = chunk.value_parent_indices().to_numpy(zero_copy_only=False)
        nonempty[parents[_nonempty(chunk.flatten())]] = True
        return nonempty
    trimmed = pc.call_function("utf8_trim_whitespace", [chunk])
    lengths = pc.call_function("binary_length", [trimmed])
    return lengths.fill_null(0).to_numpy(zero_copy_only=False) > 0
