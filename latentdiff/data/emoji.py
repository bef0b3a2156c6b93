"""The emoji data set: every image of a colour emoji font, captioned by its Unicode names."""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

import emoji
from tqdm import tqdm

from latentdiff.data.code_points import (
    REGIONAL_INDICATORS,
    SKIN_TONES,
    TAGS,
    TEST_PERCENT,
    code_points,
    held_out,
)
from latentdiff.data.emoji_font import CANVAS, FONT_SIZE, EmojiFont
from latentdiff.data.folder import (
    SPLITS,
    Example,
    Split,
    check_free,
    check_side,
    write_image_folder,
)

Group = Literal["plain", "flag", "keycap", "gender", "skin tone", "skin tone and gender"]
GROUPS: tuple[Group, ...] = get_args(Group)

LANGUAGES: tuple[str, ...] = tuple(emoji.LANGUAGES)

_KEYCAP = 0x20E3
_JOINER = 0x200D
_GENDERED = {0x1F468, 0x1F469, 0x2640, 0x2642}  # man, woman, female sign, male sign

# The package names a flag by its country alone in these two languages ("Japan"), and says the
# word for flag in the twelve others.
_FLAG_CAPTION = {"en": "flag of {}", "zh": "{}旗帜"}


def group_of(sequence: str) -> Group:
    """Return the group of an emoji, from its code points alone.

    flag: two regional indicators (countries), or tags (England, Scotland, Wales); rainbow and
    pirate flags are plain. keycap: with U+20E3. skin tone: with one or more of U+1F3FB to
    U+1F3FF. gender: joined (U+200D) and with a man, a woman, a male or a female sign: "woman
    astronaut", "man running", "family: man, woman, girl". plain: all others, "woman" among them.
    """
    points = {ord(character) for character in sequence}
    if points.intersection(REGIONAL_INDICATORS) or points.intersection(TAGS):
        return "flag"
    if _KEYCAP in points:
        return "keycap"
    gender = _JOINER in points and not points.isdisjoint(_GENDERED)
    if points.intersection(SKIN_TONES):
        return "skin tone and gender" if gender else "skin tone"
    return "gender" if gender else "plain"


def split_of(sequence: str) -> Split:
    """Return the split of an emoji: a fixed function of its code points, whatever the font.

    Plain emoji, flags and keycaps are `train`. Of the others, with the code points written as
    "1F469-200D-1F680" (upper case, at least four digits), `test` has those for which the SHA-256
    of that text, read as a whole number, leaves less than 5 when divided by 100.
    """
    if group_of(sequence) in ("plain", "flag", "keycap"):
        return "train"
    return "test" if held_out(code_points(sequence)) else "train"


def captions(sequence: str, *, languages: Sequence[str]) -> dict[str, str | list[str]]:
    """Return the metadata fields `text` (English), `text_XX` (others of `languages`), `aliases`.

    A name of the package `emoji` becomes words: ":grinning_face_with_big_eyes:" is "grinning face
    with big eyes". Flags get the word for flag where the name lacks it. `aliases` are English;
    those that name an emoji by themselves are left out ("cat", alias of "cat face"; "turkey",
    alias of "flag of Türkiye").
    """
    emoji.config.load_language(list(languages))
    fields: dict[str, str | list[str]] = {}
    for language in languages:
        fields["text" if language == "en" else f"text_{language}"] = _name(sequence, language)
    aliases = [_words(alias) for alias in emoji.EMOJI_DATA[sequence].get("alias", [])]
    fields["aliases"] = [alias for alias in aliases if alias.casefold() not in _english_names()]
    return fields


def build_emoji(
    out: Path,
    *,
    font: Path | None = None,
    languages: Sequence[str] = ("en", "zh"),
    size: int = 128,
    sequences: Sequence[str] | None = None,
) -> dict[str, dict[str, int]]:
    """Render the emoji of a font into the image folder `out`, with captions.

    `out` has `train/` and `test/` (see `split_of`), each with PNGs (`size` x `size`, on white)
    and `metadata.jsonl`, whose lines have `file_name`, `text`, one `text_XX` for each further
    language, `aliases` (further English captions) and `group` (see `group_of`). `font` is a
    path; None looks for the system's Noto Color Emoji. `languages` are names of the package
    `emoji` (`LANGUAGES`). `sequences` are the emoji to draw; None
    is all that Unicode calls fully qualified.

    Returns:
        For "train", "test" and "left out" (what the font cannot draw): how many of each group.

    Raises:
        ValueError: an unknown language, or languages without English; a size not from 1 to 4,096; a
            font that is not there or not usable (see `EmojiFont`); an `out` with something in it.
    """
    unknown = sorted(set(languages) - set(LANGUAGES))
    if unknown:
        raise ValueError(f"languages={unknown} are unknown: choose from {', '.join(LANGUAGES)}")
    if "en" not in languages:
        raise ValueError(f"languages={list(languages)} must have en: it is the column `text`")
    check_side(size)
    check_free(out)
    emoji_font = EmojiFont(font)
    if sequences is None:
        sequences = _fully_qualified()
    counts = {name: Counter[str]() for name in (*SPLITS, "left out")}

    def examples() -> Iterator[Example]:
        for sequence in tqdm(sequences, desc="emoji", unit="image"):
            group, split = group_of(sequence), split_of(sequence)
            image = emoji_font.draw(sequence, size=size)
            if image is None:
                counts["left out"][group] += 1
                continue
            counts[split][group] += 1
            metadata = {**captions(sequence, languages=languages), "group": group}
            yield Example(split, f"{code_points(sequence).lower()}.png", image, metadata)

    write_image_folder(
        out, examples(), card=lambda: _card(emoji_font, languages, size=size, counts=counts)
    )
    return {name: dict(counter) for name, counter in counts.items()}


def _fully_qualified() -> list[str]:
    wanted = emoji.STATUS["fully_qualified"]
    return [sequence for sequence, data in emoji.EMOJI_DATA.items() if data["status"] == wanted]


@cache
def _english_names() -> frozenset[str]:
    return frozenset(_name(sequence, "en").casefold() for sequence in _fully_qualified())


def _name(sequence: str, language: str) -> str:
    words = _words(emoji.EMOJI_DATA[sequence][language])
    if language in _FLAG_CAPTION and group_of(sequence) == "flag":
        return _FLAG_CAPTION[language].format(words)
    return words


def _words(name: str) -> str:
    return name.strip(":").replace("_", " ").strip()


def _card(
    font: EmojiFont, languages: Sequence[str], *, size: int, counts: dict[str, Counter[str]]
) -> str:
    columns = (*SPLITS, "left out")
    rows = [
        f"| {name} | " + " | ".join(str(counts[column][name]) for column in columns) + " |"
        for name in GROUPS
    ]
    totals = " | ".join(str(counts[column].total()) for column in columns)
    table = "\n".join([f"| group | {' | '.join(columns)} |", "|---|---:|---:|---:|", *rows])
    return f"""---
license: ofl-1.1
task_categories: [text-to-image]
language: [{", ".join(languages)}]
---
# Emoji with captions

{counts["train"].total() + counts["test"].total()} images of {size} x {size} pixels on white, \
made by `latentdiff data emoji`:

```python
datasets.load_dataset("imagefolder", data_dir="this folder")
```

## Source
- Images: {font.describe()}. Noto Color Emoji is under the SIL Open Font License 1.1, which \
leaves images drawn with it free.
- Captions: the package `emoji` {version("emoji")} (names from Unicode CLDR), in \
{", ".join(languages)}.
- Drawn with Pillow {version("pillow")} at {FONT_SIZE} pixels, centred on a white square of \
{CANVAS} pixels, scaled to {size} (Lanczos).

## Columns
`image`, `text` (English), `text_XX` (language XX), `aliases` (further English captions; \
none that is the name of another emoji), `group`. The file name is the emoji's code points.

## Groups and splits
{table}
| all | {totals} |

- flag: two regional indicators, or tags. keycap: with U+20E3. skin tone: with one or more of \
U+1F3FB to U+1F3FF. gender: joined by U+200D, and with a man, a woman, a male or a female sign. \
plain: all others. For training without skin tones, keep the groups other than `skin tone` and \
`skin tone and gender`.
- Every plain emoji, flag and keycap is in `train`. Of the other groups {TEST_PERCENT} % are \
`test`: those for which the SHA-256 of the code points written as "1F469-1F3FD-200D-1F680", read \
as a whole number, leaves less than {TEST_PERCENT} when divided by 100.
- Left out: what the font cannot draw as one glyph, being older than the emoji; and all that \
Unicode does not call fully qualified.
- A font may draw several emoji alike (flags of territories, some families): the same image \
then occurs more than once, each time with its own caption.
"""
