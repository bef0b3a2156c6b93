"""report.html of a run folder: whole, offline, and safe to open."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from latentdiff.training.report import PREVIEWS, write_report


class Tags(HTMLParser):
    """All tags with their attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def run_folder(folder: Path, *, steps: int, previews: int) -> Path:
    records = [{"step": 20 * i, "loss": 1 / i, "kl": 0.1 * i} for i in range(1, steps + 1)]
    (folder / "previews").mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "config.yaml").write_text("preview_prompts: ['<script>alert(1)</script> 猫']\n")
    for i in range(previews):
        Image.new("RGB", (4, 4)).save(folder / "previews" / f"step-{i:07d}.png")
    return folder


def test_the_page_asks_for_nothing_but_itself(tmp_path: Path) -> None:
    write_report(run_folder(tmp_path / "run", steps=5, previews=3))
    page = Tags((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object")]
    sources = [attributes["src"] for tag, attributes in page.tags if "src" in attributes]
    assert len(sources) == 3
    assert all(source is not None and source.startswith("data:image/png") for source in sources)
    assert "<script>alert(1)</script> 猫" in page.text  # as text


def test_curves_and_figures_are_those_of_the_log(tmp_path: Path) -> None:
    write_report(run_folder(tmp_path / "run", steps=4, previews=0))
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "step 80" in page
    rows = re.findall("<tr>" + 4 * "<td>([^<]+)</td>" + "</tr>", page)
    assert rows == [("loss", "1", "0.25", "0.25"), ("kl", "0.1", "0.1", "0.4")]
    assert page.count("<svg") == 1


def test_of_many_previews_some_are_shown_and_always_the_newest(tmp_path: Path) -> None:
    write_report(run_folder(tmp_path / "run", steps=1, previews=40))
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    shown = re.findall(r"<figcaption>step-(\d+)</figcaption>", page)
    assert len(shown) == PREVIEWS
    assert shown == sorted(shown)
    assert shown[-1] == "0000039"


def test_a_run_that_has_not_begun_has_a_page_too(tmp_path: Path) -> None:
    write_report(tmp_path)
    assert "nothing logged yet" in (tmp_path / "report.html").read_text(encoding="utf-8")
