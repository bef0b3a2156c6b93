"""Prompts for a judge: which concepts and styles are asked for, in which words and seeds."""

import itertools
import string
from collections.abc import Iterator, Mapping
from typing import NamedTuple

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
    references stand in braces, to counts. A split's rows are taken in one random order, so that no
    row is taken twice while there are others; what is chosen is a function of the references, the
    templates and `seed`, and so are the prompts' own seeds, which count up from `seed`. Raises
    ValueError for a template without columns or with one that the references have not, and where no
    row of a split has all of them.
    """
    columns = {template: _columns(template, references) for template in templates}
    prompts: list[Prompt] = []
    for split in dict.fromkeys(references.splits):
        rows = [i for i, name in enumerate(references.splits) if name == split]
        order = np.random.default_rng(seed).permutation(rows).tolist()
        remaining = itertools.cycle(order)
        for template, count in templates.items():
            able = {i for i in rows if all(references.rows[i][c] for c in columns[template])}
            if count and not able:
                raise ValueError(
                    f"prompts: no row of split {split!r} has all of {columns[template]} for "
                    f"{template!r}"
                )
            suitable = filter(able.__contains__, remaining)
            for i in itertools.islice(suitable, count):
                text = template.format_map(references.rows[i])
                prompts.append(Prompt(text, i, columns[template][0], seed + len(prompts)))
    return prompts


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
    return names


def _fields(template: str) -> Iterator[str]:
    return (name for _, name, _, _ in string.Formatter().parse(template) if name is not None)
