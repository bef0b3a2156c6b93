"""The texts beside the drawings: README.md, the data set's card, and NOTICE."""

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from latentdiff.data.code_points import TEST_PERCENT
from latentdiff.data.drawings.icons import OVERSAMPLING
from latentdiff.data.drawings.names import MAX_SHARED
from latentdiff.data.drawings.packages import PACKAGES, read_members
from latentdiff.data.drawings.sets import SETS
from latentdiff.data.folder import SPLITS


def card(
    languages: Sequence[str],
    *,
    size: int,
    counts: Mapping[str, Counter[str]],
    sets: Sequence[str],
) -> str:
    """Return the data set's card; `counts` are of the images of each split and style."""
    total = sum(counter.total() for counter in counts.values())
    return f"""---
license: other
license_name: see-notice
license_link: NOTICE
task_categories: [text-to-image]
language: [{", ".join(languages)}]
---
# Drawings with captions, in {len(sets)} {"style" if len(sets) == 1 else "styles"}

{total} images of {size} x {size} pixels on white, made by `latentdiff data drawings`:

```python
datasets.load_dataset("imagefolder", data_dir="this folder")
```

## Source
- Images: sets of emoji from npm packages at fixed versions (`NOTICE` has authors and \
licences). Vectors are drawn by resvg-py {version("resvg-py")} at {OVERSAMPLING} x {size} pixels \
and shrunk (each pixel is the mean of its area); the 3D set is images of 256 x 256 pixels, scaled.
- Captions: Unicode CLDR {PACKAGES["names"].version}, in {", ".join(languages)}.

## Columns
- `text`: the English name; `text_XX` in language XX. `with_article`: the English name with the \
article that it takes ("an apple"), if any ("scissors").
- `keywords`, `keywords_XX`: further words for it, without names of other concepts and words that \
more than {MAX_SHARED} concepts share.
- `style`, `style_XX`: the style in a word; `in_style`, `in_style_XX`: as it follows a name \
("3D style"). Languages without words for the styles here have the English ones.
- `concept`: the code points, without U+FE0F; `group`: Unicode's group.

## Styles and splits
{_table(counts, sets)}

- No skin tones, no flags of countries or regions.
- `test` has pairs of a concept and a style whose concept `train` has in other styles: those for \
which the SHA-256 of "1F431/3D" (the columns `concept` and `style`), read as a whole number, \
leaves less than {TEST_PERCENT} when divided by 100. A concept that would be left in no style of \
`train` is in `train` in all.
{_fluent(sets)}\
- A set may draw several concepts alike ("man running" and "person running"): the same image then \
occurs more than once, each time with its own caption.
"""


def notice(tarballs: Mapping[str, Path], sets: Sequence[str]) -> str:
    """Return whose work the drawings and their names are, under which licences, from where.

    Two licences ask for their text: the packages of the names and of the concepts have it.
    """
    texts = {key: _license(tarballs[key]) for key in ("names", "concepts")}
    sets = "\n\n".join(
        f"{one.title} (style: {one.styles['en'].word})\n"
        f"  by {one.author}, {one.link}\n"
        f"  {one.license}, {_LICENSES[one.license]}\n"
        f"  from the npm package {PACKAGES[key].name} {PACKAGES[key].version}"
        for key in sets
        for one in [SETS[key]]
    )
    cldr, derived, names = (PACKAGES[key] for key in ("names", "names of sequences", "concepts"))
    return f"""The images are drawn from these sets; they are scaled and laid on white, and not \
otherwise changed.

{sets}

The captions and keywords are of the Unicode Common Locale Data Repository
  by Unicode, Inc., https://cldr.unicode.org
  Unicode-3.0, {_LICENSES["Unicode-3.0"]}
  from the npm packages {cldr.name} and {derived.name} {cldr.version}

The list of emoji and their groups is from the npm package {names.name} {names.version}
  by Mu-An Chiou, https://github.com/muan/unicode-emoji-json
  MIT, {_LICENSES["MIT"]}

{_RULE}
The licence Unicode-3.0:

{texts["names"]}
{_RULE}
The licence MIT, as {names.name} has it; that of {SETS["fluent-emoji-3d"].link} has the same text \
under "Copyright (c) Microsoft Corporation":

{texts["concepts"]}"""


_RULE = "-" * 80

_LICENSES = {
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "MIT": "https://opensource.org/license/mit",
    "Unicode-3.0": "https://www.unicode.org/license.txt",
}


def _license(tarball: Path) -> str:
    (text,) = read_members(tarball, lambda path: path == "LICENSE").values()
    return text.decode()


def _table(counts: Mapping[str, Counter[str]], sets: Sequence[str]) -> str:
    rows = [
        f"| {word} | {SETS[key].title} | " + " | ".join(str(counts[s][word]) for s in SPLITS) + " |"
        for key in sets
        if (word := SETS[key].styles["en"].word)
    ]
    totals = " | ".join(str(counts[split].total()) for split in SPLITS)
    head = [f"| style | set | {' | '.join(SPLITS)} |", "|---|---|---:|---:|"]
    return "\n".join([*head, *rows, f"| all | | {totals} |"])


def _fluent(sets: Sequence[str]) -> str:
    """What holds where all of Microsoft's sets are drawn."""
    fluent = [key for key in SETS if key.startswith("fluent")]
    if not set(fluent) <= set(sets):
        return ""
    words = ", ".join(SETS[key].styles["en"].word for key in fluent)
    return (
        "- The 3D set has no drawing that both of Microsoft's other sets lack.\n"
        f"- The three Fluent sets ({words}) share their shapes: a pair of these that is held out "
        "may be known in another colouring. Those of the other sets are drawings of their own.\n"
    )
