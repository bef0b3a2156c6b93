"""The pages of README and docs/ as a reader takes them: links, headings, blocks and commands.

A block that cannot be run has the reason in front of it, which no reader sees:

    <!-- not run: fetches a model of 4 GB -->
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.scripts import ROOT

DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
_FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+?) -->\n\n?)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.S | re.M,
)
_PROGRAMS = r"^\S*(latentdiff|accelerate|python|torchrun|make|pytest|srun|xargs) "
_LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """What stands between two fences."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None
    """Why it is not run."""

    @property
    def where(self) -> str:
        return f"{name(self.page)}:{self.line}"


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """A page without its blocks and without code in a line."""
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "``", _FENCE.sub("", read(page)))


def links(page: Path) -> list[str]:
    """Where its relative links and images lead."""
    return _LINK.findall(_FENCE.sub("", read(page)))


def anchors(page: Path) -> set[str]:
    """The names that a code host and the site give to a page's headings."""
    found: set[str] = set()
    for title in re.findall(r"^#+ (.*)$", _FENCE.sub("", read(page)), flags=re.M):
        shown = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")
        found.add(next(s for s in (slug, *(f"{slug}-{i}" for i in range(1, 99))) if s not in found))
    return found


def blocks(page: Path) -> list[Block]:
    text = read(page)
    return [
        Block(
            page,
            text.count("\n", 0, match.start("language")) + 1,
            match["language"],
            match["text"],
            match["reason"],
        )
        for match in _FENCE.finditer(text)
    ]


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command; of a block that shows output, those after a `$`."""
    if block.language not in ("", "bash"):
        return
    text = re.sub(r"\\\n\s*", " ", block.text)
    text = re.sub(r"(^|\s)#.*$", "", text, flags=re.M)
    text = re.sub(r"\$\(\(.*?\)\)|\$\w+", "1", text)  # what the shell would put there
    if re.search(r"^\$ ", text, flags=re.M):
        text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
    elif not re.search(
        r"^\S*(latentdiff|accelerate|python|torchrun|make|pytest|srun|xargs) ", text, re.M
    ):
        return
    parts = shlex.shlex(text, posix=True, punctuation_chars=";&|<>\n")
    parts.whitespace = " \t"
    parts.commenters = ""
    parts.whitespace_split = True
    command: list[str] = []
    for part in parts:
        if set(part) <= set(";&|<>\n"):
            yield from _unwrapped(command)
            command = []
        else:
            command.append(part)
    yield from _unwrapped(command)


def _unwrapped(command: list[str]) -> Iterator[list[str]]:
    """A command without what runs it: srun, xargs, `bash -c '…'` and variables before it."""
    for i, word in enumerate(command):
        if word == "-c" and i and command[i - 1] == "bash":
            yield from _unwrapped(shlex.split(command[i + 1]))
            return
    programs = ("latentdiff", "accelerate", "torchrun", "python", "make", "pytest")
    for i, word in enumerate(command):
        if word.removeprefix(".venv/bin/") in programs:
            yield [word.removeprefix(".venv/bin/"), *command[i + 1 :]]
            return
