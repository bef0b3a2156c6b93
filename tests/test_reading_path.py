"""The files that architecture.md names for `pipe("a cat")` are those that it executes.

A file counts if one of its functions runs during the call, in the order of first entry. What reads
as an attribute (a property) or as part of its function (a comprehension) is no function here.
"""

import re
import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

from latentdiff.pipeline import Pipeline

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "latentdiff"
MOST_FUNCTIONS = 93
PAGE = ROOT / "docs" / "architecture.md"
# From the sentence that says how many files there are to the end of the section.
WALK = re.compile(r'`pipe\("a cat", steps=50\)` is (\d+) files.*?(?=\n## )', re.S)


def properties() -> set[CodeType]:
    """The getters of all the properties of the package's classes."""
    modules = [module for name, module in sys.modules.items() if name.startswith("latentdiff.")]
    classes = {c for module in modules for c in vars(module).values() if isinstance(c, type)}
    members = [member for c in classes for member in vars(c).values()]
    return {member.fget.__code__ for member in members if isinstance(member, property)}


@pytest.fixture(scope="module")
def functions() -> list[CodeType]:
    """The functions of latentdiff that `pipe("a cat", steps=2)` runs, in order of first call."""
    pipe = Pipeline.from_pretrained("emoji")
    attributes, called = properties(), dict[CodeType, None]()

    def record(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        part_of_another = code.co_name in ("<genexpr>", "<listcomp>", "<dictcomp>", "<setcomp>")
        if event == "call" and not part_of_another and code not in attributes:
            called[code] = None

    before = sys.getprofile()
    sys.setprofile(record)
    try:
        pipe("a cat", steps=2, seed=0, progress=False)
    finally:
        sys.setprofile(before)
    return [code for code in called if Path(code.co_filename).is_relative_to(PACKAGE)]


def test_the_reading_path_is_what_a_call_executes(functions: list[CodeType]) -> None:
    executed = list(dict.fromkeys(Path(code.co_filename) for code in functions))
    walk = WALK.search(PAGE.read_text(encoding="utf-8"))
    assert walk is not None
    links = re.findall(r"\]\((.+?\.py)\)", walk[0])
    assert [(PAGE.parent / link).resolve() for link in links] == executed
    assert int(walk[1]) == len(executed)


def test_the_reading_path_stays_short(functions: list[CodeType]) -> None:
    names = [code.co_qualname for code in functions]
    assert len(names) <= MOST_FUNCTIONS, names


def test_text_to_image_is_read_without_image_to_image(functions: list[CodeType]) -> None:
    assert not {"editing.py", "loading.py"} & {Path(code.co_filename).name for code in functions}
