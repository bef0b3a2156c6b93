"""Says how many captions a tokenizer cuts: training reads no more of one than a prompt holds."""

from collections.abc import Collection, Sequence
from contextlib import suppress

from transformers import PreTrainedTokenizerBase

from latentdiff.data.decode import BadSample

MAX_READ = 2000  # evenly spaced rows whose captions are read, or captions of a stream
SHOWN = 60  # characters of the longest


def some_captions(
    rows: Sequence[Sequence[str]], *, without: Collection[int] = frozenset()
) -> list[str]:
    """Return the captions of up to MAX_READ evenly spaced rows, each once, but of none `without`.

    `without` must be quick to look a row up in.
    """
    chosen = (
        [row for row in range(len(rows)) if row not in without] if without else range(len(rows))
    )
    texts = dict[str, None]()
    for i in range(min(len(chosen), MAX_READ)):
        with suppress(BadSample):  # training reports weights that do not fit
            texts |= dict.fromkeys(rows[chosen[i * len(chosen) // min(len(chosen), MAX_READ)]])
    return list(texts)


def cut_captions(captions: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> str:
    """Say how many of the captions have more tokens than a prompt; "" if none has."""
    length = tokenizer.model_max_length
    counts = [len(ids) for ids in tokenizer(list(captions), verbose=False).input_ids]
    cut = sum(count > length for count in counts)
    if not cut:
        return ""
    longest = captions[counts.index(max(counts))]
    shown = longest if len(longest) <= SHOWN else f"{longest[:SHOWN]}…"
    return (
        f"captions: {cut} of {len(captions)} looked at have more than {length} tokens, of which "
        f"the rest is not trained on; {shown!r} has {max(counts)}"
    )
