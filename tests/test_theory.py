"""The pages of docs/theory: both languages say the same, and all of it is still so.

What is to be run after a change is `python docs/theory/figures.py --links`, where code has moved,
or `make theory`, where something measures differently.
"""

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
ENGLISH, CHINESE = ROOT / "docs" / "theory", ROOT / "docs" / "zh" / "theory"
NAMES = sorted(page.name for page in ENGLISH.glob("*.md"))
PAGES = [folder / name for folder in (ENGLISH, CHINESE) for name in NAMES]


@pytest.fixture(autouse=True)
def _experiments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ENGLISH))


def experiment(name: str) -> ModuleType:
    """docs/theory/<name>.py."""
    return importlib.import_module(name)


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def formulas(page: Path) -> list[str]:
    return re.findall(r"^\$\$\n(.*?)\n\$\$$", text(page), flags=re.S | re.M)


def figures(page: Path) -> list[Path]:
    return [(page.parent / name).resolve() for name in re.findall(r"!\[.*?\]\((.+?)\)", text(page))]


def identity(page: Path) -> str:
    return str(page.relative_to(ROOT / "docs"))


every_page = pytest.mark.parametrize("page", PAGES, ids=identity)


@every_page
def test_links_to_code_and_measured_numbers_are_up_to_date(page: Path) -> None:
    """Symbols and quoted lines are where the links point, numbers are what was measured."""
    numbers = experiment("figures").measured()
    refreshed = experiment("pages").refreshed(page, numbers)
    assert refreshed == text(page), "run: python docs/theory/figures.py --links"


@every_page
def test_symbols_can_be_imported(page: Path) -> None:
    found = experiment("pages").links(page)
    for path, symbol, _ in found:
        if path.startswith("latentdiff/"):
            thing = importlib.import_module(path.removesuffix(".py").replace("/", "."))
            for name in symbol.split("."):
                thing = getattr(thing, name)
    assert found or page.name == "README.md"


@every_page
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#\s]*(?:#[^)\s]*)?)\)", text(page)):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", text(path), flags=re.M)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings]
            assert anchor in slugs, target


@every_page
def test_formulas_hold_nothing_that_markdown_takes_for_its_own(page: Path) -> None:
    r"""GitHub reads Markdown first: \, loses its stroke, _ after a bracket slants what follows."""
    inline = re.findall(r"\$`(.*?)`\$", text(page))
    for formula in [*formulas(page), *inline]:
        assert not re.search(r"\\operatorname|<|\]\(", formula), formula
    for formula in formulas(page):
        assert not re.search(r"\\[^\sa-zA-Z]", formula), formula
        assert not re.search(r"(?<![a-zA-Z0-9])_|\*|^[+-] ", formula, flags=re.M), formula
    assert text(page).count("$$") == 2 * len(formulas(page))
    for before, after in re.findall(r"(.?)\$`.*?`\$(.?)", text(page)):
        assert before in ("", " ", "("), "a formula begins a word"
        assert after in ("", *" ,.;:)!?"), "a formula ends a word"
    # Outside of $$ … $$ and $`…`$ no dollar is left.
    rest = re.sub(r"^\$\$\n.*?\n\$\$$|\$`.*?`\$", "", text(page), flags=re.S | re.M)
    assert "$" not in rest


@pytest.mark.parametrize("name", NAMES)
def test_both_languages_have_the_same_formulas_links_figures_and_numbers(name: str) -> None:
    pages = experiment("pages")
    ours, theirs = ENGLISH / name, CHINESE / name
    assert formulas(ours) == formulas(theirs)
    assert figures(ours) == figures(theirs)
    assert sorted(pages.links(ours), key=str) == sorted(pages.links(theirs), key=str)
    stated = [re.findall(r"[-\d.e %]+<!--[\w.]+-->", text(page)) for page in (ours, theirs)]
    assert sorted(x.strip() for x in stated[0]) == sorted(x.strip() for x in stated[1])


@pytest.mark.parametrize("folder", [ENGLISH, CHINESE], ids=["English", "Chinese"])
def test_the_map_has_every_row_of_the_notes(folder: Path) -> None:
    rows = re.findall(r"^\| (\d+) \|(.*)$", text(folder / "README.md"), flags=re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 16))
    for number, cells in rows:
        assert len(re.findall(r"\]\(.+?\)", cells)) >= 3, f"row {number}: page, code, test"


def test_every_figure_is_shown_small_and_made_by_the_build() -> None:
    made = [
        name
        for path in ENGLISH.glob("*.py")
        for name in re.findall(r'save\(figure, out, "(\w+)"', text(path))
    ]
    shown = {path.stem for page in PAGES for path in figures(page)}
    images = {path.stem: path.stat().st_size for path in (ENGLISH / "images").iterdir()}
    assert sorted(made) == sorted(images) == sorted(shown)
    assert max(images.values()) < 60 * 1024


def test_a_moved_line_is_found_again_and_a_lost_one_is_named(tmp_path: Path) -> None:
    pages = experiment("pages")
    page = tmp_path / "page.md"
    path = ROOT / "latentdiff" / "diffusion.py"
    page.write_text(f"[`Diffusion.alphas`]({path}#L1): `1 - self.betas`, and 0.1<!--a.b--> of it\n")
    line = pages.find(path, "Diffusion.alphas", "1 - self.betas")
    expected = f"[`Diffusion.alphas`]({path}#L{line}): `1 - self.betas`, and 0.3<!--a.b--> of it\n"
    assert pages.refreshed(page, {"a.b": 0.26}) == expected
    with pytest.raises(ValueError, match=r"no experiment measures a\.b"):
        pages.refreshed(page, {})
    for symbol, code, message in (
        ("Diffusion.alphas", "1 + self.betas", "has no longer the line"),
        ("Diffusion.gammas", None, "has no Diffusion.gammas"),
    ):
        with pytest.raises(ValueError, match=message):
            pages.find(path, symbol, code)


def test_without_fresh_noise_all_samples_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What page 3 says of Algorithm 2, on fewer samples than its figure has."""
    why_noise = experiment("why_noise")
    monkeypatch.setattr(why_noise, "COUNT", 300)
    spread = {
        key: float(why_noise.sample(sampler, 300)[-1].std())
        for key, (_, sampler) in why_noise.SAMPLERS.items()
    }
    exact = float(why_noise.DATA.sample(100_000, torch.Generator().manual_seed(0)).std())
    assert spread.pop("none") < 0.01 * exact
    for key, found in spread.items():
        assert found == pytest.approx(exact, rel=0.1), key


def test_both_fits_of_maximum_likelihood_and_least_divergence_agree() -> None:
    numbers = experiment("figures").measured()
    error = numbers["ml.kl.std"] / 20_000**0.5
    assert numbers["ml.likelihood.mean"] == pytest.approx(numbers["ml.kl.mean"], abs=3 * error)
    assert numbers["ml.likelihood.std"] == pytest.approx(numbers["ml.kl.std"], abs=3 * error)
    cost = numbers["ml.least_kl"] + numbers["ml.entropy"]
    assert numbers["ml.cost"] == pytest.approx(cost, abs=0.02)


@pytest.mark.parametrize("name", ["ml_and_kl", "frechet"])
def test_quick_experiments_measure_what_the_pages_state(name: str, tmp_path: Path) -> None:
    measured = experiment("figures").measured()
    for key, value in experiment(name).draw(tmp_path).items():
        assert measured[key] == pytest.approx(value, rel=1e-3, abs=1e-6), key


@pytest.mark.exhaustive
def test_the_whole_build_measures_what_the_pages_state(tmp_path: Path) -> None:
    build = experiment("figures")
    numbers: dict[str, float] = {}
    for name in build.EXPERIMENTS:
        numbers |= experiment(name).draw(tmp_path)
    assert numbers.keys() == build.measured().keys()
    for key, value in numbers.items():
        assert build.measured()[key] == pytest.approx(value, rel=0.02, abs=1e-3), key
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {path.name for path in (ENGLISH / "images").iterdir()}
