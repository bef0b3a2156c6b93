"""Weights in brackets, cutting in chunks, and what both do to the states of a text encoder."""

import time
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import TOKENS, tiny_text_encoder

from latentdiff.models.prompts import MAX_WEIGHT, ROUND, SQUARE, parse_weights, weigh
from latentdiff.models.text import TextEncoder, chunk_slices

PLACES = TOKENS - 2
# The tiny tokenizer has a token for each byte: a word of five letters is five tokens.
LONG = "apple bread cream dates eggs flour grape honey"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    torch.manual_seed(0)
    return tiny_text_encoder(tmp_path_factory.mktemp("tokenizer"))


# --- parsing ---


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("", []),
        ("()[] ", [(" ", 1.0)]),
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (r"\(literal\] \\ \a", [("(literal] \\ \\a", 1.0)]),
        ("a ((b)) [c]", [("a ", 1.0), ("b", 1.1 * 1.1), (" ", 1.0), ("c", 1 / 1.1)]),
        ("(word:1.3) (word: .5 )", [("word", 1.3), (" ", 1.0), ("word", 0.5)]),
        ("(at 9:30 sharp:2)(a:b:0)", [("at 9:30 sharp", 2.0), ("a:b", 0.0)]),
        ("(word:big) [word:1.3]", [("word:big", 1.1), (" ", 1.0), ("word:1.3", 1 / 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).)",
            [
                ("a ", 1.0),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
    ],
)
def test_prompts_are_read_as_the_webui_documents(
    prompt: str, pieces: list[tuple[str, float]]
) -> None:
    """The examples of `parse_prompt_attention`, with its last bracket closed, and the edges."""
    found = parse_weights(prompt)
    assert [text for text, _ in found] == [text for text, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


def written(pieces: list[tuple[str, float]]) -> str:
    """The prompt that says these texts and weights."""
    prompt = ""
    for text, weight in pieces:
        plain = "".join("\\" + letter if letter in "()[]\\" else letter for letter in text)
        prompt += plain if weight == 1 else f"({plain}:{weight!r})"
    return prompt


texts = st.text(st.sampled_from(r"ab 1.:()[]\é雪") | st.characters(), min_size=1, max_size=12)
weights = st.sampled_from([0.0, 0.5, 1.0, 1.1, 1e-5, 10.0]) | st.floats(0, MAX_WEIGHT)


@settings(deadline=None)
@given(st.lists(st.tuples(texts, weights), max_size=8))
def test_what_is_written_is_read_again(pieces: list[tuple[str, float]]) -> None:
    apart = [piece for i, piece in enumerate(pieces) if i == 0 or piece[1] != pieces[i - 1][1]]
    assert parse_weights(written(apart)) == apart


@settings(deadline=None)
@given(st.text(st.sampled_from(r"ab 1.5:()[]\,") | st.characters(), max_size=40))
def test_any_text_is_read_or_refused(prompt: str) -> None:
    try:
        pieces = parse_weights(prompt)
    except ValueError:
        assert set(prompt) & set("()[]")
        return
    assert all(text and 0 <= weight <= MAX_WEIGHT for text, weight in pieces)
    assert all(before[1] != after[1] for before, after in pairwise(pieces))
    assert "".join(text for text, _ in pieces) in {prompt} or set(prompt) & set("()[]\\")


@settings(deadline=None)
@given(st.text(max_size=40))
def test_text_without_brackets_is_itself(prompt: str) -> None:
    plain = prompt.translate(str.maketrans("", "", "()[]\\"))
    assert parse_weights(plain) == ([(plain, 1.0)] if plain else [])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a (b", r"the \( at character 3, in 'a \(b', has no bracket"),
        ("a [b (c) d", r"the \[ at character 3"),
        ("a) b", r"the \) at character 2, .* write \\\) for a plain one"),
        ("(a]", r"the \] at character 3"),
        ("[a:1.2)", r"the \) at character 7"),
        ("(a:-1)", r"the weight '-1' in '\(a:-1\)' must be a number from 0 to 10"),
        (
            f"{'x' * 40} (a long word:12) {'y' * 40}",
            r"the weight '12' in '\(a long word:12\)' must",
        ),
        (f"{'x' * 40}(word:1.2{'y' * 40}", r"41, in '…x{20}\(word:1\.2y{12}…', has no"),
        ("(a:11)", "the weight '11'"),
        ("(a:1e400)", "the weight '1e400'"),
        ("(a:nan)", "the weight 'nan'"),
        ("(a:1.2.3)", "the weight '1.2.3'"),
        ("(time 12:30)", r"write \\\( and \\\) for plain brackets"),
        ("(a (b:5) c:3)", "around 'b' give it the weight 15; it must be from 0 to 10"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_place(prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_weights(prompt)


@pytest.mark.parametrize("prompt", ["[a" * 50_000 + "]" * 50_000, "(" * 200_000, ":1" * 100_000])
def test_hostile_prompts_take_linear_time(prompt: str) -> None:
    """A prompt may come out of an image from anywhere."""
    began = time.perf_counter()
    if prompt.startswith("(("):
        with pytest.raises(ValueError, match="has no bracket"):
            parse_weights(prompt)
    else:
        assert parse_weights(prompt)
    assert time.perf_counter() - began < 5


# --- cutting ---


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=60), st.integers(1, 9))
def test_chunks_are_all_tokens_and_cut_a_word_only_where_they_must(
    ends: list[bool], size: int
) -> None:
    chunks = [list(range(len(ends)))[place] for place in chunk_slices(ends, size=size)]
    assert [token for chunk in chunks for token in chunk] == list(range(len(ends)))
    assert all(len(chunk) <= size for chunk in chunks)
    assert all(chunks) or not ends
    for chunk, after in pairwise(chunks):
        if ends[chunk[-1]]:  # greedy: the next word would not have fitted in
            word = next((i + 1 for i, token in enumerate(after) if ends[token]), len(after))
            assert len(chunk) + word > size or word == len(after)
        else:  # one word, longer than the chunk
            assert len(chunk) == size
            assert not any(ends[token] for token in chunk)


# --- states ---


def chunk_texts(encoder: TextEncoder, prompt: str) -> list[str]:
    return [
        encoder.tokenizer.decode(tokens) for tokens, _ in encoder._chunks(prompt, weighting=False)
    ]


def test_a_short_prompt_has_the_states_of_training(encoder: TextEncoder) -> None:
    for prompt in ["", "apple", "ein Ei", "(a)"]:
        assert encoder.count_chunks(prompt) == 1
        assert torch.equal(encoder.encode(prompt), encoder([prompt]))


def test_a_long_prompt_is_read_whole_in_chunks_of_whole_words(encoder: TextEncoder) -> None:
    texts = ["apple bread", "cream dates", "eggs flour", "grape honey"]
    assert chunk_texts(encoder, LONG) == texts
    assert encoder.count_chunks(LONG) == 4
    states = encoder.encode(LONG, chunks=4)
    assert states.shape == (1, 4 * TOKENS, encoder.width)
    assert torch.equal(states, torch.cat([encoder([text]) for text in texts], dim=1))


@settings(deadline=None)
@given(prompt=st.text(max_size=80))
def test_no_token_of_a_prompt_is_lost(encoder: TextEncoder, prompt: str) -> None:
    chunks = encoder._chunks(prompt, weighting=False)
    assert len(chunks) == encoder.count_chunks(prompt)
    assert all(len(tokens) <= PLACES for tokens, _ in chunks)
    whole = encoder.tokenizer(prompt, verbose=False).input_ids[1:-1]
    assert [token for tokens, _ in chunks for token in tokens] == whole


def test_empty_chunks_fill_up(encoder: TextEncoder) -> None:
    empty = encoder([""])
    assert torch.equal(encoder.encode("", chunks=3), empty.repeat(1, 3, 1))
    states = encoder.encode("apple", chunks=2)
    assert torch.equal(states, torch.cat([encoder(["apple"]), empty], dim=1))


def test_too_few_chunks_are_refused_and_never_cut(encoder: TextEncoder) -> None:
    with pytest.raises(ValueError, match=r"chunks=1 is too few .* needs 4"):
        encoder.encode(LONG)


def test_a_change_in_one_chunk_changes_no_other(encoder: TextEncoder) -> None:
    changed = encoder.encode(LONG.replace("honey", "hippo"), chunks=4)
    same = (changed == encoder.encode(LONG, chunks=4)).all(dim=2)[0]
    assert same[: 3 * TOKENS].all()
    assert not same[3 * TOKENS :].all()


def test_brackets_are_text_unless_weights_are_asked_for(encoder: TextEncoder) -> None:
    assert torch.equal(encoder.encode("(a:2)"), encoder(["(a:2)"]))
    assert not torch.equal(encoder.encode("(a:2)", weighting=True), encoder(["(a:2)"]))
    assert torch.equal(encoder.encode(r"\(a:2\)", weighting=True), encoder(["(a:2)"]))


@pytest.mark.parametrize(
    ("prompt", "plain"),
    [
        ("a cat", "a cat"),
        ("(a:1) cat", "a cat"),
        ("((a:1.0) c:1)(at:1)", "a cat"),
        (LONG, LONG),
        (f"({LONG}:1)", LONG),
        ("(:1)", ""),
    ],
)
def test_weight_one_changes_no_bit(encoder: TextEncoder, prompt: str, plain: str) -> None:
    chunks = encoder.count_chunks(plain)
    assert encoder.count_chunks(prompt, weighting=True) == chunks
    weighted = encoder.encode(prompt, chunks=chunks, weighting=True)
    assert torch.equal(weighted, encoder.encode(plain, chunks=chunks))


def test_weighting_a_word_changes_its_own_states_alone(encoder: TextEncoder) -> None:
    """Its tokens are places 7 to 11, behind the start and "apple" in the second chunk."""
    prompt = "apple bread cream (dates:1.4) eggs flour"
    plain = encoder.encode("apple bread cream dates eggs flour", chunks=3)
    same = (encoder.encode(prompt, chunks=3, weighting=True) == plain).all(dim=2)[0]
    first = TOKENS + 1 + len("cream")
    assert (~same).nonzero().flatten().tolist() == list(range(first, first + len("dates")))


def test_states_are_linear_in_the_weight_from_the_empty_prompt_on(encoder: TextEncoder) -> None:
    """ComfyUI's rule: empty + weight * (state - empty)."""
    at = {
        weight: encoder.encode(f"a (cat:{weight})", weighting=True)[:, 2:5]
        for weight in (0, 0.3, 1, 1.7, 10)
    }
    empty, plain = encoder([""])[:, 2:5], encoder(["a cat"])[:, 2:5]
    assert torch.equal(at[0], empty)
    assert torch.equal(at[1], plain)
    for weight, states in at.items():
        torch.testing.assert_close(states, empty + weight * (plain - empty))
    assert torch.equal(
        encoder.encode("a ((cat)) [dog]", weighting=True),
        encoder.encode(f"a (cat:{ROUND * ROUND!r}) (dog:{SQUARE!r})", weighting=True),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_keep_the_precision_of_the_states(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    states, empty = torch.randn(2, 1, 4, 8, generator=generator).to(dtype)
    moved = weigh(states, empty, [1.0, 1.0, 0.0, 1.5])
    assert moved.dtype == dtype
    assert torch.equal(moved[:, :2], states[:, :2])
    assert torch.equal(moved[:, 2], empty[:, 2])
    exact = empty.double() + 1.5 * (states.double() - empty.double())
    torch.testing.assert_close(moved[:, 3].double(), exact[:, 3], atol=0.05, rtol=0.02)
