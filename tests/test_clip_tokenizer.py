"""CLIP's tokenizer from the package's own file: its ids, and a single file that holds none."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from support.tiny import tiny_pipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from latentdiff.formats import hub
from latentdiff.formats.clip_tokenizer import MERGES, VOCAB_SIZE, clip_tokenizer
from latentdiff.formats.ldm.compatibility import is_clip_tokenizer
from latentdiff.formats.single_file import read_single_file
from latentdiff.models.clip_text import CLIPText
from latentdiff.models.single_file_networks import networks_from_single_file
from latentdiff.models.text import TextEncoder

KNOWN = {  # as published with CLIP and Stable Diffusion
    "a photo of a cat": [49406, 320, 1125, 539, 320, 2368, 49407],
    "hello world": [49406, 3306, 1002, 49407],
}
TEXTS = (
    "",
    "A photo, of 3 Café's!",
    "it's  12 o'clock",
    "猫",
    "naïve 🌕",
    "<|endoftext|>",
    "x" * 99,
)


def test_the_merges_are_clips_and_its_licence_is_beside_them() -> None:
    with gzip.open(MERGES, "rt", encoding="utf-8") as file:
        assert is_clip_tokenizer(file.read())
    notice = (MERGES.parent / "NOTICE").read_text()
    assert "Copyright (c) 2021 OpenAI" in notice
    assert "Permission is hereby granted" in notice


def test_known_texts_have_their_published_ids() -> None:
    tokenizer = clip_tokenizer(77)
    assert len(tokenizer) == VOCAB_SIZE
    for text, ids in KNOWN.items():
        assert tokenizer(text).input_ids == ids


def test_its_ids_are_those_of_transformers_tokenizer_of_that_vocabulary(tmp_path: Path) -> None:
    """From the two files in which transformers' users have it."""
    merges = gzip.decompress(MERGES.read_bytes()).decode()
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += ["".join(line.split()) for line in merges.splitlines()]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    theirs, ours = CLIPTokenizer.from_pretrained(tmp_path, model_max_length=77), clip_tokenizer(77)
    options = {"padding": "max_length", "truncation": True}
    for text in (*KNOWN, *TEXTS):
        assert ours(text, **options).input_ids == theirs(text, **options).input_ids


def test_a_single_file_without_a_tokenizer_is_read_without_a_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a stranger's SD 1.5 file, offline, the tokenizer could not be fetched."""
    pipe = tiny_pipeline(tmp_path / "tokens")
    tower = CLIPTextConfig(
        hidden_size=pipe.text_encoder.width,
        intermediate_size=8,
        num_attention_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=77,
    )
    pipe.text_encoder = TextEncoder(CLIPText(tower), clip_tokenizer(77))
    pipe.save_single_file(tmp_path / "model.safetensors")
    file = read_single_file(tmp_path / "model.safetensors")
    file.tokenizer = None
    monkeypatch.setattr(hub, "_snapshot", lambda *_: pytest.fail("the hub was asked"))
    *_, read = networks_from_single_file(file)
    assert torch.equal(read(list(TEXTS)), pipe.text_encoder(list(TEXTS)))
    file.text_config["vocab_size"] = 1000
    file.text_encoder = CLIPTextModel(CLIPTextConfig(**file.text_config)).state_dict()
    with pytest.raises(
        ValueError, match=r"CLIP's tokenizer, as the file holds none .*: token 49407"
    ):
        networks_from_single_file(file)
