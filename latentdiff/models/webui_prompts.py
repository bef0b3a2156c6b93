"""Prompts of AUTOMATIC1111's web UI, whose brackets need not match: read as there, written as ours.

The rules are those of its modules/prompt_parser.py (`parse_prompt_attention`), version 1.10.
"""

import itertools
import re
from collections.abc import Iterable

from latentdiff.formats.header import short_repr
from latentdiff.models.prompts import MAX_WEIGHT, ROUND, SQUARE, parse_weights

Pieces = list[tuple[str, float]]

# A backslash with what it escapes; a weight with the bracket that it stands before; a bracket; the
# text between, which a colon interrupts. A number with two points is no weight, but text.
_MARK = re.compile(
    r"\\[()\[\]\\]?|:\s*(?P<weight>[+-]?(?:\d++(?:\.\d*+)?|\.\d++))\s*\)|[()\[\]]|[^\\()\[\]:]+|:"
)
_CLOSES = {")": "(", "]": "["}
_ESCAPED = re.compile(r"[()\[\]\\]")
_BREAK = re.compile(r"\bBREAK\b")
_AND = re.compile(r"\bAND\b")
_SQUARE = re.compile(r"\[([^\[\]]*)\]")
_WHEN = re.compile(r":\s*[+-]?[\d.]+\s*$")


def from_webui(prompt: str) -> tuple[str, list[str]]:
    """A prompt for `prompt_weighting` that means what this one does in the web UI; what was lost.

    The prompt stays as it is where we read it as the web UI does. Otherwise it is written anew:
    there a bracket that is never closed reaches to the end, one that was never opened is text, and
    round and square ones may overlap. Lost are weights below 0 or above 10, of which the nearest is
    taken, `BREAK`, which begins a new chunk there and is left out here, and `AND`, `[from:to:when]`
    and `[this|that]`, which are words here. Takes time linear in the prompt.
    """
    lost = [word[0] for word in (_BREAK.search(prompt), _AND.search(prompt)) if word]
    inside = (square[1] for square in _SQUARE.finditer(prompt))
    lost += [f"[{text}]" for text in inside if "|" in text or _WHEN.search(text)]
    prompt = _BREAK.sub("", prompt)
    pieces: Pieces = []
    for text, weight in webui_weights(prompt):
        nearest = min(max(weight, 0.0), MAX_WEIGHT)
        if nearest != weight:
            lost.append(f"the weight {weight:g} of {short_repr(text)} (drawn with {nearest:g})")
        pieces.append((text, nearest))
    return (prompt if _is_ours(prompt, pieces) else _written(pieces)), lost


def webui_weights(prompt: str) -> Pieces:
    """The texts of a prompt in order, each with its weight in the web UI; none is empty."""
    marks = list(_MARK.finditer(prompt))
    factors = _factors(marks)
    # Brackets of one kind are nested, so that the weight at a place is the product of two stacks.
    weights = {"(": [1.0], "[": [1.0]}
    pieces: Pieces = []
    for i, mark in enumerate(marks):
        kind = mark[0][-1]
        if mark[0] in weights:
            weights[kind].append(weights[kind][-1] * factors[i])
        elif i in factors:
            weights[_CLOSES[kind]].pop()
        elif text := mark[0].removeprefix("\\"):
            pieces.append((text, weights["("][-1] * weights["["][-1]))
    return _joined(pieces)


def _factors(marks: list[re.Match[str]]) -> dict[int, float]:
    """The factor of each bracket that weighs, by its index; also of those that close one."""
    opened: dict[str, list[int]] = {"(": [], "[": []}
    factors: dict[int, float] = {}
    for i, mark in enumerate(marks):
        kind = mark[0][-1]
        if mark[0] in opened:
            opened[kind].append(i)
            factors[i] = ROUND if kind == "(" else SQUARE
        elif kind in _CLOSES and not mark[0].startswith("\\") and opened[_CLOSES[kind]]:
            begin = opened[_CLOSES[kind]].pop()
            if mark["weight"] is not None:
                factors[begin] = float(mark["weight"])
            factors[i] = factors[begin]
    return factors


def _joined(pieces: Iterable[tuple[str, float]]) -> Pieces:
    """Neighbours of one weight, up to rounding, as one text."""
    groups = itertools.groupby(pieces, key=lambda piece: round(piece[1], 6))
    return [("".join(text for text, _ in group), weight) for weight, group in groups]


def _is_ours(prompt: str, pieces: Pieces) -> bool:
    try:
        ours = _joined(parse_weights(prompt))
    except ValueError:
        return False
    return ours == _joined(pieces)


def _written(pieces: Pieces) -> str:
    def plain(text: str) -> str:
        return _ESCAPED.sub(r"\\\g<0>", text)

    return "".join(
        plain(text) if weight == 1 else f"({plain(text)}:{weight:.6g})"
        for text, weight in _joined(pieces)
    )
