"""report.html of a run folder: whole, offline, and safe to open."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import torch
from PIL import Image

from latentdiff.data.cache import LatentCache
from latentdiff.data.cache_writer import write_cache
from latentdiff.data.config import DataConfig
from latentdiff.data.dataset import CaptionedImages
from latentdiff.data.shapes import build_shapes
from latentdiff.data.summary import cache_summary, images_summary
from latentdiff.models.vae import VAE, VAEConfig
from latentdiff.training.logging.plots import plot_log
from latentdiff.training.logging.report import MAX_PREVIEWS, write_data, write_report


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


def test_memory_is_in_gibibytes(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1, "memory": 3 * 2**29}) + "\n")
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<td>memory (GiB)</td><td>1.5</td>" in page


def test_val_losses_have_a_figure_of_their_own(tmp_path: Path) -> None:
    """Also in a run that was validated once, and where there is no loss in a bin."""
    folder = run_folder(tmp_path / "run", steps=4, previews=0)
    record = {"step": 80, "val_loss": 0.25} | {f"val_loss_{i}": i / 14 for i in range(8)}
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    write_report(folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert "Validation loss" in page
    assert "<td>val_loss_7</td><td>0.5</td>" in page
    plot_log(folder / "log.jsonl", folder / "loss.png")
    with Image.open(folder / "loss.png") as image:
        assert image.width > 500


def test_data_captions_and_versions_are_there_as_text(tmp_path: Path) -> None:
    summary = {
        "data": "<b>/images</b>",
        "samples": 12345,
        "num_val": 0,
        "left_out": {"<i>truncated": 2, "no caption": 1},
        "captions_each": {"min": 1, "median": 2.0, "max": 3, "mean": 2.1},
        "captions": ["<script>alert(1)</script>", "一只猫"],
        "check": {"splits": {"train": 12345}, "extra_files": {"count": 1, "first": ["<a>.png"]}},
        "sizes": {},
    }
    write_data(tmp_path, summary)
    write_report(tmp_path)
    page = Tags((tmp_path / "report.html").read_text(encoding="utf-8"))
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "b", "i", "a"}
    for text in (
        "<b>/images</b>",
        "12,345",
        "<i>truncated: 2; no caption: 1",
        "1 to 3, median 2",
        "<script>alert(1)</script>",
        "一只猫",
        "count: 1; first: <a>.png",
        f"torch{torch.__version__.partition('+')[0]}",
    ):
        assert text in page.text
    assert "sizes" not in page.text


def test_the_summary_of_a_cache_counts_its_sizes_and_captions(tmp_path: Path) -> None:
    build_shapes(tmp_path / "data", count=20, seed=0, size=32)
    config = DataConfig(data=str(tmp_path / "data"), image_size=32)
    dataset = CaptionedImages(config)
    blocks = VAEConfig(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2)
    write_cache(tmp_path / "cache", dataset, VAE(blocks), batch_size=8)
    place = str(tmp_path / "data")
    (tmp_path / "data" / "summary.json").write_text('{"data": "shapes", "bad": 3}')
    found = cache_summary(LatentCache(tmp_path / "cache"), place, num_val=2)
    images = images_summary(dataset)
    assert "num_val" not in images
    assert images_summary(dataset, num_val=0) == {**images, "num_val": 0}
    same = ("samples", "sizes", "captions_each", "characters_each", "captions", "check")
    assert {name: found[name] for name in same} == {name: images[name] for name in same}
    assert found["samples"] == len(dataset)
    assert found["num_val"] == 2
    assert found["sizes"] == {"32x32": len(dataset)}
    assert found["check"] == {"bad": 3}
    counts = [len(texts) for texts in dataset.captions]
    assert found["captions_each"]["max"] == max(counts)
    assert found["characters_each"]["max"] == max(len(t) for ts in dataset.captions for t in ts)
    assert set(found["captions"]) <= {text for texts in dataset.captions for text in texts}
    json.dumps(found)


def test_of_many_previews_some_are_shown_and_always_the_newest(tmp_path: Path) -> None:
    write_report(run_folder(tmp_path / "run", steps=1, previews=40))
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    shown = re.findall(r"<figcaption>step-(\d+)</figcaption>", page)
    assert len(shown) == MAX_PREVIEWS
    assert shown == sorted(shown)
    assert shown[-1] == "0000039"


def test_a_run_that_has_not_begun_has_a_page_too(tmp_path: Path) -> None:
    write_report(tmp_path)
    assert "nothing logged yet" in (tmp_path / "report.html").read_text(encoding="utf-8")
