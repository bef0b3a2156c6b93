"""Prompts for a judge: which concepts and styles are asked for, in which words and seeds."""

import string
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np

from latentdiff.evaluation.references import References

# For the data set of `latentdiff data drawings`: each language's name of a concept and a style.
TEMPLATES: dict[str, int] = {
    "{text}, {in_style}": 300,
    "{text_zh}，{in_style_zh}": 100,
    "{text_es}, {in_style_es}": 100,
    "{text_fr}, {in_style_fr}": 100,
    "{text_de}, {in_style_de}": 100,
}


class Prompt(NamedTuple):
    """A text, and the image of the references that it describes."""

    text: str
    wanted: int
    column: str
    """The column that its template names first, which tells the language."""
    seed: int


def choose_prompts(
    references: References, templates: Mapping[str, int], *, seed: int = 0
) -> list[Prompt]:
    """Choose rows of each split at random and fill them into the templates, COUNT rows each.

    `templates` maps texts such as "{text}, {in_style} style", in which the columns of the
    references stand in braces, to counts. In a split each pair of a concept and a style is chosen
    once at most; a split with fewer pairs than all counts together shares them in proportion to
    the counts. What is chosen is a function of the references, the templates and `seed`, and so
    are the prompts' own seeds, which count up from `seed`. Raises ValueError for a template without
    columns or with one that the references have not or that holds no texts, and where no row of a
    split has all of them.
    """
    columns = {template: _columns(template, references) for template in templates}
    prompts: list[Prompt] = []
    for split in dict.fromkeys(references.splits):
        rows = _one_of_each_pair(references, split)
        order = np.random.default_rng(seed).permutation(rows).tolist()
        for template, count in _fitting(templates, len(rows)).items():
            names = columns[template]
            if count and not any(_has(references.rows[i], names) for i in rows):
                raise ValueError(
                    f"prompts: no row of split {split!r} has all of {names} for {template!r}"
                )
            chosen = [i for i in order if _has(references.rows[i], names)][:count]
            taken = set(chosen)
            order = [i for i in order if i not in taken]
            for i in chosen:
                text = template.format_map(references.rows[i])
                prompts.append(Prompt(text, i, names[0], seed + len(prompts)))
    return prompts


def _one_of_each_pair(references: References, split: str) -> list[int]:
    """The first row of each pair of a concept and a style in a split."""
    every = zip(references.concepts, references.styles, references.splits, strict=True)
    rows: dict[tuple[str, str], int] = {}
    for i, (concept, style, name) in enumerate(every):
        if name == split:
            rows.setdefault((concept, style), i)
    return list(rows.values())


def _fitting(templates: Mapping[str, int], most: int) -> dict[str, int]:
    """The counts, or in their proportions so many that they are `most` together."""
    scale = min(1, most / max(1, sum(templates.values())))
    ends = [round(scale * end) for end in accumulate(templates.values())]
    pairs = pairwise([0, *ends])
    return {name: end - start for name, (start, end) in zip(templates, pairs, strict=True)}


def _has(row: Mapping[str, Any], columns: Sequence[str]) -> bool:
    return all(row[name] for name in columns)


def _columns(template: str, references: References) -> list[str]:
    try:
        names = list(_fields(template))
    except ValueError as error:
        raise ValueError(f"prompts: {template!r} is no template: {error}") from error
    known = list(references.rows[0])
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(
            f"prompts: {template!r} must name columns of the data in braces, such as "
            f'"{{{known[0]}}}"; there are {known}'
        )
    for name in names:
        values = (row[name] for row in references.rows)
        other = next((x for x in values if not isinstance(x, str | None)), None)
        if other is not None:
            raise ValueError(
                f"prompts: {template!r} names the column {name!r}, which holds {other!r}; it must "
                "hold a text in each row, or nothing"
            )
    return names


def _fields(template: str) -> Iterator[str]:
    return (name for _, name, _, _ in string.Formatter().parse(template) if name is not None)
