"""A few packages in the real layout, from which `latentdiff data drawings` draws in no time."""

import base64
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

from latentdiff.data.drawings import packages
from latentdiff.data.drawings.packages import Package

SQUARE = '<path fill="{}" d="M0 0h16v16H0z"/>'
CAT, SCISSORS, KEYCAP, ROCKET = "1f431", "2702-fe0f", "0023-fe0f-20e3", "1f680"
NAMES = {CAT: "cat face", SCISSORS: "scissors", KEYCAP: "keycap #", ROCKET: "rocket"}
COLOURS = {"noto": "red", "noto-v1": "lime", "twemoji": "blue"}
ANNOTATIONS = {
    "en": {
        CAT: ("cat face", ["cat face", "kitty", "Rocket", "tool"]),
        SCISSORS: ("scissors", ["cutting", "tool"]),
        ROCKET: ("rocket", ["space"]),
    },
    "zh": {CAT: ("猫脸", ["猫咪"]), SCISSORS: ("剪刀", []), ROCKET: ("火箭", ["太空"])},
    "es": {CAT: ("cara de gato", ["gato"]), ROCKET: ("cohete", ["espacio"])},
    "es-MX": {ROCKET: ("nave", None)},
    "fr": {CAT: ("tête de chat", ["chaton"]), ROCKET: ("fusée", ["espace"])},
    "de": {CAT: ("Katzengesicht", ["Miau"]), ROCKET: ("Rakete", ["All"])},
}


def character(points: str) -> str:
    return "".join(chr(int(point, 16)) for point in points.split("-"))


def annotations(kind: str, locale: str, entries: dict[str, Any]) -> dict[str, bytes]:
    """A locale's file of names and keywords; CLDR's keys are without U+FE0F."""
    texts = {
        character(points).replace("\ufe0f", ""): {"tts": [name]}
        | ({} if words is None else {"default": words})
        for points, (name, words) in entries.items()
    }
    data = {kind: {"identity": {"language": locale}, "annotations": texts}}
    return {f"{kind}/{locale}/annotations.json": json.dumps(data).encode()}


def icons(colour: str, chars: dict[str, str], **more: str) -> dict[str, bytes]:
    """An Iconify package: `chars` are names by code points, `more` are icons of no known points."""
    bodies = {name: {"body": SQUARE.format(colour)} for name in (*chars.values(), *more.values())}
    bodies["hidden"] = {"body": SQUARE.format("black"), "hidden": True}
    data = {"prefix": "x", "icons": bodies, "height": 16}
    return {"icons.json": json.dumps(data).encode(), "chars.json": json.dumps(chars).encode()}


def webp(colour: str) -> bytes:
    """A circle's worth of colour in a transparent image that is wider than high."""
    image = Image.new("RGBA", (32, 24), (0, 0, 0, 0))
    image.paste(colour, (8, 4, 24, 20))
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=True)
    return file.getvalue()


def files() -> dict[str, dict[str, bytes]]:
    """The files of each package: the 3D set has a rocket that Microsoft's other sets lack."""
    chars = {"1f431": "cat-face", "2702": "scissors", "23-20e3": "keycap-pound", "1f680": "rocket"}
    fluent = {"1f431": "cat-face", "2702": "scissors", "1f1ef-1f1f5": "flag-japan"}
    entries = {
        character(points): {"name": name, "group": "Symbols" if points == KEYCAP else "Things"}
        for points, name in NAMES.items()
    }
    entries["🇯🇵"] = {"name": "flag Japan", "group": "Flags"}
    named = {"LICENSE": b"The licence's words\n"}
    keycap = annotations("annotationsDerived", "en", {KEYCAP: ("keycap: #", ["keycap"])})
    names = [annotations("annotations", *pair) for pair in ANNOTATIONS.items()]
    return {
        "noto": icons(COLOURS["noto"], chars),
        "noto-v1": icons(COLOURS["noto-v1"], {}, a="cat-face", b="keycap-pound", c="pistol"),
        "twemoji": icons(COLOURS["twemoji"], chars),
        "fluent-emoji-flat": icons("orange", fluent),
        "fluent-emoji-high-contrast": icons("currentColor", fluent),
        "fluent-emoji-3d": {
            f"assets/{points}.webp": webp("navy") for points in (CAT, ROCKET, "1f1ef-1f1f5")
        },
        "emojione": icons("gold", {}, a="cat-face", b="rocket"),
        "fxemoji": icons("teal", {}, a="catface"),
        "streamline-emojis": icons("black", {}, a="scissors"),
        "concepts": {"data-by-emoji.json": json.dumps(entries).encode(), **named},
        "names": {path: data for one in names for path, data in one.items()} | named,
        "names of sequences": keycap,
    }


def write_packages(folder: Path) -> dict[str, Package]:
    """Write the tarballs into `folder`; the result stands in for `packages.PACKAGES`."""
    folder.mkdir(parents=True)
    made = {}
    for key, members in files().items():
        package = packages.PACKAGES[key]._replace(version="0.0.1")
        with tarfile.open(folder / package.file_name, "w:gz") as tar:
            for path, data in members.items():
                member = tarfile.TarInfo(f"package/{path}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        digest = hashlib.sha512((folder / package.file_name).read_bytes()).digest()
        made[key] = package._replace(integrity="sha512-" + base64.b64encode(digest).decode())
    return made
