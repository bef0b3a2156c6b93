"""New CLIPs to train from scratch (Radford et al. 2021), as transformers' `CLIPModel`."""

from dataclasses import dataclass
from typing import Any

from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig


@dataclass(frozen=True)
class CLIPSize:
    """The shapes of both towers; the text tower's width is the UNet's `cross_attention_dim`."""

    text_width: int = 256
    text_layers: int = 3
    text_heads: int = 4
    image_width: int = 192
    image_layers: int = 4
    image_heads: int = 4
    patch_size: int = 8
    projection_dim: int = 128
    """Width of the space in which captions and images are compared."""


def new_clip(
    size: CLIPSize,
    tokenizer: CLIPTokenizer,
    *,
    image_size: int,
    text: CLIPTextConfig | None = None,
) -> CLIPModel:
    """Randomly initialised towers for the tokenizer's vocabulary and images of `image_size`.

    text: the text tower's configuration, in place of the one that follows from `size`. Raises
    ValueError when the patches do not tile the image.
    """
    if image_size % size.patch_size:
        raise ValueError(
            f"image_size={image_size} must be divisible by patch_size={size.patch_size}"
        )
    if text is None:
        ids = tokenizer.get_vocab()
        text = text_config(
            size,
            vocab_size=len(tokenizer),
            max_tokens=tokenizer.model_max_length,
            bos_token_id=ids[str(tokenizer.bos_token)],
            eos_token_id=ids[str(tokenizer.eos_token)],
            pad_token_id=ids[str(tokenizer.pad_token)],
        )
    vision = CLIPVisionConfig(
        hidden_size=size.image_width,
        intermediate_size=4 * size.image_width,
        projection_dim=size.projection_dim,
        num_hidden_layers=size.image_layers,
        num_attention_heads=size.image_heads,
        image_size=image_size,
        patch_size=size.patch_size,
    )
    config = CLIPConfig(
        text_config=text.to_dict() | {"projection_dim": size.projection_dim},
        vision_config=vision.to_dict(),
        projection_dim=size.projection_dim,
    )
    return CLIPModel(config)


def text_config(
    size: CLIPSize, *, vocab_size: int, max_tokens: int, **special_ids: Any
) -> CLIPTextConfig:
    """The text tower's configuration, for a vocabulary and captions of so many tokens."""
    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=size.text_width,
        intermediate_size=4 * size.text_width,
        projection_dim=size.projection_dim,
        num_hidden_layers=size.text_layers,
        num_attention_heads=size.text_heads,
        max_position_embeddings=max_tokens,
        **special_ids,
    )
