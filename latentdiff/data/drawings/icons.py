"""Icons: reads the sets' drawings, matches them to concepts and draws them.

A concept is an emoji's code points without U+FE0F, which some sets write and others do not.
"""

import io
import json
import re
import unicodedata
from collections.abc import Callable, Container, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import resvg_py
from PIL import Image

from latentdiff.data.code_points import REGIONAL_INDICATORS, SKIN_TONES, TAGS
from latentdiff.data.drawings.packages import read_members
from latentdiff.data.drawings.sets import SETS

OVERSAMPLING = 4  # resvg's edges are jagged: vectors are rendered larger and shrunk

Draw = Callable[[int], Image.Image]
"""Draws one concept at a side in pixels: RGB on white."""


class Concept(NamedTuple):
    """Unicode's English name of a concept, and its group."""

    name: str
    group: str


def read_concepts(tarball: Path) -> dict[str, Concept]:
    """Return the concepts in Unicode's order.

    Flags of countries and of their parts, and emoji with a skin tone, are left out.
    """
    (data,) = read_members(tarball, lambda path: path == "data-by-emoji.json").values()
    return {
        concept: Concept(entry["name"], entry["group"])
        for sequence, entry in json.loads(data).items()
        if not _left_out(concept := _plain(sequence))
    }


def read_drawings(
    tarballs: Mapping[str, Path], concepts: Mapping[str, Concept]
) -> dict[str, dict[str, Draw]]:
    """Return for each set the concepts that it has, each with the function that draws it.

    `tarballs` has those of the six sets at least. An icon is matched by the code points that its
    set gives, or else by its name, with or without hyphens: that of an icon of another set with
    code points, or Unicode's. The 3D set has only what one of Microsoft's
    other two has: the origin of the rest is not known.
    """
    keys = [key for key in SETS if key in tarballs]
    data = {key: _read_iconify(tarballs[key]) for key in keys if key != "fluent-emoji-3d"}
    names = {_hyphened(name): concept for concept, (name, _) in concepts.items()}
    for _, points in data.values():
        names |= points
    joined = {name.replace("-", ""): concept for name, concept in names.items()}
    drawings = {
        key: _vectors(icons, (joined if key == "fxemoji" else {}) | names | points, concepts)
        for key, (icons, points) in data.items()
    }
    microsoft = drawings["fluent-emoji-flat"].keys() | drawings["fluent-emoji-high-contrast"].keys()
    drawings["fluent-emoji-3d"] = _images(tarballs["fluent-emoji-3d"], microsoft)
    return {key: drawings[key] for key in keys}


def _read_iconify(tarball: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a set's icons (Iconify JSON), and the concepts of the names that it has points for."""
    files = read_members(tarball, lambda path: path in ("icons.json", "chars.json"))
    points = json.loads(files["chars.json"])
    return json.loads(files["icons.json"]), {name: _sequence(hex) for hex, name in points.items()}


def _vectors(
    icons: Mapping[str, Any], names: Mapping[str, str], concepts: Container[str]
) -> dict[str, Draw]:
    return {
        names[name]: partial(_draw_vector, _svg(icon, icons))
        for name, icon in icons["icons"].items()
        if not icon.get("hidden") and name in names and names[name] in concepts
    }


def _svg(icon: Mapping[str, Any], icons: Mapping[str, Any]) -> str:
    """Make a whole SVG of an icon's body; the set's own sizes hold where the icon has none."""
    defaults = {"left": 0, "top": 0, "width": 16, "height": 16}
    left, top, width, height = (icon.get(k, icons.get(k, v)) for k, v in defaults.items())
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">'
        f"{icon['body']}</svg>"
    )


def _draw_vector(svg: str, size: int) -> Image.Image:
    side = OVERSAMPLING * size
    png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True)
    return _on_white(Image.open(io.BytesIO(bytes(png))), size)


def _images(tarball: Path, wanted: Container[str]) -> dict[str, Draw]:
    """Read a set of image files that are named by their code points: "1f469-200d-1f680.webp"."""
    files = read_members(
        tarball, lambda path: path.endswith(".webp") and _sequence(Path(path).stem) in wanted
    )
    return {_sequence(Path(path).stem): partial(_draw_image, data) for path, data in files.items()}


def _draw_image(data: bytes, size: int) -> Image.Image:
    return _on_white(Image.open(io.BytesIO(data)), size)


def _on_white(image: Image.Image, size: int) -> Image.Image:
    """Centre an image on a white square and scale that to `size`."""
    image = image.convert("RGBA")
    side = max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    # Lanczos rings: a tenth of a drawing's pixels were nearly white, of the mean of areas 1 %.
    kernel = Image.Resampling.BOX if side >= size else Image.Resampling.LANCZOS
    return square.convert("RGB").resize((size, size), kernel)


def _plain(sequence: str) -> str:
    return sequence.replace("\ufe0f", "")


def _sequence(points: str) -> str:
    return _plain("".join(chr(int(point, 16)) for point in re.split("[-_]", points)))


def _left_out(concept: str) -> bool:
    points = {ord(character) for character in concept}
    return any(points.intersection(kind) for kind in (REGIONAL_INDICATORS, TAGS, SKIN_TONES))


def _hyphened(name: str) -> str:
    """Write a name as Iconify does: "Mrs. Claus" is "mrs-claus"."""
    name = name.lower().replace("’", "").replace("“", "").replace("”", "").replace("&", "and")
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_name).strip("-")
