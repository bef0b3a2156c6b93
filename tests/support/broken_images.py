"""A generated file for each row of the table of data faults, and what is to become of it."""

import io
import itertools
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photograph(size: tuple[int, int] = (32, 32), seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(values)


def truncated() -> bytes:
    whole = saved(photograph((64, 64)), "JPEG")
    return whole[: len(whole) // 2]


def forged(side: int) -> bytes:
    """A PNG of a few bytes whose header says that it is huge."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + body + saved(photograph())[33:]


def animated(kind: str = "GIF") -> bytes:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)


def cmyk_profile() -> bytes:
    """An ICC profile of a printer whose inks are all grey, two of them black (lut8, 2 points)."""
    table = bytes(range(256))
    grid = b"".join(
        bytes(((255, 128, 0, 0, 0)[sum(inks)], 128, 128))
        for inks in itertools.product((0, 1), repeat=4)
    )
    identity = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    lut = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + identity + table * 4 + grid + table * 3
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    tags, data = b"", b""
    start = 128 + 4 + 12 * 2
    for name, value in ((b"A2B0", lut), (b"wtpt", white)):
        tags += name + struct.pack(">II", start + len(data), len(value))
        data += value + b"\0" * (-len(value) % 4)
    body = struct.pack(">I", 2) + tags + data
    header = bytearray(128)
    header[0:4] = struct.pack(">I", 128 + len(body))
    header[8:12] = b"\x02\x40\0\0"
    header[12:24] = b"prtrCMYKLab "
    header[36:40] = b"acsp"
    header[68:80] = struct.pack(">3i", 63190, 65536, 54061)
    return bytes(header) + body


def cmyk(**options: object) -> bytes:
    return saved(Image.new("CMYK", (32, 32), (255, 0, 0, 0)), "TIFF", **options)


def sixteen_bits() -> bytes:
    return saved(Image.fromarray(np.full((32, 32), 128 * 257, np.uint16)))


def floats(value: float) -> bytes:
    return saved(Image.fromarray(np.full((32, 32), value, np.float32)), "TIFF")


def rotated() -> bytes:
    image = Image.new("RGB", (48, 32), "blue")
    image.paste("red", (0, 0, 48, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(image, exif=exif)


def transparent() -> bytes:
    return saved(Image.new("RGBA", (32, 32), (255, 0, 0, 0)))


def palette() -> bytes:
    image = Image.new("P", (32, 32), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    return saved(image, transparency=1)


GOOD: dict[str, tuple[Callable[[], bytes], str | None]] = {
    "plain.png": (lambda: saved(photograph(seed=1)), None),
    "rotated.png": (rotated, "turned upright"),
    "cmyk.tif": (cmyk, "CMYK without a profile"),
    "cmyk_icc.tif": (lambda: cmyk(icc_profile=cmyk_profile()), "CMYK by its profile"),
    "transparent.png": (transparent, "transparent"),
    "palette.png": (palette, "transparent"),
    "sixteen.png": (sixteen_bits, "more than 8 bits"),
    "float.tif": (lambda: floats(0.5), "more than 8 bits"),
}
BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "truncated.jpg": (truncated, "cannot be decoded"),
    "corrupt.png": (lambda: b"no image", "cannot be decoded"),
    "empty.png": (lambda: b"", "cannot be decoded"),
    "svg.png": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be decoded"),
    "huge.png": (lambda: forged(8_200), "too large"),
    "bomb.png": (lambda: forged(60_000), "too large"),
    "animated.gif": (animated, "animated"),
    "animated.webp": (lambda: animated("WEBP"), "animated"),
    "float_of_300.tif": (lambda: floats(300), "unknown range of values"),
    "small.png": (lambda: saved(photograph((31, 64))), "too small"),
}
