"""Prompts of the web UI: what its brackets mean there, whichever way they are written."""

import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentdiff.models.prompts import parse_weights
from latentdiff.models.webui_prompts import from_webui, webui_weights

# AUTOMATIC1111/stable-diffusion-webui, modules/prompt_parser.py, version 1.10.
THEIR_TOKEN = re.compile(
    r"\\\(|\\\)|\\\[|\\]|\\\\|\\|\(|\[|:\s*([+-]?[.\d]+)\s*\)|\)|]|[^\\()\[\]:]+|:"
)


def their_reading(prompt: str) -> list[tuple[str, float]]:
    """What the web UI understands, written from the rules of its parser: each bracket that closes
    multiplies all texts since the last of its kind that opened, and at the end so do the open."""
    pieces: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(kind: str, factor: float) -> None:
        start = opened[kind].pop()
        pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]

    for token in THEIR_TOKEN.finditer(prompt):
        text, weight = token[0], token[1]
        if text.startswith("\\"):
            pieces.append((text[1:], 1.0))
        elif text in opened:
            opened[text].append(len(pieces))
        elif weight is not None and opened["("]:
            multiply("(", float(weight))
        elif text == ")" and opened["("]:
            multiply("(", 1.1)
        elif text == "]" and opened["["]:
            multiply("[", 1 / 1.1)
        else:
            pieces.append((text, 1.0))
    for kind, factor in (("(", 1.1), ("[", 1 / 1.1)):
        while opened[kind]:
            multiply(kind, factor)
    return [(text, weight) for text, weight in pieces if text]


def flat(pieces: list[tuple[str, float]]) -> list[tuple[str, Any]]:
    """A weight for each letter, which is the same however the texts are joined."""
    return [(letter, pytest.approx(weight, rel=1e-4)) for text, weight in pieces for letter in text]


@given(st.text(st.sampled_from("ab 1.-:()[]\\"), max_size=30))
@settings(deadline=None, max_examples=500)
def test_every_prompt_is_read_as_there_and_written_so_that_we_read_the_same(prompt: str) -> None:
    """Brackets that do not match were refused, and the image with them."""
    try:
        theirs = their_reading(prompt)
    except ValueError:  # a weight with two points is an error there
        return
    assert flat(webui_weights(prompt)) == flat(theirs)
    ours, lost = from_webui(prompt)
    if all(0 <= weight <= 10 for _, weight in theirs):
        assert flat(parse_weights(ours)) == flat(theirs)
        assert not any(word.startswith("the weight") for word in lost)
    else:
        parse_weights(ours)
        assert any(word.startswith("the weight") for word in lost)


@pytest.mark.parametrize(
    ("prompt", "ours"),
    [
        ("masterpiece, (cat:1.2), [dog]", "masterpiece, (cat:1.2), [dog]"),  # as it was
        ("a cat :)", "a cat :\\)"),
        ("(a cat", "(a cat:1.1)"),
        ("(a [b) c]", "(a :1.1)(b:1)( c:0.909091)"),
        ("((a cat)", "(a cat:1.21)"),
        ("a\\b", "ab"),
    ],
)
def test_a_prompt_changes_only_where_we_would_refuse_or_misread_it(prompt: str, ours: str) -> None:
    assert from_webui(prompt)[0].replace("(b:1)", "b") == ours.replace("(b:1)", "b")
    assert from_webui(prompt)[1] == []


@pytest.mark.parametrize(
    ("prompt", "ours", "lost"),
    [
        ("(ugly:-1.5) cat", "(ugly:0) cat", ["the weight -1.5 of 'ugly' (drawn with 0)"]),
        ("(cat:20)", "(cat:10)", ["the weight 20 of 'cat' (drawn with 10)"]),
        ("a cat BREAK a dog", "a cat  a dog", ["BREAK"]),
        ("a cat AND a dog", "a cat AND a dog", ["AND"]),
        ("a [red:blue:0.5] car", "a [red:blue:0.5] car", ["[red:blue:0.5]"]),
        ("a [cat|dog]", "a [cat|dog]", ["[cat|dog]"]),
        ("AND1, a BREAKER, [x]", "AND1, a BREAKER, [x]", []),
    ],
)
def test_what_has_no_meaning_here_is_named(prompt: str, ours: str, lost: list[str]) -> None:
    """Words that steer the web UI were drawn as words, without a warning."""
    assert from_webui(prompt) == (ours, lost)


@pytest.mark.parametrize(
    "piece", ["(", "[a", "a)", "(a:1", ":1", ": ", "\\", " ", "9", "BREAK ", "[a|", "(a:-1)"]
)
def test_a_hostile_prompt_takes_no_longer_than_its_length(piece: str) -> None:
    start = time.perf_counter()
    from_webui("(a:" + piece * (100_000 // len(piece)))
    assert time.perf_counter() - start < 5
