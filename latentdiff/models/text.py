"""The frozen text encoder: CLIP's text tower with its tokenizer.

Shapes: B prompts, L tokens (the tokenizer's `model_max_length`), D width.
"""

import copy
import functools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from latentdiff.formats import open_clip
from latentdiff.formats.clip_tokenizer import clip_tokenizer
from latentdiff.formats.ldm.keys import TEXT_MODEL
from latentdiff.formats.sharded_weights import load_weights
from latentdiff.formats.weights import (
    load_json,
    load_safetensors,
    save_safetensors,
    to_write,
)
from latentdiff.models.clip_text import CLIPText
from latentdiff.models.prompts import parse_weights, weigh
from latentdiff.models.text_config import load_tokenizer, tower_config


class TextEncoder(nn.Module):
    """Prompts -> last hidden states, which the UNet attends to; frozen, always in eval mode."""

    def __init__(self, model: CLIPText, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.tokenizer = tokenizer
        # SD 2.x pads with "!". transformers then reads each "!" of a prompt as padding, which the
        # tower was not trained on and no tool but diffusers does (diffusers issue 4153).
        self._pads_with_word = tokenizer.pad_token_id != tokenizer.eos_token_id
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever a training loop asks of the modules it holds."""
        return super().train(False)

    @property
    def width(self) -> int:
        """D, the UNet's `cross_attention_dim`."""
        return self.model.config.hidden_size

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (B, L), padded to L; a prompt that is too long is truncated, with a warning."""
        length = self.tokenizer.model_max_length
        ids = self.token_ids(prompts)
        untruncated = self.tokenizer(
            list(prompts), verbose=False, split_special_tokens=self._pads_with_word
        ).input_ids
        for prompt, tokens in zip(prompts, untruncated, strict=True):
            if len(tokens) > length:
                lost = self.tokenizer.decode(tokens[length - 1 : -1])
                warnings.warn(
                    f"the prompt {prompt!r} has {len(tokens)} tokens and the text encoder reads "
                    f"{length}; cut off: {lost!r}",
                    stacklevel=3,
                )
        return ids

    def token_ids(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (B, L) as `tokenize` has them, truncated without a warning: for training."""
        return self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
            split_special_tokens=self._pads_with_word,
        ).input_ids

    @torch.no_grad()
    def forward(self, prompts: str | Sequence[str]) -> Tensor:
        """Prompts (B strings) -> context (B, L, D); a long one is truncated, with a warning."""
        return self.states(self.tokenize([prompts] if isinstance(prompts, str) else prompts))

    def count_chunks(self, prompt: str, *, weighting: bool = False) -> int:
        """The number of chunks of L tokens in which `encode` reads the full prompt; 1 or more.

        Raises ValueError for brackets that `weighting` cannot read.
        """
        return len(self._chunks(prompt, weighting=weighting))

    @torch.no_grad()
    def encode(self, prompt: str, *, chunks: int = 1, weighting: bool = False) -> Tensor:
        """A prompt of any length -> context (1, chunks * L, D); nothing is truncated.

        The prompt's tokens go through the tower in chunks of L - 2, each with its own start, end
        and padding and each alone, and the states are joined along the tokens; empty chunks follow
        up to `chunks`. This is how the webui and ComfyUI read long prompts; `chunk_slices` says
        where a chunk ends. weighting: read brackets as weights, see `prompts.parse_weights` and
        `prompts.weigh`; otherwise they are text. A prompt of one chunk has `forward`'s states.
        Raises ValueError when the prompt needs more chunks, and for brackets that can't be read.
        """
        contents = self._chunks(prompt, weighting=weighting)
        if len(contents) > chunks:
            raise ValueError(
                f"chunks={chunks} is too few for the prompt {prompt!r}, which needs {len(contents)}"
            )
        states = []
        for tokens, weights in contents:
            chunk = self.states(self._padded(tokens))
            if any(weight != 1 for weight in weights):
                rest = self.tokenizer.model_max_length - 1 - len(weights)
                empty = self.states(self._padded([]))
                chunk = weigh(chunk, empty, [1.0, *weights, *[1.0] * rest])
            states.append(chunk)
        padding = [self.states(self._padded([]))] * (chunks - len(contents))
        return torch.cat([*states, *padding], dim=1)  # (1, chunks * L, D)

    def encode_together(self, *texts: Sequence[str], weighting: bool = False) -> list[list[Tensor]]:
        """The contexts (1, L, D) of all texts, as they are nested; equal texts are encoded once.

        texts: lists with one text for each image, such as prompts and negative prompts. All texts
        of an image have equally long contexts: L is one chunk of tokens or several.
        """
        encode = functools.cache(functools.partial(self.encode, weighting=weighting))
        count = functools.partial(self.count_chunks, weighting=weighting)
        chunks = [max(map(count, of_image)) for of_image in zip(*texts, strict=True)]
        return [[encode(text, chunks=n) for text, n in zip(t, chunks, strict=True)] for t in texts]

    def _chunks(self, prompt: str, *, weighting: bool) -> list[tuple[list[int], list[float]]]:
        """The tokens of each chunk, without start, end and padding, with their weights."""
        tokens: list[int] = []
        weights: list[float] = []
        for text, weight in parse_weights(prompt) if weighting else [(prompt, 1.0)]:
            ids = self.tokenizer(
                text,
                add_special_tokens=False,
                verbose=False,
                split_special_tokens=self._pads_with_word,
            ).input_ids
            tokens += ids
            weights += [weight] * len(ids)
        ends = [
            word.endswith("</w>")  # CLIP's mark of the last token of a word
            for word in self.tokenizer.convert_ids_to_tokens(tokens)
        ]
        chunks = chunk_slices(ends, size=self.tokenizer.model_max_length - 2)
        return [(tokens[chunk], weights[chunk]) for chunk in chunks]

    def _padded(self, tokens: Sequence[int]) -> Tensor:
        """Token ids (1, L): start, the tokens, end, padding."""
        tokenizer = self.tokenizer
        ids = [tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id]
        rest = tokenizer.model_max_length - len(ids)
        return torch.tensor([[*ids, *[tokenizer.pad_token_id] * rest]])

    @torch.no_grad()
    def states(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> context (B, L, D)."""
        return self.model(ids.to(self.model.final_layer_norm.weight.device))

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        variant: str | None = None,
        dtype: torch.dtype | None = torch.float32,
    ) -> Self:
        """Read `text_encoder/` and `tokenizer/` of a folder; weights become `dtype` one by one.

        dtype: None leaves them as they are in the file.
        variant: which weights, such as "fp16". Raises ValueError when a file is missing,
        the configuration is not that of a CLIP text tower, the weights are not those of the
        configuration or hold NaN, or the tokenizer is not for this tower.
        """
        folder = Path(folder)
        files = ["text_encoder/config.json", "tokenizer/tokenizer_config.json"]
        if not (folder / "tokenizer/tokenizer.json").is_file():  # the other form of the same
            files += ["tokenizer/vocab.json", "tokenizer/merges.txt"]
        for file in files:
            if not (folder / file).is_file():
                raise ValueError(f"{folder} holds no text encoder: {file} is missing")
        path = folder / "text_encoder/config.json"
        values = load_json(path)
        try:
            model = empty_tower(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        tensors = load_weights(
            folder / "text_encoder",
            "model",
            variant=variant,
            expected=model.state_dict(),
            optional=_is_ignored,
            rename=lambda name: name.removeprefix(TEXT_MODEL),
            dtype=dtype,
        )
        tokenizer = load_tokenizer(folder / "tokenizer", model.config)
        return cls(fill_tower(model, tensors), tokenizer)

    @classmethod
    def from_open_clip(
        cls,
        name: str,
        weights: Path | str,
        *,
        layers: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Load the text tower of an open_clip model, such as ("ViT-H-14", "laion2b_s32b_b79k").

        weights: a safetensors file, of the text tower or the whole CLIP, or a tag of open_clip's.
        layers: how many blocks to keep, from the first; SD 2.x keeps 23 of ViT-H-14's 24.
        Needs open_clip (`pip install latentdiff[train]`). Raises ValueError for a tower that
        a CLIPTextModel cannot express and for weights that are not this tower's.
        """
        model = empty_tower(open_clip.text_config(name, layers=layers))
        tensors = load_safetensors(
            open_clip.find_weights(name, weights),
            expected=open_clip.from_transformers(model.state_dict()),
            optional=functools.partial(open_clip.beside, layers=layers),
            rename=open_clip.without_prefix,
            dtype=dtype,
        )
        tokenizer = clip_tokenizer(model.config.max_position_embeddings, pad_token="!")
        return cls(fill_tower(model, open_clip.to_transformers(tensors)), tokenizer)

    def save_pretrained(self, folder: Path | str, *, dtype: torch.dtype | None = None) -> None:
        """Write `text_encoder/` and `tokenizer/` as transformers and diffusers read them.

        Raises ValueError, before anything is written, for weights that are not finite or too large
        for `dtype`.
        """
        path = Path(folder) / "text_encoder" / "model.safetensors"
        state = self.model.state_dict()  # without the prefix that files have
        tensors = to_write({TEXT_MODEL + n: tensor for n, tensor in state.items()}, path, dtype)
        config = copy.deepcopy(self.model.config)
        config.architectures = ["CLIPTextModel"]
        config.dtype = torch.float32  # what to compute in, whatever the file holds
        config.save_pretrained(path.parent)
        save_safetensors(tensors, path)
        save_tokenizer(self.tokenizer, Path(folder) / "tokenizer")


def chunk_slices(word_ends: Sequence[bool], *, size: int) -> list[slice]:
    """The slices of the tokens' chunks, each of at most `size`; together they are all the tokens.

    word_ends: whether a word ends with each token. A chunk is as long as it can be without
    splitting a word; a word that is longer than a full chunk is split where the chunk is full.
    (The webui goes back to the last comma instead, where one is near.)
    No tokens give one empty chunk.
    """
    assert size >= 1
    chunks, start = [], 0
    while len(word_ends) - start > size:
        stop = full = start + size
        while stop > start and not word_ends[stop - 1]:
            stop -= 1
        stop = full if stop == start else stop
        chunks.append(slice(start, stop))
        start = stop
    return [*chunks, slice(start, len(word_ends))]


def empty_tower(values: Mapping[str, Any]) -> CLIPText:
    """A tower on the meta device, which takes no memory, for the configuration of a config.json.

    Raises ValueError as `tower_config` does.
    """
    config = tower_config(values)
    with torch.device("meta"):
        return CLIPText(config)


def fill_tower(model: CLIPText, tensors: Mapping[str, Tensor]) -> CLIPText:
    """Assign tensors to a tower, without a copy; names may begin with `text_model.`.

    Raises ValueError when one is missing or has another shape; tensors that the tower does not
    have, such as the projection of a complete CLIP, are ignored.
    """
    bare_tensors = _without_prefix(tensors)
    state = {}
    for name, tensor in model.state_dict().items():
        if name not in bare_tensors or bare_tensors[name].shape != tensor.shape:
            shape = tuple(bare_tensors[name].shape) if name in bare_tensors else "missing"
            raise ValueError(f"the text encoder's {name} is {shape}, not {tuple(tensor.shape)}")
        state[name] = bare_tensors[name]
    model.load_state_dict(state, assign=True)
    return model


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(TEXT_MODEL): tensor for name, tensor in tensors.items()}


def _is_ignored(name: str) -> bool:
    """Whether a tensor is one that old files hold, or part of a complete CLIP."""
    return name == "embeddings.position_ids" or name.startswith(
        ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
    )


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write a tokenizer with `vocab.json` and `merges.txt`, which older tools read it from."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))
