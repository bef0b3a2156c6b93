"""The cases of a law: quick tests have the first of them, the others are marked exhaustive."""

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_exhaustive(cases: Iterable[Any], *, quick: int = 1) -> list[Any]:
    """Parameters for pytest, of which the first `quick` are in quick tests; a tuple is one case."""
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=[pytest.mark.exhaustive] * (number >= quick),
        )
        for number, case in enumerate(cases)
    ]
