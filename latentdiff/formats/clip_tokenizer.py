"""CLIP's own tokenizer (Radford et al. 2021), from the merges that this package brings along.

SD 1.x and 2.x share it, and no single file of theirs holds it. Its licence is beside the file.
"""

import gzip
from pathlib import Path

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

MERGES = Path(__file__).parents[1] / "pretrained" / "clip_tokenizer" / "merges.txt.gz"
VOCAB_SIZE = 49408
START, END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(length: int, *, pad_token: str = END) -> CLIPTokenizer:
    """CLIP's tokenizer of 49,408 tokens; it pads and truncates to `length`.

    It splits text as open_clip's `SimpleTokenizer` does, but does not clean it first (ftfy, HTML's
    `&amp;`), knows no `<start_of_text>`, and a capital sigma that ends a word becomes σ, not ς.
    """
    with gzip.open(MERGES, "rt", encoding="utf-8") as file:
        merges = [tuple(line.split()) for line in file]
    symbols = list(bytes_to_unicode().values())
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(m) for m in merges)]
    words += [START, END]
    assert len(set(words)) == VOCAB_SIZE
    return CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)},
        merges=merges,  # pyright: ignore[reportArgumentType] # annotated as text, pairs at run time
        pad_token=pad_token,
        model_max_length=length,
    )
