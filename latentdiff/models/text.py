"""The frozen text encoder: transformers' CLIP text tower with its tokenizer.

Shapes: B prompts, L tokens (the tokenizer's `model_max_length`), D width.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer


class TextEncoder(nn.Module):
    """Prompts -> the last hidden states that the UNet attends to; never trained, always in eval mode."""

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
        whole = self.tokenizer(list(prompts)).input_ids
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

        Raises ValueError when one of them is missing.
        """
        folder = Path(folder)
        for part in ("text_encoder/config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"):
            if not (folder / part).is_file():
                raise ValueError(f"{folder} holds no text encoder: {part} is missing")
        model = CLIPTextModel.from_pretrained(
            folder / "text_encoder", use_safetensors=True, dtype=torch.float32
        )
        return cls(model, CLIPTokenizer.from_pretrained(folder / "tokenizer"))

    def save_pretrained(self, folder: Path | str, *, dtype: torch.dtype | None = None) -> None:
        """Write `text_encoder/` and `tokenizer/` as transformers and diffusers read them."""
        folder = Path(folder)
        state = {name: tensor.to(dtype=dtype) for name, tensor in self.model.state_dict().items()}
        self.model.save_pretrained(folder / "text_encoder", state_dict=state)
        save_tokenizer(self.tokenizer, folder / "tokenizer")


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Write a tokenizer with `vocab.json` and `merges.txt`, which older tools read it from."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))
