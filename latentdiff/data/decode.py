"""Decodes an image file to upright RGB; a damaged or ambiguous file is refused with a reason."""

import io
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageOps, UnidentifiedImageError

from latentdiff.formats.png import without_texts
from latentdiff.formats.stand_in import stand_in
from latentdiff.images import to_rgb

# Only these of Pillow's dozens of decoders open a file: rare formats have most vulnerabilities.
# With the ends of the names that Pillow gives them; a phone's MPO is a JPEG.
FORMATS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
}
SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
# The texts of a PNG that tell which side is up.
PNG_ORIENTATIONS = ("XML:com.adobe.xmp", "Raw profile type exif")
ORIENTATION = 0x0112  # the EXIF tag; the value 1 is upright
MAX_MEGAPIXELS = 178  # Pillow refuses larger images


class BadSample(ValueError):
    """A sample that cannot be trained on.

    `reason` is one of a few phrases, by which bad samples are counted; `detail` describes this one.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["BadSample"], tuple[str, str]]:
        return BadSample, (self.reason, self.detail)  # pickled by a DataLoader's worker


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Options of the decoder; their meaning is DataConfig's.

    Raises ValueError for an unknown colour, or a `max_megapixels` above Pillow's own limit.
    """

    background: str = "white"
    max_megapixels: float = 64
    first_frame: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.max_megapixels <= MAX_MEGAPIXELS:
            raise ValueError(
                f"max_megapixels={self.max_megapixels} must be above 0 and at most "
                f"{MAX_MEGAPIXELS}, where Pillow stops"
            )
        try:
            ImageColor.getrgb(self.background)
        except ValueError as error:
            raise ValueError(
                f"background={self.background!r} must be a colour such as 'white' or '#808080'"
            ) from error


class Decoded(NamedTuple):
    """An upright RGB image, and notes on the conversions that it needed."""

    image: Image.Image
    notes: tuple[str, ...]


def decode(data: bytes, rules: Decoding) -> Decoded:
    """Decode a complete image file. Raises BadSample when it is damaged or against the rules."""
    with _open(data, rules) as image:
        try:
            image.load()
            if image.format == "PPM" and image.mode == "I":  # 16 bits, of which Pillow makes 32
                image = Image.fromarray(np.asarray(image).astype(np.uint16))
            turned = image.getexif().get(ORIENTATION, 1) != 1
            image = ImageOps.exif_transpose(image)
        except Exception as error:  # a damaged file can make Pillow's decoders raise anything
            raise BadSample("cannot be decoded", _one_line(error)) from error
        notes = ["turned upright"] if turned else []
        if image.mode == "CMYK":
            image, note = _from_cmyk(image)
            notes.append(note)
        elif image.mode in ("F", "I") or image.mode.startswith("I;16"):
            notes.append("more than 8 bits")  # to_rgb scales them
        if image.has_transparency_data:
            notes.append("transparent")
        try:
            return Decoded(to_rgb(image, background=rules.background), tuple(notes))
        except ValueError as error:
            raise BadSample("unknown range of values", str(error)) from error


def _open(data: bytes, rules: Decoding) -> Image.Image:
    """Read the header of an image file. Raises BadSample for a size or animation out of bounds."""
    try:
        data = without_texts(data, keep=PNG_ORIENTATIONS)
        image = Image.open(io.BytesIO(data), formats=tuple(FORMATS))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample("too large", _one_line(error)) from error
    except Exception as error:  # as above
        raise BadSample("cannot be decoded", stand_in(data[:100]) or _one_line(error)) from error
    width, height = image.size
    if width * height > rules.max_megapixels * 1e6:
        raise BadSample("too large", f"{width} x {height}")
    try:
        # The further frames of a phone's MPO are a depth map or thumbnail, not an animation.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except Exception as error:  # as above
        raise BadSample("cannot be decoded", _one_line(error)) from error
    if frames > 1 and not rules.first_frame:
        raise BadSample("animated", f"{frames} frames")
    return image


def _from_cmyk(image: Image.Image) -> tuple[Image.Image, str]:
    """Convert CMYK to RGB by the file's ICC profile, or by Pillow's formula if it has no valid one.

    Returns the image and a note that says which.
    """
    profile = image.info.get("icc_profile")
    if profile:
        try:
            converted = ImageCms.profileToProfile(
                image,
                ImageCms.ImageCmsProfile(io.BytesIO(profile)),
                ImageCms.createProfile("sRGB"),
                outputMode="RGB",
            )
        except (ImageCms.PyCMSError, OSError):
            converted = None
        if converted is not None:
            return converted, "CMYK by its profile"
    return image.convert("RGB"), "CMYK without a profile"


def _one_line(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own message has an address in memory
        return f"none of {', '.join(FORMATS)}"
    return " ".join(str(error).split()) or type(error).__name__
