"""The page's fields: read into the options of a drawing, and filled from the record of one."""

import hashlib
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentdiff.formats.header import short_repr
from latentdiff.formats.png import FileRecord, Record
from latentdiff.record import read_record

# The page's fields in their order, which are options of the pipeline but for the last.
OPTIONS = (
    *("prompt", "negative_prompt", "steps", "guidance_scale", "sampler", "level_spacing"),
    *("seed", "num_images", "width", "height", "prompt_weighting"),
)
FIELDS = (*OPTIONS, "model", "loras", "lora_scale")
RANDOM = ("", "-1")
UPLOADED = "uploaded"  # the name of a file that is not on the server's disk


def read_fields(
    fields: Mapping[str, Any], editor: Mapping[str, Any] | None, strength: float
) -> dict[str, Any]:
    """The arguments of `Drawings.submit`; ValueError for a seed that is none.

    editor: what gradio's ImageEditor holds, `background` and `layers`. What is painted on the
    layers is drawn anew; if nothing is, all of the image is drawn over.
    """
    options: dict[str, Any] = {name: fields[name] for name in OPTIONS}
    options["seed"] = _seed(fields["seed"])
    options["level_spacing"] = options["level_spacing"] or None
    for name in ("steps", "num_images", "width", "height"):
        options[name] = None if options[name] is None else _whole(name, options[name])
    files: dict[str, FileRecord] = {}
    image, mask = _drawn_over(editor)
    if image is not None:
        options |= {"image": image, "strength": strength}
        files["image"] = _record(image)
    elif mask is not None:
        raise ValueError("the mask has no image below it; upload one, or clear the mask")
    if image is not None and mask is not None:
        options["mask_image"] = mask
        files["mask_image"] = _record(mask)
    loras = dict.fromkeys(fields["loras"] or (), float(fields["lora_scale"]))
    return {"options": options, "model": fields["model"], "loras": loras, "files": files}


def fill_fields(
    options: Mapping[str, Any], record: Record | None, models: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """The fields of an image's options, and sentences on what could not be filled.

    `models` says where each model is, by its name here.
    """
    fields = {name: value for name, value in options.items() if name in OPTIONS}
    fields["seed"] = str(options["seed"]) if "seed" in options else ""
    fields.setdefault("level_spacing", "")
    lost = [
        f"{name}={short_repr(value)} has no field here"
        for name, value in options.items()
        if name not in (*OPTIONS, "strength") and value not in (None, 0, 1)
    ]
    if record is not None:
        names = {where: name for name, where in models.items()}
        if record["model"] in names:
            fields["model"] = names[record["model"]]
        else:
            lost.append(f"its model {Path(record['model']).name} is not among those here")
        fields["loras"] = [Path(lora["name"]).stem for lora in record["loras"]]
        if scales := {lora["scale"] for lora in record["loras"]}:
            fields["lora_scale"] = max(scales)
            if len(scales) > 1:
                lost.append("its LoRAs have several scales, and there is one here")
        if "image" in record:
            lost.append("it was drawn from an image, which has to be chosen again")
    return fields, lost


def read_image(path: Path) -> tuple[dict[str, Any], Record | None, list[str]]:
    """Options and record of a PNG file, and sentences on what was not understood.

    Raises ValueError for a file that does not say how it was drawn; names the path as "the image".
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            options, record = read_record(path, ())
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), "the image")) from error
    return options, record, [str(one.message).replace(str(path), "the image") for one in caught]


def _seed(text: str) -> int | None:
    text = (text or "").strip()
    if text in RANDOM:
        return None
    if not text.isdecimal():
        raise ValueError(
            f"seed={short_repr(text)} must be a whole number, or empty for a random one"
        )
    return int(text[:30])


def _whole(name: str, value: float) -> int:
    if value != int(value):
        raise ValueError(f"{name}={value:g} must be a whole number")
    return int(value)


def _drawn_over(
    editor: Mapping[str, Any] | None,
) -> tuple[Image.Image | None, Image.Image | None]:
    """The image below and the mask of what is painted; None for one that is empty."""
    if editor is None:
        return None, None
    background: Image.Image | None = editor["background"]
    if background is not None and not np.asarray(background.convert("RGBA"))[..., 3].any():
        background = None  # gradio's empty canvas
    painted = [np.asarray(layer.convert("RGBA"))[..., 3] for layer in editor["layers"]]
    alpha = np.maximum.reduce(painted) if painted else np.zeros((1, 1), np.uint8)
    return background, Image.fromarray(np.where(alpha > 0, 255, 0).astype(np.uint8)) if (
        alpha.any()
    ) else None


def _record(image: Image.Image) -> FileRecord:
    """What is known of an uploaded image: the hash of its pixels as PNG."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return {"name": UPLOADED, "sha256": hashlib.sha256(file.getvalue()).hexdigest()}
