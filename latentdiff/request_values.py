"""What the options of a request may be: whole numbers, one or one for each image, texts, masks."""

import operator
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from PIL import Image

from latentdiff.formats.header import short_repr
from latentdiff.models.prompts import parse_weights

WEIGHED = re.compile(r"\([^():\n]{1,80}:\s*\d*\.\d+\s*\)")  # such as (cat:1.3)
ONE = {str: "a text", Image.Image: "a PIL image"}
MOST_IMAGES = 100_000  # of one call
LIGHTEST_KEPT = 127  # of a mask's 0 … 255


def for_each_image(
    name: str,
    value: Any,
    kind: type,
    read: Callable[[Any], Any],
    prompts: int | None,
    num_images: int,
) -> tuple[Any, ...]:
    """An option for each of the `num_images` images of each prompt, as `read` makes it.

    `value` is one of `kind` for all prompts, or one for each of them. `prompts` is their number;
    None if `value` is the prompts. Raises ValueError for anything else.
    """
    one = ONE[kind]
    try:
        values = [value] if isinstance(value, str | bytes | Image.Image) else list(value)
    except TypeError:
        values = [value]
    if not values:
        raise ValueError(f"{name} is an empty list; give at least {one}")
    for item in values:
        if not isinstance(item, kind):
            raise ValueError(f"{name} holds {short_repr(item)}; it must be {one} or a list of them")
    prompts = len(values) if prompts is None else prompts
    if prompts * num_images > MOST_IMAGES:
        raise ValueError(
            f"num_images={num_images} of {prompts} prompts are more than {MOST_IMAGES:,} images, "
            "the most of one call"
        )
    if len(values) not in (1, prompts):
        raise ValueError(
            f"{name} lists {len(values)} for {prompts} prompts; give one, or one for each"
        )
    try:
        values = [read(value) for value in values]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    of_prompts = values if len(values) == prompts else values * prompts
    return tuple(value for value in of_prompts for _ in range(num_images))


def check_texts(name: str, texts: Iterable[str], *, weighting: bool) -> None:
    """Raise ValueError for what is no Unicode or, with `weighting`, has brackets that are open.

    Without `weighting` a text that seems to weigh a word is warned of.
    """
    texts = list(dict.fromkeys(texts))
    if not weighting and (weighed := WEIGHED.search("\n".join(texts))):
        warnings.warn(
            f"{name}: {weighed[0]!r} is read as it stands, with its brackets; prompt_weighting "
            "lets it weigh a word",
            stacklevel=3,
        )
    for text in texts:
        try:
            text.encode()
            if weighting:
                parse_weights(text)
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name}: {short_repr(text)} is not valid Unicode at character {error.start + 1}, "
                "half of a pair or a byte of another encoding; write it in UTF-8"
            ) from error
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def whole(name: str, value: Any, least: int, most: int) -> int:
    """The integer that a value is, NumPy's and a tensor's too."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        high = "2**64 - 1" if most == 2**64 - 1 else f"{most:,}"
        raise ValueError(
            f"{name}={short_repr(value)} must be a whole number from {least} to {high}"
        )
    return number


def yes_or_no(name: str, value: Any) -> None:
    """Raise ValueError for what is neither True nor False, such as "no", which counts as True."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}={short_repr(value)} must be True or False")


def check_mask(mask: Image.Image, image: Image.Image) -> None:
    """Raise ValueError for a mask of another shape than its image, and for one that keeps all."""
    apart = abs(mask.width * image.height - mask.height * image.width)
    # Of two sizes of one shape, the smaller one was rounded by up to half a pixel on each side.
    if 2 * apart > max(sum(mask.size), sum(image.size)):
        raise ValueError(
            f"mask_image has {in_pixels(mask.size)} pixels and its image {in_pixels(image.size)}; "
            "give a mask of the image's shape"
        )
    lightest = int(np.asarray(mask).max())
    if lightest <= LIGHTEST_KEPT:
        raise ValueError(
            f"mask_image is white nowhere, so that nothing would be drawn: its lightest pixel is "
            f"{lightest}, and white is 255"
        )


def in_pixels(size: tuple[int, int]) -> str:
    """A size (width, height) in words."""
    return f"{size[0]} x {size[1]}"
