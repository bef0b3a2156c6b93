"""English articles: "a cat", "an apple", but "scissors" and "bread", for the names of emoji."""

import re

# Last words of names that have no plural, or are no nouns, or are somebody's.
# fmt: off
_NONE = frozenset((
    "away", "bacon", "badminton", "beverage", "bowling", "bread", "breast-feeding", "broccoli",
    "butter", "camping", "candy", "Claus", "construction", "cooking", "coral", "cream", "custard",
    "dango", "dizzy", "dna", "done", "down", "falafel", "fire", "flatbread", "fog", "foggy",
    "food", "fuji", "garlic", "hockey", "ice", "kaaba", "lacrosse", "laughing", "liquid",
    "locked", "luggage", "mate", "meat", "money", "oden", "polish", "pong", "popcorn", "racing",
    "rail", "rice", "rolling", "sake", "salt", "shrimp", "soap", "spaghetti", "star-struck",
    "Statue", "sushi", "tea", "tennis", "thread", "together", "tower", "unlocked", "up",
    "voltage", "way", "wood", "yarn", "ZZZ",
))
# fmt: on
_SOME = frozenset({"hot beverage", "hourglass done", "hourglass not done", "shrimp"})

# Most symbols say what they mean ("no smoking"); those that end so say what they are.
_SHAPES = frozenset(
    {"arrow", "badge", "box", "button", "circle", "cross", "diamond", "mark", "menorah", "sign"}
    | {"square", "star", "symbol"}
)
_PLURALS = frozenset({"men", "people", "skis", "women"})
# First words of names that may end otherwise: "man lifting weights".
_SINGULARS = frozenset({"face", "globe", "man", "person", "skull", "woman"})

_HEAD = re.compile(r" (?:with|without|of|in|on|at|behind|over|facing|holding|but) | \(")
_AN = re.compile(r"[aeio]|u(?!nicorn|tility)|hour|x-|(?:ATM|NG|SOS)\b", re.IGNORECASE)
_NOT_AN = re.compile(r"(?:euro|ewe|one-)", re.IGNORECASE)


def with_article(name: str, group: str) -> str:
    """Return a name with the article that it takes, or as it is where that is none or not known.

    `group` is Unicode's: of the symbols only those that are shapes or signs take one.
    """
    if ":" in name or "o’clock" in name or name.endswith("-thirty"):
        return name
    head = _HEAD.split(name)[0]
    first, last = head.partition(" ")[0], head.rpartition(" ")[2]
    plural = not _PLURALS.isdisjoint((first, last)) or re.search(r"[^iosu]s$", last)
    unknown = last in _NONE or (group == "Symbols" and last not in _SHAPES)
    if (plural or unknown) and name not in _SOME and first not in _SINGULARS:
        return name
    an = _AN.match(name) and not _NOT_AN.match(name)
    return f"{'an' if an else 'a'} {name}"
