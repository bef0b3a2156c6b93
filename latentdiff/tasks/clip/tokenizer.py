"""Train a tokenizer on captions: CLIP's lower-case byte-level BPE (Sennrich et al. 2016)."""

import json
from collections.abc import Iterable

from tokenizers import pre_tokenizers, trainers
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def train_tokenizer(captions: Iterable[str], *, vocab_size: int, length: int) -> CLIPTokenizer:
    """Learn a CLIPTokenizer's merges on `captions`; it pads and truncates to `length` tokens.

    The vocabulary has OpenAI's layout: 256 bytes, the same as word endings, merges, start, end. All
    512 byte tokens are in it, although the trainer only keeps those that it saw: so no text of any
    language has an unknown token, which CLIP would read as the end.
    Raises ValueError when `vocab_size` leaves no room for a merge.
    """
    symbols = list(bytes_to_unicode().values())
    base = [*symbols, *(symbol + WORD_END for symbol in symbols)]
    if vocab_size < len(base) + 3:
        raise ValueError(f"vocab_size={vocab_size} must be at least {len(base) + 3}")
    backend = CLIPTokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        # The trainer counts only symbols that it saw; surplus merges are cut off below.
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    learned = json.loads(backend.to_str())["model"]["merges"]
    merges = [tuple(pair) for pair in learned][: vocab_size - len(base) - 2]
    # Two merges can result in the same token, as a + bc and ab + c.
    tokens = dict.fromkeys([*base, *("".join(pair) for pair in merges), START, END])
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,  # pyright: ignore[reportArgumentType] # annotated as text, pairs at run time
        model_max_length=length,
    )
