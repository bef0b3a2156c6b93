"""A hook of mkdocs: formulas as MathML, which browsers show without a script.

They are written as code hosts read them: $`x_0`$ in a line, and between lines of `$$`.
"""

import re

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

_FORMULA = re.compile(r"^\$\$\n(.*?)\n\$\$$|\$`(.*?)`\$", re.S | re.M)
_TOKEN = re.compile(r"FORMULA(\d+)END")
# Browsers know letters of other alphabets by their code points alone.
_LETTER = re.compile(r'<mi mathvariant="(script|double-struck)">([A-Z])</mi>')
_FUNCTION = re.compile(r"<mi>(log|cos|sin|max|min)</mi>")
_ALPHABETS = {"script": 0x1D49C, "double-struck": 0x1D538}
_EXCEPTIONS = {"script E": "ℰ", "script L": "ℒ", "double-struck R": "ℝ"}
_formulas: dict[str, list[str]] = {}
"""Those of each page, in the place of which Markdown has seen a word."""


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Take the formulas out, before Markdown reads their underscores and bars as its own."""
    found = _formulas[page.file.src_uri] = []
    if page.file.src_uri.startswith("code/"):  # code of the repository, as it is
        return markdown

    def token(match: re.Match[str]) -> str:
        display = "inline" if match[1] is None else "block"
        found.append(_mathml(match[2] if match[1] is None else match[1], display))
        return f"FORMULA{len(found) - 1}END"

    return _FORMULA.sub(token, markdown)


def _mathml(formula: str, display: str) -> str:
    """LaTeX as MathML, with what the converter leaves undone.

    Raises ValueError for a command that it does not know, which would be shown as it is written.
    """

    def letter(match: re.Match[str]) -> str:
        found = _EXCEPTIONS.get(f"{match[1]} {match[2]}")
        return f"<mi>{found or chr(_ALPHABETS[match[1]] + ord(match[2]) - ord('A'))}</mi>"

    mathml = convert(formula.replace(r"\arg", r"\mathrm{arg}\,"), display=display)
    mathml = _FUNCTION.sub(r'<mo form="prefix" lspace="0.2em" rspace="0.2em">\1</mo>', mathml)
    mathml = _LETTER.sub(letter, mathml.replace("<mi>&#x0007E;</mi>", "<mo>∼</mo>"))
    if unknown := re.search(r"\\\w+", mathml):
        raise ValueError(f"{unknown[0]} in {formula} is not known to latex2mathml")
    return mathml


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put them back."""
    found = _formulas.pop(page.file.src_uri)
    return _TOKEN.sub(lambda match: found[int(match[1])], html)
