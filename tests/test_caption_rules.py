"""Caption rules: templates that name other columns, weights of columns, and their shares."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path

import datasets
import pytest
from PIL import Image
from test_cache import write

from latentdiff.data.cache import LatentCache
from latentdiff.data.captions import LONG_REPEATED, CaptionRules, counted
from latentdiff.data.config import DataConfig
from latentdiff.data.dataset import CaptionedImages
from latentdiff.data.decode import BadSample
from latentdiff.data.samples import Sample
from latentdiff.data.stream import StreamedImages
from latentdiff.training.command_line import parse_config

ROW = {"text": "cat", "text_zh": "猫", "keywords": ["kitty", "", "puss"], "style": "3D"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def folder(path: Path, *rows: Mapping[str, object]) -> Path:
    path.mkdir()
    lines = []
    for i, row in enumerate(rows):
        Image.new("RGB", (8, 8), (i, i, i)).save(path / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", **row}, ensure_ascii=False) + "\n")
    (path / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return path


def config(data: Path, **fields: object) -> DataConfig:
    return replace(DataConfig(data=str(data), image_size=8), **fields)


def shares(captions: list[str]) -> dict[str, float]:
    return {text: count / len(captions) for text, count in Counter(captions).items()}


def test_a_template_names_other_columns_of_its_row() -> None:
    templates = {"text": ("{}", "{}, {style} style", "{style} {}"), "text_zh": ("{}，{style}",)}
    rules = CaptionRules(columns=("text", "text_zh"), templates=templates)
    assert rules.of(ROW) == ["cat", "cat, 3D style", "3D cat", "猫，3D"]
    assert rules.named() == ["text", "text_zh", "style"]


def test_braces_of_a_caption_or_a_column_are_only_text() -> None:
    rules = CaptionRules(columns=("text",), templates={"text": ("{} {style} {}",)})
    assert rules.of({"text": "{style}", "style": "{}"}) == ["{style} {} {style}"]


@pytest.mark.parametrize("style", [None, "", " ", ["3D"]])
def test_a_row_without_the_text_that_a_template_names_is_bad(style: object) -> None:
    rules = CaptionRules(columns=("text",), templates={"text": ("{}", "{style} {}")})
    with pytest.raises(BadSample, match=r"a template does not fit.*'\{style\} \{\}': 'style' is"):
        rules.of({"text": "cat", "style": style})
    assert rules.of({"text": None, "style": style}) == []


def test_a_column_shares_its_weight_among_its_captions_and_their_templates() -> None:
    """`keywords` is drawn as often with two captions as with ten; blank ones take no share."""
    rules = CaptionRules(
        columns=("text", "keywords"),
        templates={"text": ("{}", "a {}")},
        weights={"text": 3, "keywords": 1},
    )
    expected = {"cat": 3 / 8, "a cat": 3 / 8, "kitty": 1 / 8, "puss": 1 / 8}
    assert shares(rules.of(ROW)) == expected
    assert shares(rules.of({**ROW, "keywords": []})) == {"cat": 0.5, "a cat": 0.5}
    unweighted = CaptionRules(columns=("text", "keywords"), weights={"text": 3})
    assert shares(unweighted.of(ROW)) == {"cat": 0.6, "kitty": 0.2, "puss": 0.2}


@pytest.mark.parametrize("count", [21, 77, 200, 900])
def test_columns_have_their_shares_however_many_captions_they_have(count: int) -> None:
    """Two hundred keywords with 12.5 % of the weight had 18.6 % of a list of 1,000."""
    rules = CaptionRules(
        columns=("text", "keywords", "text_zh"), weights={"text": 3, "keywords": 1, "text_zh": 4}
    )
    captions = rules.of({**ROW, "keywords": [f"word {i}" for i in range(count)]})
    counts = Counter(captions)
    words = sum(n for text, n in counts.items() if text.startswith("word"))
    assert len(counts) == count + 2  # none is left out
    for found, share in ((counts["cat"], 3), (words, 1), (counts["猫"], 4)):
        assert found / len(captions) == pytest.approx(share / 8, abs=2e-3)


@pytest.mark.parametrize("weight", [1e-9, 1e-3, 100.0])
def test_a_column_of_hardly_any_weight_takes_none_of_the_others(weight: float) -> None:
    rules = CaptionRules(columns=("text", "keywords"), weights={"text": 1, "keywords": weight})
    captions = rules.of({**ROW, "keywords": [f"word {i}" for i in range(300)]})
    assert len(set(captions)) == 301
    assert captions.count("cat") / len(captions) == pytest.approx(1 / (1 + weight), abs=2e-3)


def test_counted_captions_are_the_same_list_again() -> None:
    captions = ["a", "a", "b", "a", "c", "c", "c"]
    texts, counts = counted(captions)
    assert all(one != other for one, other in pairwise(texts))
    rules = CaptionRules(columns=("captions",), weights={"captions": "counts"}, counted=True)
    assert rules.of({"captions": texts, "counts": counts}) == captions
    assert counted([]) == ([], [])


def test_indexed_and_streamed_captions_are_those_of_the_rules(tmp_path: Path) -> None:
    fields = {
        "caption_columns": ("text", "keywords"),
        "caption_templates": {"text": ("{}", "{style} {}")},
        "caption_weights": {"text": 1, "keywords": 2.0},
    }
    chosen = config(folder(tmp_path / "set", ROW, ROW), **fields)
    expected = [*chosen.caption_rules().of(ROW)]
    assert set(expected) == {"cat", "3D cat", "kitty", "puss"}
    assert list(CaptionedImages(chosen).captions) == [expected, expected]
    chunks = StreamedImages(chosen).chunks(9, lambda number: True)
    samples = chain.from_iterable(samples for _, samples in chunks)
    streamed = [sample.captions for sample in samples if isinstance(sample, Sample)]
    assert streamed == [expected, expected]
    for dataset in (CaptionedImages, StreamedImages):  # a tokenizer learns each once
        assert list(dataset(chosen).some_captions(9)) == list(dict.fromkeys(expected)) * 2


def test_an_unknown_column_of_a_template_is_named(tmp_path: Path) -> None:
    chosen = config(folder(tmp_path / "set", ROW), caption_templates={"text": ("{}, {stile}",)})
    for dataset in (CaptionedImages, StreamedImages):
        with pytest.raises(ValueError, match=r"name \{stile\}, but .* no column 'stile'.*'style'"):
            dataset(chosen)


def test_a_column_of_lists_does_not_fill_a_template(tmp_path: Path) -> None:
    chosen = config(folder(tmp_path / "set", ROW), caption_templates={"text": ("{} {keywords}",)})
    with pytest.raises(ValueError, match="the column 'keywords' must hold texts, not list"):
        CaptionedImages(chosen)


@pytest.mark.parametrize("weight", [-1, float("inf"), float("nan")])
def test_impossible_weights_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=r"caption_weights: 'text' has .*, which must be 0 or"):
        DataConfig(caption_weights={"text": weight})


def test_weights_are_read_as_numbers_or_as_columns() -> None:
    text = "{text: 3, more: how, less: 0.5}"
    columns = "[text, more, less]"
    arguments = ["--caption_columns", columns, "--caption_weights", text]
    assert parse_config(DataConfig, arguments)[0].caption_weights == {
        "text": 3,
        "more": "how",
        "less": 0.5,
    }


def test_a_latent_cache_holds_a_repeated_caption_once(tmp_path: Path) -> None:
    """Lists of a thousand, as weights may make, take 232 MB for 8,797 drawings."""
    images = CaptionedImages(
        config(
            folder(tmp_path / "set", ROW, {**ROW, "keywords": []}),
            caption_columns=("text", "text_zh", "keywords"),
            caption_templates={"keywords": [f"{{}} {i}" for i in range(15)]},
            caption_weights={"text": 3, "keywords": 1},
        )
    )
    write(tmp_path / "cache", images)
    captions = LatentCache(tmp_path / "cache").captions
    assert list(captions) == list(images.captions)
    assert [len(texts) for texts in captions] == [LONG_REPEATED, 4]
    assert [len(texts) for texts in captions.rows["captions"]] == [32, 2]
