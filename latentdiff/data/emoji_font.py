"""EmojiFont: draws emoji with a colour bitmap font, and tells which emoji the font has."""

import hashlib
import struct
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFont, features

# Where Debian, Fedora and Arch put Noto Color Emoji.
FONT_PATHS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
)

# The font's only bitmaps are 136 x 128 pixels, for this size; they are centred on a square canvas.
FONT_SIZE = 109
CANVAS = 144

_ANY_EMOJI = "\N{GRINNING FACE}"
_NO_EMOJI = "\U0010fffd"  # a private-use code point, for which no emoji font has an image


class EmojiFont:
    """A colour emoji font, which draws one emoji at a time.

    `path` None looks in `FONT_PATHS`.

    Raises:
        ValueError: there is no font; the file is no font with colour bitmaps of size 109; Pillow
            lacks raqm, the library that joins emoji sequences into one glyph.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = _find_font(path)
        if not features.check("raqm"):
            raise ValueError("this Pillow cannot join emoji sequences: it was built without raqm")
        self._font = _open(self.path)
        self._advance = self._font.getlength(_ANY_EMOJI)
        self._missing = self._draw(_NO_EMOJI)
        if self._draw(_ANY_EMOJI).convert("L").convert("RGB") == self._draw(_ANY_EMOJI):
            raise ValueError(_unusable(self.path, "it draws no colours"))

    def draw(self, sequence: str, *, size: int) -> Image.Image | None:
        """Return the emoji on white, RGB, `size` x `size`; None where the font lacks it.

        A font lacks a joined sequence when it draws its components side by side (the text is then
        longer than one glyph), and a single emoji when it draws nothing or its missing-glyph sign.
        """
        if self._font.getlength(sequence) != self._advance:
            return None
        image = self._draw(sequence)
        if ImageChops.difference(image, self._missing).getbbox() is None:
            return None
        return image.resize((size, size), Image.Resampling.LANCZOS)

    def _draw(self, sequence: str) -> Image.Image:
        image = Image.new("RGB", (CANVAS, CANVAS), "white")
        left, top, right, bottom = self._font.getbbox(_ANY_EMOJI)
        corner = ((CANVAS - right + left) // 2 - left, (CANVAS - bottom + top) // 2 - top)
        ImageDraw.Draw(image).text(
            corner, sequence, fill="black", font=self._font, embedded_color=True
        )
        return image

    def describe(self) -> str:
        """Return the font's name, revision and SHA-256, for the data set's card."""
        data = self.path.read_bytes()
        revision = f"revision {_revision(data)}, " if data[:4] == b"\0\1\0\0" else ""
        return f"{self._font.getname()[0]}, {revision}SHA-256 {hashlib.sha256(data).hexdigest()}"


def _find_font(path: Path | None) -> Path:
    if path is not None:
        if not path.is_file():
            raise ValueError(
                f"font={str(path)!r} is not there: install the Debian package "
                "fonts-noto-color-emoji, or give the path of NotoColorEmoji.ttf with --font"
            )
        return path
    for candidate in FONT_PATHS:
        if Path(candidate).is_file():
            return Path(candidate)
    raise ValueError(
        "font not found: install Noto Color Emoji (Debian package fonts-noto-color-emoji), or "
        "give the path of NotoColorEmoji.ttf with --font"
    )


def _open(path: Path) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(str(path), FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        raise ValueError(_unusable(path, str(error))) from error


def _unusable(path: Path, reason: str) -> str:
    return (
        f"font={str(path)!r} is no usable emoji font ({reason}): it must be Noto Color Emoji with "
        f"bitmaps for size {FONT_SIZE}, as in the Debian package fonts-noto-color-emoji"
    )


def _revision(data: bytes) -> str:
    # OpenType: a directory of tables (tag, checksum, offset, length) after 12 bytes; the table
    # `head` has fontRevision, a 16.16 fixed-point number, at its fourth byte.
    (num_tables,) = struct.unpack_from(">H", data, 4)
    for index in range(num_tables):
        tag, _, offset, _ = struct.unpack_from(">4sIII", data, 12 + 16 * index)
        if tag == b"head":
            (revision,) = struct.unpack_from(">i", data, offset + 4)
            return f"{revision / 65536:.3f}"
    return "unknown"
