"""Names: what each concept is called, from the Unicode CLDR's annotations in any of its locales."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from latentdiff.data.drawings.packages import read_members

MAX_SHARED = 20  # concepts; "face" and "animal" are keywords of more, and tell none of them apart

# CLDR 48.2's parent of a locale of the names' package, where it is not the locale without its last
# part and there are names of it (supplemental/parentLocales.json). The parent of en-CA is en.
_PARENTS = {
    "en-AU": "en-001",
    "en-GB": "en-001",
    "en-IN": "en-001",
    "es-MX": "es-419",
    "es-US": "es-419",
    "hi-Latn": "en-IN",
    "nn": "no",
}


class Name(NamedTuple):
    """What a concept is called in a language; None where it has no name there."""

    name: str | None
    keywords: list[str]


def locales(tarball: Path) -> list[str]:
    """List the locales of the names' package."""
    paths = read_members(tarball, lambda path: path.endswith("/annotations.json"))
    return sorted({path.split("/")[1] for path in paths} - {"und"})


def ancestors(locale: str) -> Sequence[str]:
    """Return a locale and those whose words it has where it gives none: es-MX, es-419, es.

    They end at a script: zh-Hant has nothing of zh.
    """
    chain = [locale]
    while parent := _PARENTS.get(chain[-1], _without_last(chain[-1])):
        chain.append(parent)
    return chain


def _without_last(locale: str) -> str:
    """A locale without its last part; nothing of a language alone, nor of one in a script."""
    rest, _, last = locale.rpartition("-")
    return "" if last.istitle() else rest


def read_names(
    tarballs: Mapping[str, Path], locale: str, concepts: Iterable[str]
) -> dict[str, Name]:
    """Return the names of those concepts that have one in the locale.

    A locale has its parents' names where it gives none, see `ancestors`. Left out of the keywords
    are the concept's own name, the names of other concepts ("cat", a keyword of the cat
    face) and those of more than `MAX_SHARED` concepts. Upper and lower case count as the same.
    """
    merged: dict[str, dict[str, list[str]]] = {}
    for parent in reversed(ancestors(locale)):
        for key, folder in (("names of sequences", "annotationsDerived"), ("names", "annotations")):
            for sequence, entry in _read(tarballs[key], f"{folder}/{parent}").items():
                merged[sequence] = {**merged.get(sequence, {}), **entry}
    found = {
        concept: (merged[concept]["tts"][0], merged[concept].get("default", []))
        for concept in concepts
        if "tts" in merged.get(concept, {})
    }
    shared = Counter(word.casefold() for _, keywords in found.values() for word in keywords)
    names = {name.casefold() for name, _ in found.values()}
    dull = names | {word for word, count in shared.items() if count > MAX_SHARED}
    return {
        concept: Name(name, [word for word in keywords if word.casefold() not in dull])
        for concept, (name, keywords) in found.items()
    }


def _read(tarball: Path, folder: str) -> dict[str, dict[str, list[str]]]:
    files = read_members(tarball, lambda path: path == f"{folder}/annotations.json")
    for data in files.values():
        (annotations,) = json.loads(data).values()
        return annotations["annotations"]
    return {}
