"""The pages of docs/theory, in both languages: what they link to and state, kept true.

A link to code names a symbol, and may quote a line of it:

    [`Diffusion.add_noise`](../../latentdiff/diffusion.py#L182): `_fit(alpha, x0) * x0`

A number that an experiment measured carries its name, which nobody sees: `0.25<!--bound.gap-->`.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = (ROOT / "docs" / "theory", ROOT / "docs" / "zh" / "theory")
_LINK = re.compile(
    r"\[`(?P<symbol>[\w.]+)`\]\((?P<path>[\w./-]+\.py)#L(?P<line>\d+)\)"
    r"(?:[:：] ?`(?P<code>[^`]+)`)?"
)
_NUMBER = re.compile(r"(?P<shown>-?\d[\d.]*(?:e-?\d+)?)(?P<percent> ?%)?<!--(?P<key>[\w.]+)-->")


def pages() -> list[Path]:
    """Every page of both languages."""
    return [page for folder in FOLDERS for page in sorted(folder.glob("*.md"))]


def refreshed(page: Path, numbers: dict[str, float]) -> str:
    """The page's text with the lines of its links and the numbers that it states as they are now.

    Raises ValueError for a symbol, a quoted line or a number that is not there.
    """

    def link(match: re.Match[str]) -> str:
        path = (page.parent / match["path"]).resolve()
        line = find(path, match["symbol"], match["code"])
        return match[0].replace(f"#L{match['line']})", f"#L{line})", 1)

    def number(match: re.Match[str]) -> str:
        if match["key"] not in numbers:
            raise ValueError(f"{page.name}: no experiment measures {match['key']}")
        value = numbers[match["key"]] * (100 if match["percent"] else 1)
        mantissa, _, exponent = match["shown"].partition("e")
        digits = len(mantissa.partition(".")[2])
        shown = f"{value:.{digits}e}" if exponent else f"{value:.{digits}f}"
        shown = re.sub(r"e([+-])0*(\d)", lambda e: f"e{e[1].strip('+')}{e[2]}", shown)
        return f"{shown}{match['percent'] or ''}<!--{match['key']}-->"

    return _NUMBER.sub(number, _LINK.sub(link, page.read_text(encoding="utf-8")))


def links(page: Path) -> list[tuple[str, str, str | None]]:
    """Path from the repository's root, symbol and quoted code of every link to code."""
    found = []
    for match in _LINK.finditer(page.read_text(encoding="utf-8")):
        path = (page.parent / match["path"]).resolve().relative_to(ROOT)
        found.append((str(path), match["symbol"], match["code"]))
    return found


def find(path: Path, symbol: str, code: str | None = None) -> int:
    """The line of a symbol in a file, or of the first of its lines that has the code.

    Raises ValueError, naming both, if there is none.
    """
    where = path.relative_to(ROOT)
    if symbol not in _symbols(path):
        raise ValueError(f"{where} has no {symbol}")
    first, last = _symbols(path)[symbol]
    if code is None:
        return first
    lines = path.read_text(encoding="utf-8").splitlines()
    for number in range(first, last + 1):
        if code in lines[number - 1]:
            return number
    raise ValueError(f"{symbol} in {where} has no longer the line: {code}")


@cache
def _symbols(path: Path) -> dict[str, tuple[int, int]]:
    """First and last line of every function, class and assignment of a file, by qualified name."""
    if not path.is_file():
        raise ValueError(f"{path} is no file")

    def inside(body: Sequence[ast.AST], prefix: str) -> Iterator[tuple[str, tuple[int, int]]]:
        for node in body:
            lines = (getattr(node, "lineno", 0), getattr(node, "end_lineno", 0))
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    yield prefix + name, lines
                    yield from inside(node.body, f"{prefix}{name}.")
                case ast.Assign(targets=[ast.Name(id=name)]):
                    yield prefix + name, lines
                case ast.AnnAssign(target=ast.Name(id=name)):
                    yield prefix + name, lines

    return dict(inside(ast.parse(path.read_text(encoding="utf-8")).body, ""))
