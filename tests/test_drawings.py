"""Drawings: what is drawn from which package, the split's law, captions, and what is refused."""

import hashlib
import json
import os
import re
import shutil
import stat
from collections import Counter
from pathlib import Path

import datasets
import pytest
import yaml
from PIL import Image
from support.drawings import COLOURS, NAMES, character, write_packages
from support.scripts import ROOT

from latentdiff.cli import main
from latentdiff.data.code_points import code_points
from latentdiff.data.config import DataConfig
from latentdiff.data.dataset import CaptionedImages
from latentdiff.data.drawings import packages
from latentdiff.data.drawings.articles import with_article
from latentdiff.data.drawings.build import build_drawings, splits_of
from latentdiff.data.drawings.names import ancestors
from latentdiff.data.drawings.sets import SETS, SIX

STYLES = [SETS[key].styles["en"].word for key in SIX]
COUNTS = {"shaded": 4, "blob": 2, "flat": 4, "bold": 2, "3D": 1, "black and white": 2}


@pytest.fixture(autouse=True)
def tarballs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tarballs"
    monkeypatch.setattr(packages, "PACKAGES", write_packages(folder))
    return folder


def rows(out: Path) -> list[dict]:
    lines = [path.read_text(encoding="utf-8") for path in sorted(out.glob("*/metadata.jsonl"))]
    return [json.loads(line) for text in lines for line in text.splitlines()]


def test_every_set_draws_the_concepts_that_it_has(tarballs: Path, tmp_path: Path) -> None:
    """By points, or by the name in another set; no flag, nothing that Microsoft's sets lack."""
    out = tmp_path / "out"
    counts = build_drawings(out, packages=tarballs, size=16)
    assert Counter(counts["train"]) + Counter(counts["test"]) == COUNTS
    written = rows(out)
    assert Counter(row["style"] for row in written) == COUNTS
    concepts = {code_points(character(points).replace("\ufe0f", "")) for points in NAMES}
    assert {row["concept"] for row in written} == concepts
    assert {row["concept"] for row in written if row["style"] == "blob"} == {"1F431", "0023-20E3"}
    for row in written:
        split = splits_of(row["concept"], [r["style"] for r in written if same(r, row)])
        assert (out / split[row["style"]] / row["file_name"]).is_file()
    assert len({row["file_name"] for row in written}) == len(written)


def same(one: dict, other: dict) -> bool:
    return one["concept"] == other["concept"]


def test_drawings_are_whole_and_lie_on_white(tarballs: Path, tmp_path: Path) -> None:
    build_drawings(tmp_path / "out", packages=tarballs, size=16)

    def drawn(name: str) -> Image.Image:
        [path] = (tmp_path / "out").glob(f"*/{name}.png")
        return Image.open(path)

    for word, key in (("shaded", "noto"), ("blob", "noto-v1"), ("flat", "twemoji")):
        image = drawn(f"1f431-{word}")
        assert (image.size, image.mode) == ((16, 16), "RGB")
        expected = Image.new("RGB", (16, 16), COLOURS[key])
        assert image.tobytes() == expected.tobytes()
    assert drawn("1f431-black-and-white").getcolors() == [(256, (0, 0, 0))]
    three = drawn("1f431-3d")  # 32 x 24 pixels of its own: centred, not stretched
    assert three.getpixel((8, 8)) == (0, 0, 128)
    assert {three.getpixel(at) for at in ((0, 0), (8, 1), (1, 8), (15, 15))} == {(255, 255, 255)}


def test_captions_are_of_the_languages_asked_for(tarballs: Path, tmp_path: Path) -> None:
    """A region's name stands before its language's; where neither has one the text is null."""
    languages = ("en", "zh", "es-MX")
    build_drawings(tmp_path / "out", packages=tarballs, languages=languages, size=4)
    found = {(row["concept"], row["style"]): row for row in rows(tmp_path / "out")}
    cat = found["1F431", "3D"]
    assert cat == {
        "file_name": "1f431-3d.png",
        **{"text": "cat face", "with_article": "a cat face", "keywords": ["kitty", "tool"]},
        **{"text_zh": "猫脸", "keywords_zh": ["猫咪"]},
        **{"text_es-MX": "cara de gato", "keywords_es-MX": ["gato"]},
        **{"style": "3D", "in_style": "3D style", "style_zh": "立体", "in_style_zh": "立体风格"},
        **{"style_es-MX": "3D", "in_style_es-MX": "estilo 3D"},
        **{"concept": "1F431", "group": "Things"},
    }
    rocket = found["1F680", "flat"]
    assert (rocket["text_es-MX"], rocket["keywords_es-MX"]) == ("nave", ["espacio"])
    keycap = found["0023-20E3", "blob"]
    assert (keycap["text"], keycap["with_article"]) == ("keycap: #", "keycap: #")
    assert (keycap["text_zh"], keycap["keywords_zh"]) == (None, [])


@pytest.mark.parametrize(
    "chain",
    [
        ["en-GB", "en-001", "en"],
        ["en-CA", "en"],
        ["es-MX", "es-419", "es"],
        ["hi-Latn", "en-IN", "en-001", "en"],
        ["nn", "no"],
        ["pt-PT", "pt"],
        ["zh-Hant-HK", "zh-Hant"],
    ],
)
def test_a_locale_has_the_ancestors_that_cldr_gives_it(chain: list[str]) -> None:
    assert list(ancestors(chain[0])) == chain


@pytest.mark.parametrize(
    ("name", "group", "expected"),
    [
        ("apple", "Food & Drink", "an apple"),
        ("unicorn", "Animals & Nature", "a unicorn"),
        ("hourglass done", "Travel & Places", "an hourglass done"),
        ("euro banknote", "Objects", "a euro banknote"),
        ("bus", "Travel & Places", "a bus"),
        ("octopus", "Animals & Nature", "an octopus"),
        ("dress", "Objects", "a dress"),
        ("scissors", "Objects", "scissors"),
        ("busts in silhouette", "People & Body", "busts in silhouette"),
        ("nest with eggs", "Animals & Nature", "a nest with eggs"),
        ("man lifting weights", "People & Body", "a man lifting weights"),
        ("women wrestling", "People & Body", "women wrestling"),
        ("bread", "Food & Drink", "bread"),
        ("one o’clock", "Travel & Places", "one o’clock"),
        ("man: red hair", "People & Body", "man: red hair"),
        ("no smoking", "Symbols", "no smoking"),
        ("red circle", "Symbols", "a red circle"),
        ("SOS button", "Symbols", "an SOS button"),
    ],
)
def test_english_names_have_the_article_that_they_take(
    name: str, group: str, expected: str
) -> None:
    assert with_article(name, group) == expected


def test_the_split_is_the_documented_hash() -> None:
    concepts = [f"{point:04X}" for point in range(0x1F300, 0x1F700)]
    held_out = 0
    for concept in concepts:
        splits = splits_of(concept, STYLES)
        for style, split in splits.items():
            digest = hashlib.sha256(f"{concept}/{style}".encode()).hexdigest()
            assert (split == "test") == (int(digest, 16) % 100 < 5)
            held_out += split == "test"
    pairs = len(concepts) * len(STYLES)
    # Five standard deviations of a fair draw of 5 %.
    assert abs(held_out - 0.05 * pairs) < 5 * (0.05 * 0.95 * pairs) ** 0.5


def test_a_held_out_concept_is_in_train_in_another_style() -> None:
    for point in range(0x1F300, 0x1F700):
        for styles in (["3D"], ["3D", "flat"]):
            assert "train" in splits_of(f"{point:04X}", styles).values()


def test_the_split_never_changes() -> None:
    """Some of the first version's test set: who trained on version 1 may test with any other."""
    held_out = [
        "1F93C-200D-2640/black and white",
        "1F358/bold",
        "1F6BD/blob",
        "1F4FC/3D",
        "1F4A4/shaded",
    ]
    for pair in held_out:
        concept, style = pair.split("/")
        assert splits_of(concept, STYLES)[style] == "test"
    assert set(splits_of("1F431", STYLES).values()) == {"train"}


def test_the_card_and_the_notice_name_every_set_and_count(tarballs: Path, tmp_path: Path) -> None:
    build_drawings(tmp_path / "out", packages=tarballs, size=4)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    notice = (tmp_path / "out" / "NOTICE").read_text(encoding="utf-8")
    assert "15 images of 4 x 4 pixels" in card
    assert "(bold, 3D, black and white) share their shapes" in card
    assert yaml.safe_load(card.split("---")[1])["language"] == ["en", "zh", "es", "fr", "de"]
    for key in SIX:
        one = SETS[key]
        for text in (one.title, one.author, one.license, one.link, packages.PACKAGES[key].name):
            assert text in notice
    assert notice.count("The licence's words") == 2


def test_the_configurations_read_it_with_equal_languages(tarballs: Path, tmp_path: Path) -> None:
    """Three names to one keyword, the style in three of four, every language a fifth."""
    build_drawings(tmp_path / "out", packages=tarballs, size=64)
    options = yaml.safe_load((ROOT / "configs/drawings/clip.yaml").read_text(encoding="utf-8"))
    names = [name for name in options if name.startswith("caption_")]
    config = DataConfig(
        data=str(tmp_path / "out"),
        image_size=64,
        exclude={"concept": (), "style": ()},  # which asks for the columns
        **{name: options[name] for name in names},
    )
    cache = yaml.safe_load((ROOT / "configs/drawings/cache.yaml").read_text(encoding="utf-8"))
    assert {name: cache[name] for name in names} == {name: options[name] for name in names}
    images = CaptionedImages(config)
    shown = list(zip(images.rows["concept"], images.rows["style"], strict=True))
    cat = shown.index(("1F431", "shaded"))
    counts = Counter(images.captions[cat])
    total = counts.total()
    assert counts["a cat face, shaded style"] / total == pytest.approx(
        0.2 * 3 / 8 * 3 / 4, abs=2e-3
    )
    for text, share in (
        ("猫脸", 0.2 * 3 / 4 / 4),
        ("渐变猫脸", 0.2 * 3 / 4 / 4),
        ("cara de gato, estilo sombreado", 0.2 * 3 / 4 / 2),
        ("chaton, style ombré", 0.2 * 1 / 4 / 2),
        ("kitty", 0.2 * 1 / 4 / 4 / 2),
    ):
        assert counts[text] / total == pytest.approx(share, abs=2e-3), text
    styled = sum(n for text, n in counts.items() if re.search("sha|渐变|sombr|ombr|schatt", text))
    assert styled / total == pytest.approx(0.75, abs=5e-3)


def test_other_sets_are_drawn_when_they_are_named(tarballs: Path, tmp_path: Path) -> None:
    """Their icons have no code points, and the names of one have no hyphens."""
    out = tmp_path / "out"
    command = ["data", "drawings", "--out", str(out), "--size=4", "--packages", str(tarballs)]
    assert main([*command, "--sets=emojione,fxemoji"]) == 0
    rows = [json.loads(line) for line in (out / "train/metadata.jsonl").read_text().splitlines()]
    shown = {(row["text"], row["in_style"]) for row in rows}
    assert shown == {
        ("cat face", "detailed style"),
        ("rocket", "detailed style"),
        ("cat face", "Firefox style"),
    }
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "in 2 styles" in card
    assert "Mozilla" in (out / "NOTICE").read_text(encoding="utf-8")
    assert "Microsoft Corporation," not in (out / "NOTICE").read_text(encoding="utf-8")


def test_a_missing_or_changed_tarball_is_named(tarballs: Path, tmp_path: Path) -> None:
    package = packages.PACKAGES["twemoji"]
    path = tarballs / package.file_name
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=r"twemoji-0.0.1.tgz is not the pinned .*sha512-.*delete"):
        build_drawings(tmp_path / "out", packages=tarballs)
    path.unlink()
    with pytest.raises(ValueError, match=r"has no iconify-json-twemoji-0.0.1.tgz.*`npm pack @ico"):
        build_drawings(tmp_path / "out", packages=tarballs)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"languages": ("en", "xx")}, r"languages=\['xx'\] are unknown: choose from de, en, es"),
        ({"languages": ("zh",)}, r"languages=\['zh'\] must have en"),
        ({"size": 0}, "size=0 must"),
        (
            {"sets": ("noto", "apple")},
            r"sets=\['noto', 'apple'\] must be some of noto, ",
        ),
        ({"sets": ()}, r"sets=\[\] must be some of noto"),
    ],
)
def test_wrong_input_is_named(tarballs: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_drawings(tmp_path / "out", packages=tarballs, **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_left_alone(tarballs: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        build_drawings(tmp_path / "out", packages=tarballs)


def fake_npm(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of the name npm, the only one there is."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", os.pathsep.join([str(folder), "/bin", "/usr/bin"]))


def test_npm_fetches_the_packages_at_their_versions(
    tarballs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f'echo "$@" > {tmp_path}/asked; cp {tarballs}/*.tgz .'
    fake_npm(tmp_path / "bin", script, monkeypatch)
    assert main(["data", "drawings", "--out", str(tmp_path / "out"), "--size", "4"]) == 0
    asked = (tmp_path / "asked").read_text().split()
    used = {*SIX, *packages.NAMES}
    wanted = [f"{one.name}@0.0.1" for key, one in packages.PACKAGES.items() if key in used]
    assert asked == ["pack", "--silent", *wanted]
    assert len(list((tmp_path / "out").glob("*/*.png"))) == 15


def test_a_machine_without_npm_is_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["data", "drawings", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"latentdiff data drawings: npm is not installed, .*@iconify-json/noto@0.0.1,.*"
        r"Debian package npm.*--packages\n",
        error,
    )


def test_what_npm_cannot_fetch_is_told_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_npm(tmp_path / "bin", "echo 'npm ERR! network down' >&2; exit 1", monkeypatch)
    with pytest.raises(ValueError, match=r"cannot fetch @icon.*\(npm ERR! network down\): check"):
        build_drawings(tmp_path / "out")


@pytest.fixture
def real_packages(monkeypatch: pytest.MonkeyPatch) -> Path | None:
    """The folder that LATENTDIFF_DRAWINGS names, or None where npm is there to fetch them."""
    monkeypatch.undo()
    named = os.getenv("LATENTDIFF_DRAWINGS")
    if named is None and shutil.which("npm") is None:
        pytest.skip("neither npm nor LATENTDIFF_DRAWINGS, a folder with the packages' tarballs")
    return None if named is None else Path(named)


@pytest.mark.exhaustive
def test_the_real_packages_have_9279_drawings(tmp_path: Path, real_packages: Path | None) -> None:
    try:
        counts = build_drawings(tmp_path / "out", packages=real_packages, size=8)
    except ValueError as error:
        if "cannot fetch" in str(error):
            pytest.skip(str(error))
        raise
    assert Counter(counts["train"]) + Counter(counts["test"]) == {
        **{"shaded": 1652, "blob": 1217, "flat": 1652},
        **{"bold": 1594, "3D": 1570, "black and white": 1594},
    }
    assert sum(counts["test"].values()) == 482
    written = rows(tmp_path / "out")
    assert len({row["concept"] for row in written}) == 1652
    for language in ("", "_zh", "_es", "_fr", "_de"):
        assert all(row[f"text{language}"] for row in written)
