"""The initial towers and tokenizer of a CLIP's training: new ones, or those of `init`."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from latentdiff.data.opening import ImageDataset
from latentdiff.models.clip import new_clip
from latentdiff.models.clip_start import Pixels, load_start
from latentdiff.options import value_of
from latentdiff.tasks.clip.config import TrainCLIP
from latentdiff.tasks.clip.tokenizer import train_tokenizer

MAX_CAPTIONED = 200_000  # images of a stream whose captions the tokenizer learns from
# SigLIP (Zhai et al. 2023, section 3.2): so that the many wrong pairs do not overwhelm at first.
SIGMOID_SCALE, SIGMOID_BIAS = math.log(10), -10.0


@dataclass(frozen=True)
class Start:
    """The initial state of a CLIP's training."""

    clip: CLIPModel
    tokenizer: CLIPTokenizer
    scaling: Pixels
    """The normalisation of the image tower's input, from images in [-1, 1]."""


def make_start(config: TrainCLIP, dataset: ImageDataset) -> Start:
    """Initialise or load both towers and the tokenizer.

    Raises ValueError where `init` is no CLIP or has other shapes than the configuration asks for.
    """
    torch.manual_seed(config.loop.seed)
    size = config.data.image_size
    if config.init is None:
        tokenizer = train_tokenizer(
            dataset.some_captions(MAX_CAPTIONED),
            vocab_size=config.vocab_size,
            length=config.max_tokens,
        )
        clip, scaling, bias = new_clip(config.clip, tokenizer, image_size=size), Pixels(), None
    else:
        start = load_start(config.init, config.clip, image_size=size)
        check_shapes(config, start.shapes)
        tokenizer, (clip, scaling, bias) = start.tokenizer, start.towers
    if config.contrastive == "sigmoid":
        if bias is None:
            bias = SIGMOID_BIAS
            clip.logit_scale.data.fill_(SIGMOID_SCALE)
        clip.register_parameter("logit_bias", nn.Parameter(torch.tensor(bias)))
    return Start(clip, tokenizer, scaling)


def check_captions(
    captions: Iterable[Sequence[str]], token_ids: Callable[[list[str]], Tensor]
) -> None:
    """Raise ValueError where all images have the same captions, in the tokens (n, L) that are read.

    Each is then as right as another, and the loss never falls.
    """
    first, example, length = None, "", 0
    for texts in captions:
        ids = token_ids(list(texts))
        found = set(map(tuple, ids.tolist()))
        if first is None:
            first, example, length = found, texts[0], ids.shape[1]
        elif found != first:
            return
    raise ValueError(
        f"the captions of all images are alike in the first {length} tokens, such as {example!r}: "
        "CLIP learns from what tells them apart; check caption_columns and max_tokens"
    )


def check_shapes(config: TrainCLIP, shapes: Mapping[str, int]) -> None:
    """Raise ValueError for an option that asks for other shapes than those of `init`.

    An option with its default value asks for nothing.
    """
    defaults = TrainCLIP()
    for name, shape in shapes.items():
        value, default = value_of(config, name), value_of(defaults, name)
        if value not in (default, shape):
            raise ValueError(
                f"{name}={value} contradicts init={config.init!r}, whose is {shape}: leave it out"
            )
