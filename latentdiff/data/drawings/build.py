"""Builds the drawings: an image folder of every concept in every set that has it, with captions."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from latentdiff.data.code_points import code_points, held_out
from latentdiff.data.drawings.articles import with_article
from latentdiff.data.drawings.card import card, notice
from latentdiff.data.drawings.icons import read_concepts, read_drawings
from latentdiff.data.drawings.names import Name, ancestors, locales, read_names
from latentdiff.data.drawings.packages import NAMES, tarballs
from latentdiff.data.drawings.sets import SETS, SIX
from latentdiff.data.folder import (
    SPLITS,
    Example,
    Split,
    check_free,
    check_side,
    write_image_folder,
)


def splits_of(concept: str, styles: Sequence[str]) -> dict[str, Split]:
    """Return the split of a concept in each of the styles that it is drawn in.

    `concept` is its code points and `styles` are English words. `test` has the pairs for which the
    SHA-256 of "1F431/3D", read as a whole number, leaves less than 5 when divided by 100; but a
    concept that would be left in no style of `train` is `train` in all. So a concept of `test` is
    known from other styles, and what is tested is to compose the two.
    """
    splits: dict[str, Split] = {
        style: "test" if held_out(f"{concept}/{style}") else "train" for style in styles
    }
    return splits if "train" in splits.values() else dict.fromkeys(styles, "train")


def build_drawings(
    out: Path,
    *,
    packages: Path | None = None,
    languages: Sequence[str] = ("en", "zh", "es", "fr", "de"),
    size: int = 128,
    sets: Sequence[str] = SIX,
) -> dict[str, dict[str, int]]:
    """Draw sets of `SETS` into the image folder `out`, with captions in each language.

    `out` has `train/` and `test/` (see `splits_of`), each with PNGs (`size` x `size`, on white)
    and `metadata.jsonl`, whose columns README.md in `out` explains; NOTICE there names the authors
    and licences. `packages` is a folder with the tarballs of `PACKAGES`; None fetches them with
    npm, those of the six sets in any case, by which the others' drawings are known. `languages`
    are locales of the Unicode CLDR's annotations, English among them.

    Returns:
        For "train" and "test": the number of images in each style.

    Raises:
        ValueError: an unknown set or language, or languages without English; a size not from 1 to
            4,096; packages that are missing, damaged or cannot be fetched; an `out` with something
            in it.
    """
    if "en" not in languages:
        raise ValueError(f"languages={list(languages)} must have en: it is the column `text`")
    if not sets or set(sets) - SETS.keys():
        raise ValueError(f"sets={list(sets)} must be some of {', '.join(SETS)}")
    check_side(size)
    check_free(out)
    counts = {split: Counter[str]() for split in SPLITS}
    with tarballs(packages, {*SIX, *sets, *NAMES}) as paths:
        known = locales(paths["names"])
        if unknown := sorted(set(languages) - set(known)):
            raise ValueError(f"languages={unknown} are unknown: choose from {', '.join(known)}")
        concepts = read_concepts(paths["concepts"])
        drawings = read_drawings(paths, concepts)
        names = {language: read_names(paths, language, concepts) for language in languages}
        licenses = notice(paths, sets)

    def examples() -> Iterator[Example]:
        for concept, (_, group) in tqdm(concepts.items(), desc="drawings", unit="concept"):
            points = code_points(concept)
            fields = _texts(concept, group, names)
            keys = {SETS[key].styles["en"].word: key for key in sets if concept in drawings[key]}
            for style, split in splits_of(points, list(keys)).items():
                counts[split][style] += 1
                name = f"{points}-{style.replace(' ', '-')}.png".lower()
                image = drawings[keys[style]][concept](size)
                metadata = {**fields, **_style(keys[style], languages), "concept": points}
                yield Example(split, name, image, {**metadata, "group": group})

    write_image_folder(
        out,
        examples(),
        card=lambda: card(languages, size=size, counts=counts, sets=sets),
        notice=licenses,
    )
    return {split: dict(counter) for split, counter in counts.items()}


def column(name: str, language: str) -> str:
    """Return the column of a language: `name` itself for English, name_XX for others."""
    return name if language == "en" else f"{name}_{language}"


def _texts(
    concept: str, group: str, names: dict[str, dict[str, Name]]
) -> dict[str, str | list[str] | None]:
    fields: dict[str, str | list[str] | None] = {}
    for language, of_language in names.items():
        name, keywords = of_language.get(concept, Name(None, []))
        fields[column("text", language)] = name
        if language == "en" and name is not None:
            fields["with_article"] = with_article(name, group)
        fields[column("keywords", language)] = keywords
    return fields


def _style(key: str, languages: Iterable[str]) -> dict[str, str]:
    styles = SETS[key].styles
    fields = dict[str, str]()
    for language in languages:
        style = next(filter(None, map(styles.get, ancestors(language))), styles["en"])
        fields[column("style", language)] = style.word
        fields[column("in_style", language)] = style.phrase
    return fields
