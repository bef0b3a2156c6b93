"""open_clip's text towers as ours: names both ways, the same numbers, the rest refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import _build_text_tower
from open_clip.tokenizer import SimpleTokenizer
from support.interchange_table import Measured
from support.parity import same_weights
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from latentdiff.formats.open_clip import (
    find_weights,
    from_transformers,
    text_config,
    to_transformers,
)
from latentdiff.formats.weights import save_safetensors
from latentdiff.models.text import TextEncoder, empty_tower, fill_tower
from latentdiff.models.text_config import tower_config

SIMPLE = SimpleTokenizer()
PROMPTS = ["", "a photo of a cat!", "red & blue; it's 12 o'clock", "三个 苹果 🌕", "word " * 90]
TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 8, "patch_size": 8, "width": 8, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 16, "width": 32, "heads": 4, "layers": 3},
}
# What open_clip can build and CLIPTextModel too; each differs from the others in what it computes.
VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "tiny-quickgelu": {"quick_gelu": True},
    "tiny-custom": {"custom_text": True},
    "tiny-tanh": {
        "text_cfg": {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}}
    },
    "tiny-wide": {"text_cfg": {"mlp_ratio": 2.5, "heads": 8, "context_length": 77}},
}
REFUSED: dict[str, dict[str, Any]] = {
    "no_causal_mask": {"no_causal_mask": True},
    "embed_cls": {"embed_cls": True},
    "ls_init_value": {"ls_init_value": 0.1},
    "qk_norm": {"qk_norm": True},
    "scale_fc": {"scale_fc": True},
    "vocab_size": {"vocab_size": 500},
    "act_kwargs": {"act_kwargs": {"approximate": "sometimes"}},
    "norm_kwargs": {"norm_kwargs": {"elementwise_affine": False}},
}


@pytest.fixture(scope="module", autouse=True)
def configurations(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tiny models among those that open_clip knows by name."""
    folder = tmp_path_factory.mktemp("open_clip")
    refused = {f"refused-{name}": {"text_cfg": change} for name, change in REFUSED.items()}
    for name, change in (VARIANTS | refused).items():
        text = TINY["text_cfg"] | change.get("text_cfg", {})
        config = TINY | change | {"text_cfg": text}
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


@torch.no_grad()
def random_tower(name: str, *, seed: int = 0) -> nn.Module:
    """open_clip's text tower of a model by name, with random numbers in norms and biases too."""
    torch.manual_seed(seed)
    config = open_clip.get_model_config(name)
    assert config is not None
    tower = _build_text_tower(
        config["embed_dim"], config["text_cfg"], config.get("quick_gelu", False)
    )
    for key, parameter in tower.named_parameters():
        if parameter.ndim == 1:
            parameter += 0.1 * torch.randn_like(parameter)
        elif "embedding" in key:
            parameter *= 20  # to the size of trained ones: the tokens must be seen in the states
    return tower.eval()


@torch.no_grad()
def theirs(tower: nn.Module, ids: Tensor, *, layers: int | None = None) -> dict[str, Tensor]:
    """States behind the final norm, and the projected state of the last token."""
    keep = len(tower.transformer.resblocks) if layers is None else layers
    found = tower.forward_intermediates(
        ids, indices=[keep - 1], normalize_intermediates=True, output_fmt="NLC"
    )
    return {"states": found["text_intermediates"][0], "text features": found["text_features"]}


@torch.no_grad()
def ours(encoder: TextEncoder, projection: Tensor, ids: Tensor) -> dict[str, Tensor]:
    states = encoder.model(ids)
    pooled = states[torch.arange(len(ids)), ids.argmax(dim=1)]  # at the end of each text
    return {"states": states, "text features": pooled @ projection}


def encoder_of(tower: nn.Module, name: str, folder: Path, **options: Any) -> TextEncoder:
    save_safetensors(tower.state_dict(), folder / "tower.safetensors")
    return TextEncoder.from_open_clip(name, folder / "tower.safetensors", **options)


def check_parity(name: str, folder: Path, measured: Measured) -> None:
    """States and logits, with differences relative to the largest number."""
    tower = random_tower(name)
    encoder = encoder_of(tower, name, folder)
    length = encoder.tokenizer.model_max_length
    ids = SIMPLE(PROMPTS, context_length=length)
    expected = theirs(tower, ids)
    with pytest.warns(UserWarning, match="cut off"):
        assert torch.equal(encoder.tokenize(PROMPTS), ids)
    found = ours(encoder, tower.text_projection, ids)
    for key, tensor in expected.items():
        difference = float((found[key] - tensor).abs().max() / tensor.abs().max())
        shape = "small towers" if name in VARIANTS else name
        measured("open_clip tower", "read", "open_clip", f"{key}, {shape}", difference)
        assert difference < 1e-5
    similarity = nn.functional.cosine_similarity(
        expected["text features"][0], expected["text features"][1:]
    )
    assert (similarity < 0.99).all()  # the prompts differ, so equality says something
    assert torch.equal(encoder([PROMPTS[1]]), encoder.encode(PROMPTS[1]))


@pytest.mark.parametrize("name", VARIANTS)
def test_states_and_logits_are_open_clips(name: str, tmp_path: Path, measured: Measured) -> None:
    check_parity(name, tmp_path, measured)


@pytest.mark.full_size
@pytest.mark.parametrize(
    "name",
    [
        "ViT-B-32",
        "ViT-B-32-quickgelu",
        "ViT-L-14",
        "RN50",
        "RN50x4-quickgelu",
        "ViT-S-16-alt",
        "EVA02-B-16",
        "PE-Core-T-16-384",
        "convnext_base_w",
    ],
)
def test_states_and_logits_of_published_shapes_are_open_clips(
    name: str, tmp_path: Path, measured: Measured
) -> None:
    check_parity(name, tmp_path, measured)


@pytest.mark.full_size
@pytest.mark.parametrize("layers", [None, 2])
def test_vit_h_of_fewer_layers_is_open_clips(
    layers: int | None, tmp_path: Path, measured: Measured
) -> None:
    """SD 2.x's tower at full width, cut to three blocks of which it keeps two: 0.4 GB."""
    config = open_clip.get_model_config("ViT-H-14")
    assert config is not None
    config["text_cfg"]["layers"] = 3
    (tmp_path / "ViT-H-14-short.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "ViT-H-14-short.json")
    tower = random_tower("ViT-H-14-short")
    encoder = encoder_of(tower, "ViT-H-14-short", tmp_path, layers=layers)
    ids = SIMPLE(PROMPTS)
    expected = theirs(tower, ids, layers=layers)
    found = ours(encoder, tower.text_projection, ids)
    difference = float(
        (found["states"] - expected["states"]).abs().max() / expected["states"].abs().max()
    )
    blocks = "3 blocks" if layers is None else f"{layers} of 3 blocks"
    measured("open_clip tower", "read", "open_clip", f"states, ViT-H-14 with {blocks}", difference)
    assert difference < 1e-5
    assert len(encoder.model.encoder.layers) == (3 if layers is None else layers)


def test_the_penultimate_layer_is_the_last_of_a_tower_with_one_block_less(tmp_path: Path) -> None:
    """As SD 2.x reads ViT-H-14: its final norm stands behind block 23 of 24."""
    tower = random_tower("tiny")
    ids = SIMPLE(PROMPTS, context_length=16)
    encoder = encoder_of(tower, "tiny", tmp_path, layers=2)
    found = ours(encoder, tower.text_projection, ids)["states"]
    torch.testing.assert_close(found, theirs(tower, ids, layers=2)["states"])
    assert encoder.model.config.num_hidden_layers == 2
    for layers in (0, 4):
        with pytest.raises(ValueError, match=f"layers={layers} must be from 1 to 3"):
            encoder_of(tower, "tiny", tmp_path, layers=layers)


def test_sd2s_tower_is_the_configuration_of_its_folder() -> None:
    """What SD 2.1's text_encoder/config.json says of the numbers that are computed."""
    config = text_config("ViT-H-14", layers=23)
    published = {
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 77,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
        "vocab_size": 49408,
    }
    assert config | published == config
    assert text_config("ViT-L-14-quickgelu")["hidden_act"] == "quick_gelu"
    assert text_config("ViT-B-16-quickgelu", layers=11)["num_hidden_layers"] == 11


# --- names ---


@pytest.mark.parametrize("name", VARIANTS)
def test_names_go_there_and_back_bit_for_bit(name: str) -> None:
    tensors = random_tower(name).state_dict()
    there = to_transformers(tensors)
    back = from_transformers(there)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())
    with_projection = CLIPTextModelWithProjection(tower_config(text_config(name)))
    missing = with_projection.load_state_dict(there, strict=False)
    assert there.keys() >= {key for key in there if key.startswith("text_model.")}
    assert not missing.unexpected_keys
    assert missing.missing_keys in ([], ["text_projection.weight"])


def test_the_text_tower_is_found_in_a_whole_clip_of_either_form(tmp_path: Path) -> None:
    for name in ("tiny", "tiny-custom"):
        torch.manual_seed(0)
        clip = open_clip.create_model(name)
        tensors = clip.state_dict()
        assert any(key.startswith("visual.") for key in tensors)
        assert any(key.startswith("text.") for key in tensors) == (name == "tiny-custom")
        whole = encoder_of(clip, name, tmp_path)
        same = fill_tower(empty_tower(text_config(name)), to_transformers(tensors))
        assert same_weights(whole.model, same)
        ids = SIMPLE(PROMPTS[:3], context_length=16)
        projection = (clip.text if name == "tiny-custom" else clip).text_projection
        torch.testing.assert_close(
            ours(whole, projection, ids)["text features"], clip.encode_text(ids).detach()
        )


def test_another_activation_or_norm_would_be_seen(tmp_path: Path) -> None:
    """The difference that parity at 1e-5 rules out: the same weights read as another model's."""
    ids = SIMPLE(PROMPTS, context_length=16)
    tower = random_tower("tiny")
    for name in ("tiny-quickgelu", "tiny-tanh"):
        found = ours(encoder_of(tower, name, tmp_path), tower.text_projection, ids)["states"]
        assert (found - theirs(tower, ids)["states"]).abs().max() > 1e-4


def test_weights_become_the_dtype_asked_for(tmp_path: Path) -> None:
    tower = random_tower("tiny").half()
    for dtype in (torch.float32, torch.float16):
        encoder = encoder_of(tower, "tiny", tmp_path, dtype=dtype)
        expected = {name: t.to(dtype) for name, t in to_transformers(tower.state_dict()).items()}
        model = fill_tower(empty_tower(text_config("tiny")), expected)
        assert same_weights(encoder.model, model)


def test_blocks_are_dropped_from_the_end(tmp_path: Path) -> None:
    tensors = random_tower("tiny").state_dict()
    whole, less = to_transformers(tensors), to_transformers(tensors, layers=2)
    gone = whole.keys() - less.keys()
    assert gone == {key for key in whole if ".layers.2." in key}
    with pytest.raises(ValueError, match="layers=4 must be from 1 to 3"):
        to_transformers(tensors, layers=4)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("transformer.resblocks.0.ls_1.gamma", (32,)),
        ("transformer.embeddings.word_embeddings.weight", (9, 32)),
        ("cls_emb", (32,)),
        ("text_projection.bias", (24,)),
        ("text_projection", (24,)),
        ("transformer.resblocks.0.attn.in_proj_weight", ()),
        ("transformer.resblocks.0.attn.in_proj_bias", (97,)),
        ("ln_post.weight", (32,)),
        ("transformer.resblocks.01.ln_1.bias", (32,)),
        ("text.ln_final.bias", (32,)),
    ],
)
def test_a_tensor_that_has_no_place_is_refused(name: str, shape: tuple[int, ...]) -> None:
    tensors = random_tower("tiny").state_dict() | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=r"has no place|must hold q, k and v|is there twice"):
        to_transformers(tensors)


def test_a_tower_of_transformers_with_a_hole_or_more_is_refused() -> None:
    tensors = to_transformers(random_tower("tiny").state_dict())
    ids = {"text_model.embeddings.position_ids": torch.arange(16)[None]}  # in old files
    assert from_transformers(tensors | ids).keys() == from_transformers(tensors).keys()
    with pytest.raises(ValueError, match="has no place"):
        from_transformers(tensors | {"vision_model.post_layernorm.bias": torch.zeros(3)})
    del tensors["text_model.encoder.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(ValueError, match=r"resblocks\.1\.attn\.in_proj_bias needs q, k and v"):
        from_transformers(tensors)


# --- towers and weights that are refused ---


@pytest.mark.parametrize("field", REFUSED)
def test_a_tower_that_clip_text_model_cannot_express_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"refused-{field} has {field}=.* cannot express; only"):
        text_config(f"refused-{field}")


def test_every_model_of_open_clip_is_expressed_or_refused() -> None:
    expressed, refusals = [], []
    for name in open_clip.list_models():
        if name.startswith(("tiny", "refused")):
            continue
        try:
            tower_config(text_config(name))
            expressed.append(name)
        except ValueError as error:
            refusals.append(str(error))
    assert all("cannot express" in refusal for refusal in refusals)
    assert {"ViT-H-14", "ViT-bigG-14", "RN50", "ViT-L-14-quickgelu"} <= set(expressed)
    refused = ("SigLIP", "roberta", "coca", "mt5", "nllb", "worldwide", "CLIPA", "MobileCLIP-S")
    assert not [name for name in expressed if any(word in name for word in refused)]
    assert len(expressed) > 80


def test_unknown_models_and_weights_of_others_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model 'ViT-H14'; near it: ViT-H-14"):
        TextEncoder.from_open_clip("ViT-H14", tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        TextEncoder.from_open_clip("tiny", tmp_path / "none.safetensors")
    tower = random_tower("tiny")
    with pytest.raises(ValueError, match=r"does not fit .*positional_embedding: \(16, 32\)"):
        encoder_of(tower, "tiny-wide", tmp_path)
    tensors = tower.state_dict()
    tensors["ln_final.bias"][0] = torch.nan
    save_safetensors(tensors, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match=r"ln_final\.bias holds NaN"):
        TextEncoder.from_open_clip("tiny", tmp_path / "nan.safetensors")
    torch.save(tower.state_dict(), tmp_path / "tower.pt")
    with pytest.raises(ValueError, match="latentdiff convert --unsafe_pickle"):
        TextEncoder.from_open_clip("tiny", tmp_path / "tower.pt")


# --- tags ---


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Offline, with a cache of one repository, and tags of the tiny model."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    tags = {
        "cached": {"hf_hub": "somebody/tiny/"},
        "named": {"hf_hub": "somebody/tiny/other.bin"},
        "absent": {"hf_hub": "nobody/tiny/"},
        "quick": {"hf_hub": "somebody/tiny/", "quick_gelu": True},
        "pickled": {"url": "https://example.com/tiny.pt", "hf_hub": ""},
    }
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", tags)
    repository = tmp_path / "models--somebody--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    return snapshot


def test_a_tags_weights_come_from_the_cache_when_offline(hub: Path) -> None:
    tensors = random_tower("tiny").state_dict()
    save_safetensors(tensors, hub / "open_clip_model.safetensors")
    (hub / "other.safetensors").touch()  # as the repository's file is called in safetensors
    assert find_weights("tiny", "named") == hub / "other.safetensors"
    encoder = TextEncoder.from_open_clip("tiny", "cached")
    assert same_weights(
        encoder.model, fill_tower(empty_tower(text_config("tiny")), to_transformers(tensors))
    )


def test_tags_that_give_no_weights_of_this_tower_are_refused(hub: Path) -> None:
    for tag, message in {
        "absent": "nobody/tiny .* is out of reach, and open_clip_model.safetensors is not in the",
        "quick": "trained with quick_gelu, which tiny has not; the model with it is tiny-quickgelu",
        "pickled": r"tiny\.pt: is a pickled .* `latentdiff convert --unsafe_pickle`",
        "unknown": "'unknown' is no file and no tag of tiny; its tags: cached, named, absent",
    }.items():
        with pytest.raises(ValueError, match=message):
            TextEncoder.from_open_clip("tiny", tag)
