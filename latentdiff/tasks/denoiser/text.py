"""The captions of a step: token ids, or states of a frozen text encoder that are kept in memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentdiff.data.caption_table import CaptionTable, CaptionTokens
from latentdiff.models.text import TextEncoder
from latentdiff.training.randomness import choose
from latentdiff.training.run import Run

MAX_KEPT = 1000
"""Images of a data set, and captions, up to which the states of all captions are kept."""
BATCH = 32


class StepCaptions:
    """One caption of each example of a batch, or the empty one, as the network gets it."""

    def __init__(
        self, captions: Sequence[list[str]], text_encoder: TextEncoder, run: Run, *, frozen: bool
    ) -> None:
        """With `in_memory` all captions are tokenised here. `frozen`: the text encoder is not
        trained; if captions are few, all of them are encoded here."""
        self.text_encoder, self.device = text_encoder, run.device
        self.tokens = self.states = None
        if run.config.compute.in_memory:
            self.tokens = CaptionTokens(CaptionTable(captions), text_encoder.token_ids)
            run.accelerator.print(f"in memory: {self.tokens.summary()}")
        if frozen and len(captions) <= MAX_KEPT:
            table = CaptionTable(captions) if self.tokens is None else self.tokens.table
            if len(table.texts) <= MAX_KEPT:
                self.numbers = {text: number for number, text in enumerate(table.texts)}
                with run.accelerator.autocast():
                    self.states = self._all_states(table.texts)

    def _all_states(self, texts: Sequence[str]) -> Tensor:
        parts = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
        states = [self.text_encoder.states(self.text_encoder.token_ids(part)) for part in parts]
        return torch.cat(states)

    def prepare(self, batch: dict[str, Any], u: Tensor, dropped: np.ndarray) -> Tensor:
        """What `context` needs of each example, on the host: token ids (b, L), or a number (b,).

        `batch` has captions, or rows of the tokens in memory. u (b,) in [0, 1) chooses the caption,
        and where `dropped` (b,) is true it is "".
        """
        if self.tokens is not None and self.states is None:
            return self.tokens(batch["rows"], u, empty=dropped)
        if self.tokens is not None:
            numbers = self.tokens.table.choose(batch["rows"], u)
            numbers[dropped] = 0
            return torch.from_numpy(numbers)
        chosen = choose(batch["captions"], u.tolist())
        texts = ["" if drop else text for text, drop in zip(chosen, dropped.tolist(), strict=True)]
        if self.states is None:
            return self.text_encoder.token_ids(texts)
        return torch.tensor([self.numbers[text] for text in texts])

    def context(self, prepared: Tensor) -> Tensor:
        """The text states (b, L, D) of what `prepare` made, on the device."""
        if self.states is None:
            return self.text_encoder.states(prepared)
        return self.states[prepared]
