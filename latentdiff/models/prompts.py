"""Weights in brackets, which a prompt may give its words.

Pure functions of text and tensors; the tokenizer and the tower are in `text.py`.
"""

import itertools
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from latentdiff.formats.header import short_repr

ROUND, SQUARE = 1.1, 1 / 1.1
MAX_WEIGHT = 10.0
AROUND = 20  # characters of a prompt that a message shows on either side

# An escape; a weight with the bracket that it stands before; a bracket. All the rest is text.
_MARK = re.compile(
    r"\\[()\[\]\\]"
    r"|:\s*(?P<weight>[+-]?(?:[.\d]+(?:e[+-]?\d+)?|inf(?:inity)?|nan))\s*\)"
    r"|[()\[\]]",
    re.IGNORECASE,
)
_CLOSES = {")": "(", "]": "["}


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    r"""Split a prompt at its brackets: the texts in order, each with its weight.

    The syntax is that of AUTOMATIC1111's webui (`parse_prompt_attention`): `(word)` weighs 1.1,
    `[word]` 1 / 1.1, `(word:1.3)` 1.3; weights of brackets within brackets multiply; `\(`, `\)`,
    `\[`, `\]` and `\\` are the plain characters. Neighbours of one weight are joined, so a prompt
    without weights is one text; none is empty. Its other words (`BREAK`, `AND`, `[from:to:when]`)
    are text here, and unmatched brackets, which it silently repairs, are refused.
    Raises ValueError, showing the place, for such brackets and for a weight that is not a number
    from 0 to 10. Negative weights are refused: what the opposite of a state means is nowhere
    defined, and a negative prompt is what they are used for.
    """
    # In the order of the prompt: text, the factor of a bracket that opens, None where one closes.
    events: list[str | float | None] = []
    opened: list[tuple[int, int]] = []  # of brackets not closed yet: index in events, position
    end = 0
    for mark in _MARK.finditer(prompt):
        events.append(prompt[end : mark.start()])
        end = mark.end()
        kind: str = mark[0][-1]
        if mark[0].startswith("\\"):
            events.append(kind)
        elif kind in "([":
            opened.append((len(events), mark.start()))
            events.append(ROUND if kind == "(" else SQUARE)
        else:
            if not opened or prompt[opened[-1][1]] != _CLOSES[kind]:
                raise ValueError(_unmatched(prompt, end - 1))
            index, begin = opened.pop()
            if mark["weight"] is not None:
                events[index] = _number(prompt[begin:end], mark["weight"])
            events.append(None)
    if opened:
        raise ValueError(_unmatched(prompt, opened[0][1]))
    events.append(prompt[end:])

    pieces: list[tuple[str, float]] = []
    weights = [1.0]
    for event in events:
        if event is None:
            weights.pop()
        elif not isinstance(event, str):
            weights.append(weights[-1] * event)
        elif event and weights[-1] > MAX_WEIGHT:
            raise ValueError(
                f"the brackets around {_excerpt(event, 0)} give it the weight {weights[-1]:.4g}; "
                f"it must be from 0 to {MAX_WEIGHT:g}"
            )
        elif event:
            pieces.append((event, weights[-1]))
    return [
        ("".join(text for text, _ in group), weight)
        for weight, group in itertools.groupby(pieces, key=lambda piece: piece[1])
    ]


def weigh(states: Tensor, empty: Tensor, weights: Sequence[float]) -> Tensor:
    """Move each token's state away from the empty prompt's, or towards it: (1, L, D).

    states, empty: (1, L, D) of the prompt and of the prompt "". weights: L numbers.
    empty + weight * (states - empty) for each token, as in ComfyUI (`ClipTokenWeightEncoder`).
    Weight 1 changes no bit, 0 gives the empty prompt, and no token touches another. The webui
    multiplies states and then scales the whole chunk back to its old mean, which therefore changes
    every state, and which blows up for a tower whose mean is near zero.
    """
    factors = torch.tensor(weights, dtype=states.dtype, device=states.device)[None, :, None]
    return torch.lerp(empty, states, factors)


def _number(bracket: str, given: str) -> float:
    try:
        weight = float(given)
    except ValueError:  # two points in it, say
        weight = None
    if weight is None or not 0 <= weight <= MAX_WEIGHT:  # nor is NaN
        raise ValueError(
            f"the weight {short_repr(given)} in {_excerpt(bracket, len(bracket))} must be a number "
            f"from 0 to {MAX_WEIGHT:g}; write \\( and \\) for plain brackets"
        )
    return weight


def _unmatched(prompt: str, position: int) -> str:
    bracket = prompt[position]
    return (
        f"the {bracket} at character {position + 1}, in {_excerpt(prompt, position)}, has no "
        f"bracket that matches it; write \\{bracket} for a plain one"
    )


def _excerpt(text: str, position: int) -> str:
    """The text around a position, quoted."""
    begin, end = max(0, position - AROUND), position + AROUND + 1
    return repr("…" * (begin > 0) + text[begin:end] + "…" * (end < len(text)))
