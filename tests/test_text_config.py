"""A text encoder's configuration and tokenizer from anyone: loaded as they are, or refused."""

import json
import math
import random
import resource
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.parity import same_weights
from support.tiny import TOKENS, tiny_text_encoder, tiny_tokenizer
from transformers import CLIPTextConfig

from latentdiff.models.text import TextEncoder, empty_tower, fill_tower
from latentdiff.models.text_config import load_tokenizer, tower_config

SD15 = {
    "architectures": ["CLIPTextModel"],
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_text_encoder(tmp_path / "scratch").save_pretrained(tmp_path)
    return tmp_path


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_published_keys_are_read_as_transformers_reads_them() -> None:
    ours, theirs = tower_config(SD15), CLIPTextConfig(**SD15)
    for key in CLIPTextConfig().to_dict():
        if key not in ("architectures", "dtype", "transformers_version"):
            assert getattr(ours, key, None) == getattr(theirs, key, None), key


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "t5"),
        ("model_type", ["clip_text_model"]),
        ("hidden_size", 0),
        ("hidden_size", -768),
        ("hidden_size", 768.0),
        ("hidden_size", "768"),
        ("hidden_size", True),
        ("hidden_size", None),
        ("hidden_size", [768]),
        ("hidden_size", 2**40),
        ("intermediate_size", 10**30),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", 0),
        ("max_position_embeddings", 10**12),
        ("vocab_size", 10**12),
        ("projection_dim", "a lot"),
        ("eos_token_id", [1, 2]),
        ("eos_token_id", None),
        ("bos_token_id", -1),
        ("layer_norm_eps", "small"),
        ("layer_norm_eps", math.nan),
        ("layer_norm_eps", -1.0),
        ("initializer_factor", math.inf),
        ("hidden_act", "exec"),
        ("hidden_act", 3),
        ("hidden_act", ["gelu", {}]),
    ],
)
def test_a_wrong_value_is_refused_in_a_sentence_that_names_it(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{key}=") as error:
        tower_config({**SD15, key: value})
    assert "\n" not in str(error.value)


def test_the_width_must_be_shared_out_evenly() -> None:
    with pytest.raises(
        ValueError, match=r"hidden_size=768 must be divisible by num_attention_h.*=7"
    ):
        tower_config({**SD15, "num_attention_heads": 7})
    with pytest.raises(
        ValueError, match=r"hidden_size=100 must be divisible by num_attention_h.*=8"
    ):
        tower_config({"hidden_size": 100})  # 8 by transformers' default


def test_keys_that_choose_code_never_reach_transformers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention kernels come from the Hub, by name; quantizers and remote code are asked for."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    before = TextEncoder.from_pretrained(folder)
    change(
        folder / "text_encoder/config.json",
        _attn_implementation="nobody/kernel",
        _attn_implementation_internal="nobody/kernel",
        attn_implementation="nobody/kernel",
        auto_map={"AutoModel": "canary.Model"},
        quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True},
        tie_word_embeddings="yes",
        text_config={"hidden_size": 1},
    )
    change(
        folder / "tokenizer/tokenizer_config.json",
        auto_map={"AutoTokenizer": ["canary.Tokenizer", None]},
        tokenizer_class="CanaryTokenizer",
    )
    (folder / "text_encoder/canary.py").write_text("raise AssertionError('it ran')")
    (folder / "tokenizer/canary.py").write_text("raise AssertionError('it ran')")
    after = TextEncoder.from_pretrained(folder)
    assert same_weights(after, before)
    assert torch.equal(after(["a cat"]), before(["a cat"]))


@pytest.mark.full_size
def test_the_largest_tower_allowed_is_built_without_memory() -> None:
    began, peak = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    largest = {
        "hidden_size": 2**15,
        "intermediate_size": 2**17,
        "num_hidden_layers": 2**8,
        "num_attention_heads": 2**10,
        "max_position_embeddings": 2**16,
        "vocab_size": 2**24,
    }
    tower = empty_tower(largest)
    assert sum(tensor.numel() for tensor in tower.state_dict().values()) > 10**12
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000  # kB
    assert time.perf_counter() - began < 10


def test_filling_a_tower_takes_the_tensors_themselves_and_refuses_others() -> None:
    config = {"hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1, "vocab_size": 9}
    config |= {"num_hidden_layers": 1, "max_position_embeddings": 5}
    names = empty_tower(config).state_dict()
    tensors = {f"text_model.{name}": torch.randn(t.shape) for name, t in names.items()}
    tower = fill_tower(empty_tower(config), {**tensors, "text_projection.weight": torch.ones(2)})
    for name, tensor in tower.state_dict().items():
        assert tensor.data_ptr() == tensors[f"text_model.{name}"].data_ptr()
    assert not any(tensor.is_meta for tensor in tower.buffers())
    assert torch.isfinite(tower(torch.tensor([[1, 2, 3]]))).all()

    name = "text_model.final_layer_norm.bias"
    with pytest.raises(ValueError, match=r"final_layer_norm\.bias is \(3,\), not \(4,\)"):
        fill_tower(empty_tower(config), {**tensors, name: torch.ones(3)})
    del tensors[name]
    with pytest.raises(ValueError, match=r"final_layer_norm\.bias is missing"):
        fill_tower(empty_tower(config), tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_max_length": TOKENS + 1}, f"model_max_length={TOKENS + 1} must be from 3 to"),
        ({"model_max_length": 2}, "model_max_length=2 "),
        ({"model_max_length": "12"}, "model_max_length='12'|holds no CLIP tokenizer"),
        ({"pad_token": "<never seen>"}, "is beyond the text encoder's vocab_size=514"),
        ({"eos_token": 5}, "holds no CLIP tokenizer|no eos_token"),
    ],
)
def test_a_tokenizer_for_another_tower_is_refused(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    change(folder / "tokenizer/tokenizer_config.json", **changes)
    with pytest.raises(ValueError, match=message) as error:
        TextEncoder.from_pretrained(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [1e30, int(1e30), 10**30, None, "absent"])
def test_a_tokenizer_without_a_limit_has_the_towers(folder: Path, length: Any) -> None:
    """transformers writes 1e30 where nobody set a limit; such a model was refused."""
    before = TextEncoder.from_pretrained(folder)
    path = folder / "tokenizer/tokenizer_config.json"
    change(path, model_max_length=length)
    if length == "absent":
        values = json.loads(path.read_text())
        del values["model_max_length"]
        path.write_text(json.dumps(values))
    after = TextEncoder.from_pretrained(folder)
    assert after.tokenizer.model_max_length == TOKENS
    prompts = ["a cat", "a cat, and much more than is read"]
    assert torch.equal(after.token_ids(prompts), before.token_ids(prompts))
    after.save_pretrained(folder / "again")
    written = json.loads((folder / "again/tokenizer/tokenizer_config.json").read_text())
    assert written["model_max_length"] == TOKENS


@pytest.mark.parametrize("key", ["bos_token_id", "pad_token_id"])
def test_tokens_that_the_tower_does_not_look_for_may_be_null(key: str) -> None:
    assert tower_config(SD15 | {key: None}).eos_token_id == SD15["eos_token_id"]


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_loaded_or_refused(folder: Path, file: str) -> None:
    """Bytes changed, dropped and doubled; whatever tokenizers then raises, it is one sentence."""
    tokenizer, config = folder / "tokenizer", tower_config({"max_position_embeddings": 77})
    if file == "vocab.json":
        (tokenizer / "tokenizer.json").unlink()
    whole = (tokenizer / file).read_bytes()
    generator = random.Random(0)
    refusals = []
    for _ in range(60):
        place = generator.randrange(len(whole))
        form = generator.randrange(3)
        new = [bytes([generator.randrange(256)]), b"", whole[place : place + 9] * 2][form]
        (tokenizer / file).write_bytes(whole[:place] + new + whole[place + 1 :])
        try:
            load_tokenizer(tokenizer, config)
        except ValueError as error:
            refusals.append(str(error))
    assert refusals
    assert not any("\n" in sentence for sentence in refusals)


def test_a_tokenizer_beyond_the_vocabulary_is_refused(folder: Path) -> None:
    """Its tokens would be read outside the table, which a GPU does without a word."""
    tokenizer = tiny_tokenizer(folder / "scratch")
    tokenizer.add_tokens(["<my-cat>"])
    tokenizer.save_pretrained(folder / "tokenizer")
    with pytest.raises(ValueError, match="token 514 is beyond the text encoder's vocab_size=514"):
        TextEncoder.from_pretrained(folder)
