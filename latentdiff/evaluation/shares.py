"""Shares of drawings whose concept and style are right: of all, and by split and by language."""

from collections.abc import Sequence

import torch
from torch import Tensor

from latentdiff.evaluation.intervals import wilson_interval
from latentdiff.evaluation.judge import Verdicts
from latentdiff.evaluation.results import Figure


def shares(
    verdicts: Verdicts, ceiling: Verdicts, splits: Sequence[str], columns: Sequence[str]
) -> dict[str, Figure]:
    """The shares of "concept" and "style", each as a whole and of its parts.

    `splits` and `columns` have an entry for each drawing. The parts are named as in "concept,
    test", "concept, text_zh" and "concept, test, text_zh"; parts that are the whole are left out.
    `ceiling` is what the judge says of perfect drawings of the same.
    """
    parts: dict[str, Tensor] = {"": torch.ones(len(splits), dtype=torch.bool)}
    of_split = {name: _where(splits, name) for name in sorted(set(splits), reverse=True)}
    of_column = {name: _where(columns, name) for name in dict.fromkeys(columns)}
    parts |= {f", {name}": rows for name, rows in of_split.items()}
    parts |= {f", {name}": rows for name, rows in of_column.items()}
    for split, rows in of_split.items():
        for column, others in of_column.items():
            parts[f", {split}, {column}"] = rows & others
    seen: set[tuple[bool, ...]] = set()
    figures = {}
    for name, rows in parts.items():
        key = tuple(rows.tolist())
        if key in seen or not rows.any():
            continue
        seen.add(key)
        figures[f"concept{name}"] = share(verdicts.concept_right[rows], ceiling.concept_right[rows])
        figures[f"style{name}"] = share(verdicts.style_right[rows], ceiling.style_right[rows])
    return figures


def share(right: Tensor, ceiling: Tensor | None = None) -> Figure:
    """The share of drawings that are right (N,), beside that of perfect ones, if it is known."""
    count, total = int(right.sum()), len(right)
    return Figure(
        value=count / total,
        **wilson_interval(count, total)._asdict(),
        of=total,
        ceiling=None if ceiling is None else float(ceiling.float().mean()),
    )


def _where(names: Sequence[str], name: str) -> Tensor:
    return torch.tensor([other == name for other in names])
