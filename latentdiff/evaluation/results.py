"""Results: figures with the settings that they were measured under, which decide what compares."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import latentdiff
from latentdiff.evaluation.intervals import Interval

FORMAT = 1


@dataclass(frozen=True)
class Figure:
    """A measured value with its interval of 95 %."""

    value: float
    low: float
    high: float
    of: int
    """The number of images that were counted."""
    ceiling: float | None = None
    """The value for perfect drawings, where it is known."""


@dataclass(frozen=True)
class Result:
    """What `latentdiff eval` measured."""

    settings: dict[str, Any]
    """What must be equal for figures to compare."""
    subject: dict[str, Any]
    """What was measured: the model or the folder."""
    figures: dict[str, Figure]


class Difference(NamedTuple):
    """A figure of two results, and the interval of the second less the first."""

    name: str
    first: Figure
    second: Figure
    interval: Interval


def check_result_path(path: Path | None) -> None:
    """Raise ValueError for what is there already: before minutes are measured, and lost."""
    if path is not None:
        if path.exists():
            what = "is a folder" if path.is_dir() else "is there already"
            raise ValueError(f"out={path} {what}; name a new file for the result, such as a.json")
        path.parent.mkdir(parents=True, exist_ok=True)


def write_result(result: Result, path: Path) -> None:
    """Write a result as JSON."""
    content = {"format": FORMAT, "latentdiff": latentdiff.__version__, **asdict(result)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def read_result(path: Path) -> Result:
    """Read a result. Raises ValueError for a file that is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, and {FORMAT} is read")
        figures = {name: Figure(**figure) for name, figure in content["figures"].items()}
        return Result(content["settings"], content["subject"], figures)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is no result of `latentdiff eval`: {type(error).__name__}: {error}"
        ) from error


def compare_results(first: Result, second: Result) -> list[Difference]:
    """Set figures of the same names side by side.

    Raises ValueError, naming what differs, for results under different settings.
    """
    different = differences(first.settings, second.settings, "in the one", "in the other")
    if different:
        raise ValueError(f"these figures do not compare: {'; '.join(different)}")
    return [
        Difference(name, figure, second.figures[name], _interval(figure, second.figures[name]))
        for name, figure in first.figures.items()
        if name in second.figures
    ]


def differences(
    first: Mapping[str, Any], second: Mapping[str, Any], in_first: str, in_second: str
) -> list[str]:
    """Say what differs between two settings: "steps is 50 in the one and 20 in the other"."""
    return [
        f"{name} is {_shown(first, name)} {in_first} and {_shown(second, name)} {in_second}"
        for name in dict.fromkeys((*first, *second))
        if _shown(first, name) != _shown(second, name)
    ]


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return json.dumps(settings[name], ensure_ascii=False) if name in settings else "not given"


def _interval(first: Figure, second: Figure) -> Interval:
    """The interval of a difference, from those of both sides (Newcombe 1998, method 10).

    As if both were drawn independently: for the same prompts and seeds it is too wide, if anything.
    """
    middle = second.value - first.value
    low = math.hypot(second.value - second.low, first.high - first.value)
    high = math.hypot(second.high - second.value, first.value - first.low)
    return Interval(middle - low, middle + high)
