"""The captions of a table's rows, which stay on disk and are formatted when a row is read."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, compress, groupby, pairwise
from typing import Any, overload

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentdiff.data.decode import BadSample

MAX_REPEATED = 100  # largest length that is tried for a row's list of repeated captions
WEIGHT_ERROR = 1e-3  # a longer list must come nearer to the weights by this much
FEW = 20  # captions; more have a list of `LONG_REPEATED` or more, and no length is tried
LONG_REPEATED = 1000
TAKEN = 1e-3  # share of a long list that may be taken from others for captions of less than a place

_TEXTS = (pa.types.is_string, pa.types.is_large_string)
_NAMED = re.compile(r"\{([^{}]+)\}")  # a template's {column}; its {} is the caption


@dataclass(frozen=True, kw_only=True)
class CaptionRules:
    """How the columns of a row become its captions: every text, in every template of its column.

    In a template {} is the caption, and {style} the text of the row's column `style`. The result
    repeats captions so that a uniform draw from it follows their weights. `weights` maps a column
    of captions to its weight, a number that its captions in a row share equally, or to the name of
    the column with the weight of each. Captions of a column without an entry have weight 1 each.
    The templates of a caption share its weight equally. `counted`: the weights are whole numbers,
    and are how often the result has each caption. `prompts` are the captions of every row, which
    is not read then.
    """

    columns: Sequence[str]
    templates: Mapping[str, Sequence[str]] = field(default_factory=dict)
    weights: Mapping[str, str | float] = field(default_factory=dict)
    allow_empty: bool = False
    counted: bool = False
    prompts: Sequence[str] = ()

    def __bool__(self) -> bool:
        """Whether there are captions at all: a VAE's data has none."""
        return bool(self.columns or self.prompts)

    def named(self) -> list[str]:
        """Return the columns that the rules read."""
        others = (*self.weight_columns(), *self.template_columns())
        return list(dict.fromkeys((*self.columns, *others)))

    def weight_columns(self) -> list[str]:
        """Return the columns that hold weights."""
        return [weight for weight in self.weights.values() if isinstance(weight, str)]

    def template_columns(self) -> list[str]:
        """Return the columns that templates name."""
        forms = (form for forms in self.templates.values() for form in forms)
        return list(dict.fromkeys(name for form in forms for name in _NAMED.findall(form)))

    def of(self, row: Mapping[str, Any]) -> list[str]:
        """Return the captions of a row; the list is empty for a row without one.

        Raises BadSample for impossible weights and for a template that names an empty column,
        ValueError for a value that is not text.
        """
        if self.prompts:
            return list(self.prompts)
        pairs = list(self._weighted(row))
        if not pairs and self.allow_empty:
            return [""]
        if self.counted:
            return [text for text, count in pairs for _ in range(int(count))]
        return _repeated(pairs) if self.weights else [text for text, _ in pairs]

    def _weighted(self, row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
        for name in self.columns:
            pairs = list(self._texts(name, row))
            templates = self.templates.get(name, ("{}",)) if pairs else ()
            forms = [_form(template, row) for template in templates]
            for text, weight in pairs:
                for form in forms:
                    yield text.join(form), weight / len(forms)

    def _texts(self, name: str, row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
        """Yield a row's texts in the column `name` that are not blank, each with its weight."""
        texts, weight = as_list(row.get(name)), self.weights.get(name, 1.0)
        filled = [_is_text(name, text) for text in texts]
        if isinstance(weight, str):
            weights = as_list(row.get(weight))
            if len(weights) != len(texts):
                raise BadSample("weights do not fit", f"{len(weights)} for {len(texts)} captions")
            if not all(isinstance(one, int | float) for one in compress(weights, filled)):
                raise BadSample("weights do not fit", f"{weights} must be numbers")
        else:
            shared_by = sum(filled) if name in self.weights else 1
            weights = [weight / max(1, shared_by)] * len(texts)
        yield from compress(zip(texts, weights, strict=True), filled)


class Captions(Sequence[list[str]]):
    """`captions[i]` is the list of row i's captions, see `CaptionRules`."""

    def __init__(self, rows: datasets.Dataset, rules: CaptionRules) -> None:
        """Take a table. Raises ValueError for captions that are not texts, weights not numbers."""
        self.rules = rules
        # A selection of no columns would have no rows.
        self.rows = rows if rules.prompts else rows.select_columns(rules.named())
        for name in rules.columns:
            _check(rows, name, "texts", _TEXTS)
        for name in rules.template_columns():
            _check(rows, name, "texts", _TEXTS, lists=False)
        for name in rules.weight_columns():
            _check(rows, name, "numbers", (pa.types.is_floating, pa.types.is_integer))

    def __len__(self) -> int:
        return len(self.rows) if self.rules else 0

    @overload
    def __getitem__(self, index: int) -> list[str]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[str]]: ...
    def __getitem__(self, index: int | slice) -> list[str] | list[list[str]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.rules.of({} if self.rules.prompts else self.rows[index])

    def __iter__(self) -> Iterator[list[str]]:
        if self.rules.prompts:
            yield from (self.rules.of({}) for _ in range(len(self)))
        if not self.rules.columns:
            return
        for batch in self.rows.iter(batch_size=1000):
            assert isinstance(batch, dict)
            for values in zip(*batch.values(), strict=True):
                yield self.rules.of(dict(zip(batch, values, strict=True)))

    def present(self) -> np.ndarray:
        """Tell which rows have a caption, (N,) bool; the table must not be a selection of rows.

        Raises ValueError for text that is not UTF-8, which only a broken parquet file can hold.
        """
        assert self.rows._indices is None
        present = np.zeros(len(self.rows), dtype=bool)
        for name in self.rules.columns:
            start = 0
            for chunk in self.rows.data.column(name).chunks:
                end = start + len(chunk)
                try:
                    present[start:end] |= _nonempty(chunk)
                except pa.ArrowInvalid as error:
                    raise ValueError(
                        f"the column {name!r} holds text that is not UTF-8, in one of the rows "
                        f"{start} to {end - 1}"
                    ) from error
                start = end
        return present


def counted(captions: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return the captions of a row each once, as they follow each other, and how often each comes.

    `CaptionRules` with `counted` makes the same list of them again.
    """
    runs = [(text, len(list(run))) for text, run in groupby(captions)]
    return [text for text, _ in runs], [count for _, count in runs]


def _is_text(name: str, text: object) -> bool:
    """Tell whether a caption has anything but blanks. Raises ValueError for what is no text."""
    if text is not None and not isinstance(text, str):
        raise ValueError(f"the column {name!r} must hold texts or lists of them, not {text!r}")
    return text is not None and text != "" and not text.isspace()


def _form(template: str, row: Mapping[str, Any]) -> list[str]:
    """Return what stands around and between the captions in a template, filled in for a row."""

    def value(match: re.Match[str]) -> str:
        text = row.get(match[1])
        if text is None or not isinstance(text, str) or text.isspace() or not text:
            raise BadSample("a template does not fit", f"{template!r}: {match[1]!r} is {text!r}")
        return text

    return [_NAMED.sub(value, part) for part in template.split("{}")]


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
    if len(weights) > FEW:
        return _many_counts(fractions)
    best, counts = math.inf, list[int]()
    for length in range(1, MAX_REPEATED + 1):
        tried = [max(1, round(fraction * length)) if fraction > 0 else 0 for fraction in fractions]
        pairs = zip(tried, fractions, strict=True)
        error = max((abs(n / sum(tried) - fraction) for n, fraction in pairs), default=0.0)
        if error < best - WEIGHT_ERROR:
            best, counts = error, tried
    return counts


def _many_counts(fractions: Sequence[float]) -> list[int]:
    """Share a long list out so that neighbours together have their share to one, whatever few.

    Each has the difference of two rounded sums: rounded by themselves, the fifty captions of a
    column with 1.4 each would lose 20 of their 70. Each has a place at least, so the list doubles
    until those places are hardly more than their captions' share: of 1,000, two hundred with 0.6
    each would take 75 from others.
    """
    if len(set(fractions)) == 1:
        return [1] * len(fractions)
    length = LONG_REPEATED
    while sum(1 / length - x for x in fractions if 0 < x < 1 / length) > TAKEN:
        length *= 2
    ends = [round(length * end) for end in accumulate(fractions)]
    counts = [end - start for start, end in pairwise([0, *ends])]
    return [max(1, n) if x > 0 else 0 for n, x in zip(counts, fractions, strict=True)]


def as_list(value: Any) -> list[Any]:
    """Return a cell as a list: a list as it is, None as an empty one, any other value in one."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _check(
    rows: datasets.Dataset,
    name: str,
    what: str,
    fits: Sequence[Callable[[pa.DataType], bool]],
    *,
    lists: bool = True,
) -> None:
    kind = rows.data.schema.field(name).type
    if lists and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        kind = kind.value_type
    if not any(fit(kind) for fit in (*fits, pa.types.is_null)):
        wanted = f"{what} or lists of them" if lists else what
        raise ValueError(f"the column {name!r} must hold {wanted}, not {kind}")


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
