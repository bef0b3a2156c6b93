"""Load pretrained CLIPs: both towers of a folder, or a text tower for a new CLIP.

B images, H x W their size.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from latentdiff.formats.diffusers import EMBEDDED_MODELS, find_model
from latentdiff.formats.header import short_repr
from latentdiff.formats.hub import fetch_clip
from latentdiff.formats.ldm.keys import TEXT_MODEL
from latentdiff.formats.sharded_weights import load_weights
from latentdiff.formats.weights import load_json
from latentdiff.models.clip import CLIPSize, new_clip
from latentdiff.models.text import TextEncoder
from latentdiff.models.text_config import image_config, load_tokenizer, tower_config

OPEN_CLIP = "open_clip:"
MOST_PROJECTED = 2**15  # far above every published CLIP


@dataclass(frozen=True)
class Pixels:
    """The pixel normalisation of an image tower: (value - mean) / std per channel, of [0, 1].

    Called with images (B, 3, H, W) in [-1, 1], which the defaults leave as they are.
    """

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise images (B, 3, H, W) in [-1, 1]."""
        if self == Pixels():
            return images
        mean, std = (images.new_tensor(x)[:, None, None] for x in (self.mean, self.std))
        return ((images + 1) / 2 - mean) / std

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Read `preprocessor_config.json`. Raises ValueError for any other preprocessing."""
        path = folder / "preprocessor_config.json"
        values = load_json(path)
        for key in ("do_rescale", "do_normalize"):
            if values.get(key, True) is not True:
                raise ValueError(
                    f"{path}: {key} is {short_repr(values[key])}; only true is supported"
                )
        for key, least in (("image_mean", -10), ("image_std", 1e-3)):
            three: Any = values.get(key)
            numbers = isinstance(three, list) and all(type(x) in (int, float) for x in three)
            if not (numbers and len(three) == 3 and all(least <= x <= 10 for x in three)):
                raise ValueError(
                    f"{path}: {key} is {short_repr(three)}; allowed are three numbers from "
                    f"{least} to 10"
                )
        return cls(tuple(values["image_mean"]), tuple(values["image_std"]))


class Towers(NamedTuple):
    """Both towers of a folder."""

    model: CLIPModel
    pixels: Pixels
    logit_bias: float | None
    """The bias of a CLIP trained with the sigmoid loss, which `CLIPModel` does not hold."""


class Start(NamedTuple):
    """The initial towers and tokenizer of a CLIP's training."""

    towers: Towers
    tokenizer: CLIPTokenizer
    shapes: dict[str, int]
    """The sizes that the weights are made for, by the names of the training's options."""


def load_clip(folder: Path) -> Towers:
    """Load both towers of a folder that transformers' CLIPModel wrote, and their normalisation.

    Only the keys of `config.json` that the towers compute with, and `logit_bias`, are read. Raises
    ValueError when a file is missing or damaged, is of another model, or does not fit the others.
    """
    path = folder / "config.json"
    values = load_json(path)
    try:
        config, bias = _clip_config(values), _bias(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    with torch.device("meta"):
        model = CLIPModel(config)
    tensors = load_weights(
        folder,
        "model",
        expected=model.state_dict(),
        optional=lambda name: name.endswith(".embeddings.position_ids"),  # of old files
        dtype=torch.float32,
    )
    model.load_state_dict(tensors, assign=True)
    embeddings: Any
    for embeddings in (model.text_model.embeddings, model.vision_model.embeddings):
        count = embeddings.position_embedding.num_embeddings
        embeddings.position_ids = torch.arange(count)[None]  # never in a state
    return Towers(model, Pixels.from_folder(folder), bias)


def load_start(init: str, size: CLIPSize, *, image_size: int) -> Start:
    """Load both towers and a tokenizer, or a text tower for a new image tower of this `size`.

    init: a folder of transformers' CLIPModel with its tokenizer, such as a training's `model/clip`,
    gives both towers. The text tower alone comes from a folder with `text_encoder/` and
    `tokenizer/`, "emoji", or "open_clip:NAME:WEIGHTS" (see `TextEncoder.from_open_clip`); the
    projections are new then. Anything else is the id of such a folder on the Hugging Face Hub.
    Raises ValueError when there is no such model, when it cannot be read, and for images of another
    size than its image tower's.
    """
    folder = None if init.startswith(OPEN_CLIP) else _find(init)
    if folder is not None and (folder / "clip" / "config.json").is_file():
        folder = folder / "clip"
    if folder is not None and (folder / "config.json").is_file():
        towers = load_clip(folder)
        tokenizer = load_tokenizer(folder, towers.model.text_model.config)
        start = Start(towers, tokenizer, _shapes(towers.model, tokenizer))
        if start.shapes["image_size"] != image_size:
            raise ValueError(
                f"image_size={image_size} must be {start.shapes['image_size']}, that of the image "
                f"tower of init={init!r}"
            )
        return start
    encoder = _open_clip_text(init) if folder is None else TextEncoder.from_pretrained(folder)
    text = encoder.model.config
    size = replace(
        size,
        text_width=text.hidden_size,
        text_layers=text.num_hidden_layers,
        text_heads=text.num_attention_heads,
    )
    model = new_clip(size, encoder.tokenizer, image_size=image_size, text=text)
    weights = encoder.model.state_dict()
    model.text_model.load_state_dict({k.removeprefix(TEXT_MODEL): v for k, v in weights.items()})
    shapes = _shapes(model, encoder.tokenizer)
    text_shapes = {
        key: n for key, n in shapes.items() if key.startswith(("clip.text_", "vocab", "max"))
    }
    return Start(Towers(model, Pixels(), None), encoder.tokenizer, text_shapes)


def _find(init: str) -> Path:
    """Find the folder of both towers or of a text encoder."""
    if init in EMBEDDED_MODELS or Path(init).is_dir():
        return find_model(init)
    if Path(init).is_file():
        raise ValueError(
            f"init={init!r} is a file; allowed are the folder of a CLIP or of a text encoder, "
            "open_clip:NAME:WEIGHTS and ids on the Hugging Face Hub"
        )
    try:
        return fetch_clip(init)
    except ValueError as error:
        raise ValueError(f"init={init!r} {error}") from error


def _open_clip_text(init: str) -> TextEncoder:
    name, colon, weights = init.removeprefix(OPEN_CLIP).partition(":")
    if not colon or not weights:
        raise ValueError(f"init={init!r} must be open_clip:NAME:WEIGHTS, a model and a tag or file")
    return TextEncoder.from_open_clip(name, weights)


def _clip_config(values: dict[str, Any]) -> CLIPConfig:
    """The configuration of both towers, from a `config.json`."""
    if values.get("model_type") != "clip":
        raise ValueError(
            f"model_type is {short_repr(values.get('model_type'))}; only clip is supported"
        )
    towers = [values.get(key) for key in ("text_config", "vision_config")]
    if not all(isinstance(tower, dict) for tower in towers):
        raise ValueError("text_config and vision_config must both be there")
    text, image = (tower or {} for tower in towers)
    width = values.get("projection_dim")
    if not (type(width) is int and 1 <= width <= MOST_PROJECTED):
        raise ValueError(
            f"projection_dim={short_repr(width)} must be a whole number from 1 to {MOST_PROJECTED}"
        )
    # Each tower's config has the projection's width too, which in old files may differ.
    return CLIPConfig(
        text_config=tower_config(text | {"projection_dim": width}).to_dict(),
        vision_config=image_config(image | {"projection_dim": width}).to_dict(),
        projection_dim=width,
    )


def _bias(values: dict[str, Any]) -> float | None:
    bias = values.get("logit_bias")
    if not (bias is None or (type(bias) is float and abs(bias) <= 1000)):
        raise ValueError(f"logit_bias={short_repr(bias)} must be a number from -1000 to 1000")
    return bias


def _shapes(model: CLIPModel, tokenizer: CLIPTokenizer) -> dict[str, int]:
    text: Any = model.config.text_config
    image: Any = model.config.vision_config
    return {
        "clip.text_width": text.hidden_size,
        "clip.text_layers": text.num_hidden_layers,
        "clip.text_heads": text.num_attention_heads,
        "clip.image_width": image.hidden_size,
        "clip.image_layers": image.num_hidden_layers,
        "clip.image_heads": image.num_attention_heads,
        "clip.patch_size": image.patch_size,
        "clip.projection_dim": text.projection_dim,
        "vocab_size": text.vocab_size,
        "max_tokens": tokenizer.model_max_length,
        "image_size": image.image_size,
    }
