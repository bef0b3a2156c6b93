"""The table of docs/interchange.md: what tests measured between our files and other tools'.

A test calls `measured(...)`, and `pytest --interchange_table docs/interchange.md` puts all rows
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


def merged(table: str, rows: list[Row]) -> str:
    """The table with these rows, one for each of (format, direction, tool, compared), sorted.

    Rows of what was not measured now stay as they are.
    """
    lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
    found = {tuple(line.split(" | ")[:4]): line for line in lines}
    largest: dict[tuple[str, ...], float] = {}
    for *names, difference in rows:
        key = (f"| {names[0]}", *map(str, names[1:]))
        largest[key] = max(difference, largest.get(key, 0.0))
    for key, difference in largest.items():
        shown = "0 (bit for bit)" if difference == 0 else f"{difference:.1e}"
        found[key] = f"{' | '.join(key)} | {shown} |"
    return HEAD + "".join(f"{line}\n" for _, line in sorted(found.items()))


def write(rows: list[Row], path: Path) -> None:
    """Put rows into the table of a Markdown file that has the two marks."""
    before, rest = path.read_text(encoding="utf-8").split(START)
    table, after = rest.split(END)
    path.write_text(f"{before}{START}\n{merged(table, rows)}{END}{after}", encoding="utf-8")
