"""The table of docs/interchange.md: what tests measured between our files and other tools'.

A test calls `measured(...)`, and `pytest --interchange-table docs/interchange.md` puts all rows
between the marks in that file; nobody writes a row by hand.
"""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

Measured = Callable[[str, str, str, str, float], None]  # the fixture `measured`
DIFFUSERS = f"diffusers {version('diffusers')}"
START, END = "<!-- table: start -->", "<!-- table: end -->"
HEAD = "| format | direction | tool | compared | largest difference |\n|---|---|---|---|---|\n"


class Row(NamedTuple):
    """A measurement: differences of several runs of the same row are merged, the largest stays."""

    format: str
    direction: str
    tool: str
    compared: str
    difference: float


def markdown(rows: list[Row]) -> str:
    """The rows as a table, sorted, one for each of (format, direction, tool, compared)."""
    largest: dict[tuple[str, str, str, str], float] = {}
    for *key, difference in rows:
        name = (key[0], key[1], key[2], key[3])
        largest[name] = max(difference, largest.get(name, 0.0))
    lines = [
        f"| {' | '.join(name)} | {'0 (bit for bit)' if d == 0 else f'{d:.1e}'} |\n"
        for name, d in sorted(largest.items())
    ]
    return HEAD + "".join(lines)


def write(rows: list[Row], path: Path) -> None:
    """Replace the table in a Markdown file that has the two marks."""
    before, rest = path.read_text(encoding="utf-8").split(START)
    _, after = rest.split(END)
    path.write_text(f"{before}{START}\n{markdown(rows)}{END}{after}", encoding="utf-8")
