"""The tokenizer that we train: CLIP's files and layout, and tokens for any text whatever."""

import json
import random
import shutil
import unicodedata
from pathlib import Path

import pytest
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from latentdiff.data.caption_lengths import MAX_READ, cut_captions, some_captions
from latentdiff.models.text import save_tokenizer
from latentdiff.tasks.clip.tokenizer import train_tokenizer

CAPTIONS = ["a red cat", "a red hat", "two red cats' hats", "三个红苹果", "红心 ❤️", "été à Zürich"]
WORD_END = "</w>"
BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}
LENGTH = 16


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return train_tokenizer(CAPTIONS, vocab_size=600, length=LENGTH)


def any_text(draw: random.Random) -> str:
    """Up to 20 characters of any script, composed or not, emoji with joiners, spaces, controls."""
    blocks = [
        (0x20, 0x7E),
        (0x00, 0x10FFFF),
        (0x4E00, 0x9FFF),
        (0x0300, 0x036F),  # combining marks
        (0x1F300, 0x1FAFF),  # emoji
        (0x1F1E6, 0x1F1FF),  # the letters of flags
        (0x0590, 0x06FF),  # Hebrew, Arabic
        (0xFE0E, 0xFE0F),  # text or emoji
        (0x200B, 0x200F),  # joiners, directions
        (0xE000, 0xF8FF),  # private use
    ]
    code_points = [draw.randint(*draw.choice(blocks)) for _ in range(draw.randint(0, 20))]
    return "".join(chr(c) for c in code_points if not 0xD800 <= c <= 0xDFFF)  # no surrogates


TEXTS = [any_text(random.Random(seed)) for seed in range(300)] + [
    *CAPTIONS,
    "",
    " \t\n",
    "👩🏽‍🚀 👨‍👩‍👧‍👦 🇨🇳 #️⃣",
    "Ⅷ ﬁ ½ ㍿ İstanbul ΣΊΣΥΦΟΣ straße",
    "\0\x1c\x85\ufeff\ufffe",
    "<|startoftext",
]


def as_bytes(tokenizer: CLIPTokenizer, ids: list[int]) -> bytes:
    """What the tokens spell, a space after each word."""
    spelled = "".join(tokenizer.convert_ids_to_tokens(ids))
    words = spelled.split(WORD_END)
    return b" ".join(bytes(BYTES[letter] for letter in word) for word in words)


def test_every_text_is_spelled_by_its_tokens_without_an_unknown_one(
    tokenizer: CLIPTokenizer,
) -> None:
    """CLIP's unknown token is its end: one in the middle would end the text for the tower."""
    start, end = len(tokenizer) - 2, len(tokenizer) - 1
    normal = tokenizer.backend_tokenizer.normalizer
    assert normal is not None
    for text in TEXTS:
        first, *ids, last = tokenizer(text).input_ids
        assert (first, last) == (start, end)
        assert not {start, end} & set(ids), repr(text)
        expected = "".join(normal.normalize_str(text).split(" ")).encode()
        assert as_bytes(tokenizer, ids).replace(b" ", b"") == expected, repr(text)


def test_composed_and_decomposed_letters_are_the_same_and_so_are_capitals(
    tokenizer: CLIPTokenizer,
) -> None:
    for text in (*CAPTIONS, "Ångström"):
        ids = tokenizer(text).input_ids
        assert tokenizer(unicodedata.normalize("NFD", text)).input_ids == ids
        assert tokenizer(unicodedata.normalize("NFC", text)).input_ids == ids
        assert tokenizer(text.upper()).input_ids == ids
        assert tokenizer(f"  {text.replace(' ', '   ')} ").input_ids == ids


@pytest.mark.parametrize("vocab_size", [515, 530, 600, 5000])
@pytest.mark.parametrize("captions", [CAPTIONS, [], ["aaaaaaaaaaaaaaaaaa aaa aaaaaaaaa"]])
def test_the_vocabulary_is_laid_out_as_openai_s(captions: list[str], vocab_size: int) -> None:
    """256 bytes, the same ending a word, a token for each merge in order, start, end; no holes."""
    tokenizer = train_tokenizer(captions, vocab_size=vocab_size, length=LENGTH)
    ids = tokenizer.get_vocab()
    assert len(tokenizer) == len(ids) <= vocab_size
    assert sorted(ids.values()) == list(range(len(ids)))
    tokens = sorted(ids, key=ids.__getitem__)
    letters = list(bytes_to_unicode().values())
    assert tokens[:512] == letters + [letter + WORD_END for letter in letters]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert tokens[512:-2] == ["".join(pair) for pair in merges]
    assert tokens[-2:] == ["<|startoftext|>", "<|endoftext|>"]
    assert tokenizer.bos_token_id == len(ids) - 2
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == len(ids) - 1


def test_merges_are_learned_the_most_frequent_first_until_words_are_one_token() -> None:
    full = train_tokenizer(CAPTIONS, vocab_size=5000, length=LENGTH)
    assert full.tokenize("red cat 三个红苹果 zürich") == [
        token + WORD_END for token in ("red", "cat", spelled("三个红苹果"), spelled("zürich"))
    ]
    lengths = [
        len(train_tokenizer(CAPTIONS, vocab_size=size, length=200).tokenize(" ".join(CAPTIONS)))
        for size in (515, 525, 540, 5000)
    ]
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) == len(lengths)


def spelled(text: str) -> str:
    letters = bytes_to_unicode()
    return "".join(letters[byte] for byte in text.encode())


def test_the_same_captions_give_the_same_tokenizer(tokenizer: CLIPTokenizer) -> None:
    again = train_tokenizer(iter(CAPTIONS), vocab_size=600, length=LENGTH)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


@pytest.mark.parametrize(
    "names", [["vocab.json", "merges.txt"], ["tokenizer.json"]], ids=["two files", "one file"]
)
def test_the_files_reload_to_identical_ids(
    tokenizer: CLIPTokenizer, tmp_path: Path, names: list[str]
) -> None:
    save_tokenizer(tokenizer, tmp_path / "all")
    (tmp_path / "some").mkdir()
    for name in (*names, "tokenizer_config.json"):
        shutil.copy(tmp_path / "all" / name, tmp_path / "some" / name)
    loaded = CLIPTokenizer.from_pretrained(tmp_path / "some")
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.model_max_length == LENGTH
    assert loaded(TEXTS).input_ids == tokenizer(TEXTS).input_ids


def test_vocab_and_merges_alone_have_the_form_of_openai_s(
    tokenizer: CLIPTokenizer, tmp_path: Path
) -> None:
    save_tokenizer(tokenizer, tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert vocabulary == tokenizer.get_vocab()
    header, *merges = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert header.startswith("#version")
    assert [merge.replace(" ", "") for merge in merges] == [
        token for token, i in sorted(vocabulary.items(), key=lambda item: item[1])
    ][512:-2]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXTS).input_ids == tokenizer(TEXTS).input_ids


def test_padding_and_truncation_keep_the_length_the_beginning_and_the_end(
    tokenizer: CLIPTokenizer,
) -> None:
    end = tokenizer.eos_token_id
    fitted = tokenizer(
        TEXTS, padding="max_length", truncation=True, max_length=tokenizer.model_max_length
    ).input_ids
    for text, ids, whole in zip(TEXTS, fitted, tokenizer(TEXTS).input_ids, strict=True):
        assert len(ids) == LENGTH, text
        if len(whole) <= LENGTH:
            assert ids == whole + [end] * (LENGTH - len(whole))
        else:
            assert ids == [*whole[: LENGTH - 1], end]


def test_a_vocabulary_without_room_for_a_merge_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size=514 must be at least 515"):
        train_tokenizer(CAPTIONS, vocab_size=514, length=LENGTH)


def test_captions_that_are_cut_are_counted(tokenizer: CLIPTokenizer) -> None:
    """Training reads LENGTH tokens of a caption, and nobody was told of the rest."""
    long = "a red cat " * 30
    rows = [["a red cat"], [], [long, long, "two red cats' hats"]]
    captions = some_captions(rows)
    assert captions == ["a red cat", long, "two red cats' hats"]
    count = len(tokenizer(long).input_ids)
    assert count > LENGTH
    sentence = cut_captions(captions, tokenizer)
    assert sentence.startswith("captions: 1 of 3 looked at have more than 16 tokens")
    assert sentence.endswith(f"{long[:60] + '…'!r} has {count}")
    assert cut_captions(captions[::2], tokenizer) == ""
    full = "red " * (LENGTH - 2)
    assert cut_captions([full], tokenizer) == "" != cut_captions([full + "cat"], tokenizer)
    assert len(some_captions([[str(i)] for i in range(5000)])) == MAX_READ
    assert some_captions([["a"], ["b"], ["c"]], without={1}) == ["a", "c"]
