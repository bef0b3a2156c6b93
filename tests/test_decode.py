"""Files to RGB: every row of the table of data faults that is about an image."""

import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from support.broken_images import (
    BAD,
    GOOD,
    animated,
    cmyk,
    cmyk_profile,
    floats,
    photograph,
    saved,
)

from latentdiff.data.decode import BadSample, Decoding, decode

RULES = Decoding()
SHOWN = {
    "cmyk.tif": (0, 255, 255),
    "cmyk_icc.tif": (119, 119, 119),  # L* = 50
    "transparent.png": (255, 255, 255),
    "palette.png": (255, 255, 255),
    "sixteen.png": (128, 128, 128),
    "float.tif": (128, 128, 128),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_can_be_shown_is_shown(name: str) -> None:
    make, note = GOOD[name]
    image, notes = decode(make(), RULES)
    assert image.mode == "RGB"
    assert notes == (() if note is None else (note,))
    if name in SHOWN:
        np.testing.assert_allclose(image.getpixel((5, 5)), SHOWN[name], atol=3)


@pytest.mark.parametrize("name", [name for name in BAD if name != "small.png"])
def test_what_cannot_be_trusted_is_refused_with_a_reason(name: str) -> None:
    make, reason = BAD[name]
    with pytest.raises(BadSample) as caught:
        decode(make(), RULES)
    assert caught.value.reason == reason


def test_a_image_is_turned_before_it_is_measured() -> None:
    image, _ = decode(GOOD["rotated.png"][0](), RULES)
    assert image.size == (32, 48)
    assert image.getpixel((31, 5)) == (255, 0, 0)
    assert image.getpixel((0, 5)) == (0, 0, 255)


def test_the_limit_of_pixels_is_configurable() -> None:
    data = saved(photograph((200, 100)))
    assert decode(data, replace(RULES, max_megapixels=0.02)).image.size == (200, 100)
    with pytest.raises(BadSample, match="too large: 200 x 100"):
        decode(data, replace(RULES, max_megapixels=0.019))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_taken_on_request(kind: str) -> None:
    image, _ = decode(animated(kind), replace(RULES, first_frame=True))
    np.testing.assert_allclose(image.getpixel((5, 5)), (255, 0, 0), atol=3)


def test_the_background_is_configurable() -> None:
    half = saved(Image.new("RGBA", (4, 4), (255, 0, 0, 0)))
    image, _ = decode(half, replace(RULES, background="#102030"))
    assert image.getpixel((0, 0)) == (0x10, 0x20, 0x30)


def test_a_broken_profile_is_as_good_as_none() -> None:
    for profile in (b"no profile", cmyk_profile()[:200]):
        image, notes = decode(cmyk(icc_profile=profile), RULES)
        assert notes == ("CMYK without a profile",)
        assert image.getpixel((0, 0)) == (0, 255, 255)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.1, 1.5])
def test_floats_of_an_unknown_range_are_refused(value: float) -> None:
    with pytest.raises(BadSample, match="unknown range of values: mode F"):
        decode(floats(value), RULES)


def test_sixteen_bits_of_a_pgm_are_read_as_those_of_a_png() -> None:
    """Pillow makes 32-bit integers of them, whose white is unknown."""
    grey = Image.fromarray(np.full((4, 4), 128 * 257, np.uint16))
    image, notes = decode(saved(grey, "PPM"), RULES)
    assert image.getpixel((0, 0)) == (128, 128, 128)
    assert notes == ("more than 8 bits",)


def test_every_cut_of_a_file_is_refused() -> None:
    for kind in ("PNG", "JPEG", "WEBP"):
        whole = saved(photograph(), kind)
        for share in (0.1, 0.5, 0.9):
            with pytest.raises(BadSample, match="cannot be decoded"):
                decode(whole[: int(share * len(whole))], RULES)


def test_a_pointer_in_place_of_an_image_is_named() -> None:
    """A clone without Git LFS has one for each image: "none of PNG, JPEG, …" did not say so."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"
    with pytest.raises(BadSample, match="cannot be decoded") as bad:
        decode(pointer, RULES)
    assert "git lfs pull" in bad.value.detail


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_megapixels", 0, "max_megapixels=0 must be above 0 and at most 178"),
        ("max_megapixels", 179, "max_megapixels=179 must be above 0"),
        ("background", "whyte", "background='whyte' must be a colour"),
    ],
)
def test_impossible_rules_are_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RULES, **{field: value})


def with_texts(*texts: tuple[bytes, bytes], after: bool = False) -> bytes:
    """A PNG, 4 x 2 pixels, with chunks of these kinds and contents before or after its pixels."""
    whole = saved(photograph((4, 2)))
    end = len(whole) - 12 if after else 33
    chunks = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in texts
    )
    return whole[:end] + chunks + whole[end:]


WORKFLOW = zlib.compress(b"a large workflow of ComfyUI" * 100_000)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        (b"zTXt", b"workflow\0\0" + WORKFLOW),
        (b"iTXt", b"prompt\0\1\0\0\0" + WORKFLOW),
        (b"tEXt", b"workflow\0" + b"x" * (65 << 20)),
        (b"iCCP", b"profile\0\0" + WORKFLOW),
        (b"tEXt", b"transparency\0none"),
        (b"tEXt", b"interlace\0none"),
        (b"iTXt", b"exif\0\0\0\0\0none"),
    ],
)
def test_what_else_a_png_says_leaves_its_pixels_alone(
    text: tuple[bytes, bytes], after: bool
) -> None:
    """One text above a MiB made the file undecodable, one called transparency ended the run."""
    image, notes = decode(with_texts(text, after=after), RULES)
    np.testing.assert_array_equal(image, photograph((4, 2)))
    assert notes == ()


def test_a_png_may_say_in_a_text_which_side_is_up() -> None:
    xmp = b'<rdf:Description tiff:Orientation="6"/>'
    for text in (
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(_raw_profile())),
    ):
        large = (b"zTXt", b"workflow\0\0" + WORKFLOW)
        image, notes = decode(with_texts(large, text), RULES)
        assert image.size == (2, 4)
        assert notes == ("turned upright",)


def _raw_profile() -> bytes:
    """EXIF as ImageMagick writes it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    body = exif.tobytes()
    return b"\nexif\n%8d\n" % len(body) + body.hex().encode() + b"\n"


def test_a_png_that_is_cut_within_a_text_is_refused() -> None:
    whole = with_texts((b"tEXt", b"key\0" + b"x" * 100), after=True)
    with pytest.raises(BadSample, match="cannot be decoded"):
        decode(whole[:-60], RULES)


def test_damaged_frames_after_the_first_are_no_traceback() -> None:
    """To count the frames of a TIFF Pillow reads each frame's header, and may raise anything."""
    whole = saved(photograph(), "TIFF")
    (start,) = struct.unpack_from("<I", whole, 4)
    (count,) = struct.unpack_from("<H", whole, start)
    after = start + 2 + 12 * count
    linked = whole[:after] + struct.pack("<I", len(whole)) + whole[after + 4 :] + bytes(6)
    for rules in (RULES, replace(RULES, first_frame=True)):
        with pytest.raises(BadSample, match="cannot be decoded: Missing dimensions"):
            decode(linked, rules)
