"""open_clip's tokens from a tokenizer of transformers': the same of any clean text, and padding."""

import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer, basic_clean
from transformers import CLIPTextConfig, CLIPTokenizer

from latentdiff.formats.clip_tokenizer import clip_tokenizer
from latentdiff.models.clip_text import CLIPText
from latentdiff.models.text import TextEncoder

SIMPLE = SimpleTokenizer(context_length=16)
# Left out: characters newer than one of the tables of Unicode, and the two that Python's lower()
# treats by what stands around them, as tokenizers does not.
LETTERS = st.characters(exclude_categories=("Cs", "Cn"), exclude_characters="Σ\u0345")


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    tower = CLIPTextConfig(
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=16,
    )
    return TextEncoder(CLIPText(tower), clip_tokenizer(16, pad_token="!"))


def test_tokens_and_padding_are_open_clips(encoder: TextEncoder) -> None:
    """Text as people write it, which cleaning leaves as it is; "!" is a word and not padding."""
    assert encoder.tokenizer.pad_token_id == 0
    for prompt in (
        "hello! world",
        "WOW!!!",
        "!",
        "it's  12 o'clock",
        "naïve café",
        "<|endoftext|>",
    ):
        assert torch.equal(encoder.tokenize([prompt]), SIMPLE([prompt])), prompt
        assert torch.equal(encoder.encode(prompt), encoder([prompt]))


@settings(deadline=None)
@given(text=st.text(LETTERS | st.sampled_from("abAB12 '’!.,&;<>é雪🌕\n\u200b"), max_size=60))
def test_any_clean_text_has_open_clips_tokens(encoder: TextEncoder, text: str) -> None:
    clean = basic_clean(text)
    assume("<start_of_text>" not in clean and "<end_of_text>" not in clean)
    assume("\u0345" not in clean)  # which ftfy makes of the mojibake "Í\x85"
    # Whether these are letters depends on the year of each library's Unicode.
    assume(all(unicodedata.category(letter) != "Cn" for letter in clean))
    tokens = [token for chunk, _ in encoder._chunks(clean, weighting=False) for token in chunk]
    assert tokens == SIMPLE.encode(text)


def test_tokens_are_the_same_after_a_folder(encoder: TextEncoder, tmp_path: Path) -> None:
    """transformers alone reads every "!" as padding then, and so does diffusers with SD 2.x."""
    encoder.save_pretrained(tmp_path)
    loaded = TextEncoder.from_pretrained(tmp_path)
    for prompt in ("", "hello! world", "a !! b"):
        assert torch.equal(loaded([prompt]), encoder([prompt]))
        assert torch.equal(loaded.encode(prompt), encoder.encode(prompt))
    plain = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert plain("!!").input_ids[1:-1] == [0, 0]
    assert (
        loaded.tokenize(["!!"])[0, 1:3].tolist() == SIMPLE(["!!"])[0, 1:3].tolist() == [748, 49407]
    )
