"""What the site makes of a page: `make docs` builds it whole, these are the laws of its parts."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import nbformat
import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from support.pages import DOCS, PAGES, links, name, read
from support.scripts import ROOT


def hook(stem: str) -> ModuleType:
    """docs/site/<stem>.py, which mkdocs imports by its path."""
    spec = importlib.util.spec_from_file_location(f"site_{stem}", DOCS / "site" / f"{stem}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_formula_is_mathml_that_browsers_know() -> None:
    formulas = hook("formulas")
    for page in PAGES:
        for match in formulas._FORMULA.finditer(read(page)):
            mathml = formulas._mathml(match[1] or match[2], "block")
            kinds = {
                element.get("mathvariant") for element in ElementTree.fromstring(mathml).iter()
            }
            assert kinds <= {None, "normal"}, f"{name(page)}: {match[0]}"
            assert "\\" not in mathml
    with pytest.raises(ValueError, match=r"\\nosuch in .* is not known"):
        formulas._mathml(r"\nosuch x", "inline")


def test_letters_of_other_alphabets_and_functions() -> None:
    mathml = hook("formulas")._mathml(r"x \sim \mathcal N, \mathbb E \log p", "inline")
    for part in ("<mi>𝒩</mi>", "<mi>𝔼</mi>", "<mo>∼</mo>", ">log</mo>"):
        assert part in mathml


def test_links_out_of_docs_lead_to_text_that_the_site_shows() -> None:
    code = hook("code")
    shown = set()
    for page in PAGES:
        if not page.is_relative_to(DOCS):
            continue
        for link in links(page):
            target = link.partition("#")[0]
            outside = target and not (page.parent / target).resolve().is_relative_to(DOCS)
            path = code._code(page.relative_to(DOCS).as_posix(), target)
            if outside or target.endswith(".py"):
                assert path is not None, f"{name(page)}: {link}"
                shown.add(path)
            else:
                assert path is None
    assert len(shown) > 30
    for path in shown:
        assert "``````" not in read(ROOT / path)


def test_the_site_has_no_broken_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning ends a strict build. The notebooks are not run here; `make docs` runs them."""
    monkeypatch.setattr("nbclient.NotebookClient.execute", lambda client: None)
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"))
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    assert (tmp_path / "site" / "code" / "latentdiff" / "pipeline.py.html").is_file()


def test_nothing_is_fetched_from_outside() -> None:
    """mkdocs-material's fonts, and its script for a search on a disk, would be."""
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert "http" not in re.sub(r"#.*", "", site)
    assert "font: false" in site
    assert "polyfills: [site/iframe-worker.js]" in site
    assert "http" not in "".join(read(path) for path in (DOCS / "site").glob("*.[jc]s*"))


def test_a_notebooks_page_has_its_code_and_what_it_shows() -> None:
    notebook = nbformat.v4.new_notebook()
    shown = nbformat.v4.new_output("display_data", {"image/png": "aGk=\n", "text/plain": "image"})
    outputs = [
        nbformat.v4.new_output("stream", name="stdout", text="two\n"),
        nbformat.v4.new_output("stream", name="stderr", text="100 %"),
        shown,
        nbformat.v4.new_output("execute_result", {"text/plain": "2"}, execution_count=1),
    ]
    notebook.cells = [
        nbformat.v4.new_markdown_cell("# Title"),
        nbformat.v4.new_code_cell("1 + 1", outputs=outputs),
    ]
    page = hook("notebooks")._markdown(notebook, "one.ipynb")
    assert page.startswith("# Title\n\n```python\n1 + 1\n```\n\n```text\ntwo\n```\n\n![")
    assert "(data:image/png;base64,aGk=)" in page
    assert "```text\n2\n```" in page
    assert "100 %" not in page
