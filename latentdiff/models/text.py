"""The frozen text encoder: transformers' CLIP text tower with its tokenizer.

Shapes: B prompts, L tokens (the tokenizer's `model_max_length`), D width.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from latentdiff.formats.weights import load_safetensors, save_safetensors
from latentdiff.models.config import check_fit

# Begins every name in published files. The modules of transformers have it in some releases and
# not in others, and those that do not have it write files that other tools cannot read.
PREFIX = "text_model."


class TextEncoder(nn.Module):
    """Prompts -> the last hidden states, which the UNet attends to; frozen, always in eval mode."""

    def __init__(self, model: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.tokenizer = tokenizer
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever a training loop asks of the modules it holds."""
        return super().train(False)

    @property
    def width(self) -> int:
        """D, the UNet's `cross_attention_dim`."""
        return self.model.config.hidden_size

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Token ids (B, L), padded to L; warns with the words that were cut off a long prompt."""
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        ).input_ids  # (B, L)
        whole = self.tokenizer(list(prompts), verbose=False).input_ids
        for prompt, tokens in zip(prompts, whole, strict=True):
            if len(tokens) > length:
                cut = self.tokenizer.decode(tokens[length - 1 : -1])
                warnings.warn(
                    f"the prompt {prompt!r} has {len(tokens)} tokens and the text encoder reads "
                    f"{length}; cut off: {cut!r}",
                    stacklevel=3,
                )
        return ids

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Prompts (B strings) -> context (B, L, D)."""
        ids = self.tokenize(prompts).to(self.model.device)
        return self.model(input_ids=ids).last_hidden_state

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Self:
        """Read `text_encoder/` and `tokenizer/` of a folder, in float32.

        Raises ValueError when a file is missing or the weights are not those of the configuration.
        """
        folder = Path(folder)
        parts = ["text_encoder/config.json", "tokenizer/tokenizer_config.json"]
        if not (folder / "tokenizer/tokenizer.json").is_file():  # the other form of the same
            parts += ["tokenizer/vocab.json", "tokenizer/merges.txt"]
        for part in parts:
            if not (folder / part).is_file():
                raise ValueError(f"{folder} holds no text encoder: {part} is missing")
        # transformers would draw what is missing at random.
        path = folder / "text_encoder" / "model.safetensors"
        found = _without_prefix(load_safetensors(path))
        with torch.device("meta"):
            empty = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
        expected = _without_prefix(empty.state_dict())
        # Old files hold position_ids besides, which transformers passes over.
        check_fit(path, expected=expected, found={n: t for n, t in found.items() if n in expected})
        model = CLIPTextModel.from_pretrained(
            folder / "text_encoder", use_safetensors=True, dtype=torch.float32
        )
        return cls(model, CLIPTokenizer.from_pretrained(folder / "tokenizer"))

    def save_pretrained(self, folder: Path | str, *, dtype: torch.dtype | None = None) -> None:
        """Write `text_encoder/` and `tokenizer/` as transformers and diffusers read them."""
        folder = Path(folder)
        config = copy.deepcopy(self.model.config)
        config.architectures = ["CLIPTextModel"]
        config.dtype = torch.float32  # what to compute in, whatever the file holds
        config.save_pretrained(folder / "text_encoder")
        state = _without_prefix(self.model.state_dict())
        tensors = {PREFIX + name: tensor.to("cpu", dtype) for name, tensor in state.items()}
        save_safetensors(tensors, folder / "text_encoder" / "model.safetensors")
        save_tokenizer(self.tokenizer, folder / "tokenizer")


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write a tokenizer with `vocab.json` and `merges.txt`, which older tools read it from."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))
