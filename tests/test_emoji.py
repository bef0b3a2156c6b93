"""Emoji: the split's law, captions, and images that are whole; on the system's font."""

import hashlib
import re
from pathlib import Path

import datasets
import emoji
import numpy as np
import pytest
from PIL import Image

from latentdiff.data.code_points import code_points
from latentdiff.data.emoji import (
    GROUPS,
    LANGUAGES,
    build_emoji,
    captions,
    group_of,
    split_of,
)
from latentdiff.data.emoji_font import EmojiFont

ALL = [s for s, d in emoji.EMOJI_DATA.items() if d["status"] == emoji.STATUS["fully_qualified"]]
BY_NAME = {emoji.EMOJI_DATA[sequence]["en"].strip(":"): sequence for sequence in ALL}


@pytest.fixture(scope="module")
def font() -> EmojiFont:
    try:
        return EmojiFont()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("woman", "plain"),
        ("rainbow_flag", "plain"),
        ("polar_bear", "plain"),  # joined, and nobody's gender
        ("Japan", "flag"),
        ("Scotland", "flag"),
        ("keycap_#", "keycap"),
        ("woman_astronaut", "gender"),
        ("man_running", "gender"),
        ("family_man_woman_girl", "gender"),
        ("woman_dark_skin_tone", "skin tone"),
        ("astronaut_light_skin_tone", "skin tone"),
        ("man_running_medium_skin_tone", "skin tone and gender"),
    ],
)
def test_group_follows_from_code_points(name: str, group: str) -> None:
    assert group_of(BY_NAME[name]) == group


def test_split_is_the_documented_hash() -> None:
    test = [sequence for sequence in ALL if split_of(sequence) == "test"]
    for sequence in ALL:
        text = "-".join(f"{ord(character):X}".zfill(4) for character in sequence)
        held_out = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100 < 5
        combination = group_of(sequence) in ("gender", "skin tone", "skin tone and gender")
        assert (sequence in test) == (held_out and combination)
    combinations = sum(group_of(sequence) not in ("plain", "flag", "keycap") for sequence in ALL)
    # Five standard deviations of a fair draw of 5 %.
    assert abs(len(test) - 0.05 * combinations) < 5 * (0.05 * 0.95 * combinations) ** 0.5


def test_split_never_changes() -> None:
    """Some of the first version's test set: who trained on version 1 may test with any other."""
    for name in ("OK_hand_medium_skin_tone", "Mrs._Claus_dark_skin_tone", "woman_bowing"):
        assert split_of(BY_NAME[name]) == "test"
    for name in ("woman_astronaut", "man_running", "thumbs_up_dark_skin_tone"):
        assert split_of(BY_NAME[name]) == "train"


def test_captions_are_words() -> None:
    def fields(name: str) -> dict[str, str | list[str]]:
        return captions(BY_NAME[name], languages=("en", "zh", "de"))

    assert fields("grinning_face_with_big_eyes") == {
        "text": "grinning face with big eyes",
        "text_zh": "哈哈",
        "text_de": "grinsendes gesicht mit großen augen",
        "aliases": ["smiley"],
    }
    assert fields("Japan") == {
        "text": "flag of Japan",
        "text_zh": "日本旗帜",
        "text_de": "flagge japan",
        "aliases": ["flag for Japan", "jp"],
    }


def test_every_emoji_has_its_own_caption_in_every_language() -> None:
    fields = [captions(sequence, languages=LANGUAGES) for sequence in ALL]
    for language in LANGUAGES:
        column = "text" if language == "en" else f"text_{language}"
        texts = [row[column] for row in fields]
        assert len(set(map(str, texts))) == len(ALL)
        assert all(re.fullmatch(r"[^\s:_]+( [^\s:_]+)*", str(text)) for text in texts)


def test_no_alias_is_another_emojis_caption() -> None:
    """The package has "cat" for the cat face too, and "turkey" for the flag of Türkiye."""
    fields = [captions(sequence, languages=("en",)) for sequence in ALL]
    names = {str(row["text"]).casefold() for row in fields}
    aliases = [alias.casefold() for row in fields for alias in row["aliases"]]
    assert len(aliases) > 800
    assert len(set(aliases)) == len(aliases)
    assert names.isdisjoint(aliases)


def test_joined_sequences_are_one_image_and_unknown_ones_are_left_out(font: EmojiFont) -> None:
    astronaut, woman, rocket = "👩🏽‍🚀", "👩🏽", "🚀"
    images = [font.draw(sequence, size=64) for sequence in (astronaut, woman, rocket)]
    assert None not in images
    assert len({image.tobytes() for image in images if image is not None}) == 3
    assert font.draw("🍕\u200d🍎", size=64) is None  # joined, but no emoji
    assert font.draw("🍕🍎", size=64) is None
    assert font.draw("\U0010fff0", size=64) is None  # for private use: no image


def test_no_image_is_blank_or_clipped(font: EmojiFont) -> None:
    for sequence in ALL[::40]:
        image = font.draw(sequence, size=128)
        if image is None:
            continue
        pixels = np.asarray(image)
        edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
        assert all((edge == 255).all() for edge in edges), sequence
        assert (pixels < 200).any(-1).mean() > 0.02, sequence


# Of every group and both splits, and in each split one with aliases: `datasets` cannot tell the
# type of a column that has empty lists alone.
FEW = [
    *(BY_NAME[name] for name in ("grinning_face", "Japan", "keycap_1", "woman_dancing")),
    *(BY_NAME[name] for name in ("man_bowing", "woman_bowing", "waving_hand_dark_skin_tone")),
    BY_NAME["man_running_medium_skin_tone"],
]


def test_built_folder_is_reproducible_and_loads_through_datasets(
    font: EmojiFont, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        counts = build_emoji(tmp_path / name, font=font.path, size=32, sequences=FEW)
    one, two = (
        {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two
    assert counts["left out"] == {}
    loaded = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "one"), cache_dir=str(tmp_path / "cache")
    )
    assert {split: sum(groups.values()) for split, groups in counts.items() if groups} == {
        split: len(rows) for split, rows in loaded.items()
    }
    rows = {row["text"]: row for split in loaded for row in loaded[split]}
    for sequence in FEW:
        expected = captions(sequence, languages=("en", "zh"))
        row = rows[str(expected["text"])]
        assert {key: row[key] for key in expected} == expected
        assert row["group"] == group_of(sequence)
        image = font.draw(sequence, size=32)
        assert image is not None
        assert row["image"].tobytes() == image.tobytes()
        name = f"{code_points(sequence).lower()}.png"
        assert (tmp_path / "one" / split_of(sequence) / name).is_file()


@pytest.mark.exhaustive
def test_default_values_render_the_whole_font(font: EmojiFont, tmp_path: Path) -> None:
    counts = build_emoji(tmp_path / "emoji")
    assert sum(sum(groups.values()) for groups in counts.values()) == len(ALL)
    # Fonts older than Unicode's newest emoji lack a few.
    assert sum(counts["left out"].values()) < 0.2 * len(ALL)
    assert set(counts["train"]) == set(GROUPS)
    image = tmp_path / "emoji" / "train" / f"{code_points('😀').lower()}.png"
    with Image.open(image) as image:
        assert (image.size, image.mode) == ((128, 128), "RGB")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"languages": ("en", "xx")}, r"languages=\['xx'\] are unknown: choose from en, es, ja"),
        ({"languages": ("zh",)}, r"languages=\['zh'\] must have en"),
        ({"size": 0}, "size=0 must"),
        ({"font": Path("nowhere.ttf")}, "nowhere.ttf.*fonts-noto-color-emoji.*--font"),
        ({"font": Path(__file__)}, "test_emoji.py.*no usable emoji font.*fonts-noto-color-emoji"),
    ],
)
def test_wrong_input_is_named(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_emoji(tmp_path / "emoji", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_machine_without_the_font_is_told_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentdiff.data.emoji_font.FONT_PATHS", ())
    with pytest.raises(ValueError, match=r"Debian package fonts-noto-color-emoji.*--font"):
        build_emoji(tmp_path / "emoji")


def test_a_font_without_colours_is_refused(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    plain = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    with pytest.raises(ValueError, match=r"DejaVuSans.ttf.*draws no colours"):
        build_emoji(tmp_path / "emoji", font=plain)
