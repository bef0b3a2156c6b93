"""The text encoder: frozen, transformers' numbers, diffusers' tokens, folders that others read."""

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from support.parity import no_warning_logged, same_weights
from support.tiny import transformers_tower
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from latentdiff.formats.weights import load_safetensors, save_safetensors
from latentdiff.models.text import TextEncoder, empty_tower, fill_tower
from latentdiff.tasks.clip.tokenizer import train_tokenizer

TOKENS = 12
STORY = "a red cat on the green hill beside two blue houses under the white moon"
PROMPTS = ["a red cat", "", "A  RED CAT", "三个 红苹果", "the moon 🌕", STORY]


def new_encoder(*, attention_dropout: float = 0.0) -> TextEncoder:
    """Two random layers on the words of `STORY`, each of which is one token."""
    tokenizer = train_tokenizer([STORY], vocab_size=700, length=TOKENS)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=len(tokenizer) - 2,
        eos_token_id=len(tokenizer) - 1,
        pad_token_id=len(tokenizer) - 1,
        attention_dropout=attention_dropout,
        initializer_factor=10.0,
    )
    tower = empty_tower(config.to_dict())
    return TextEncoder(fill_tower(tower, CLIPTextModel(config).state_dict()), tokenizer)


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return new_encoder()


@pytest.fixture
def folder(encoder: TextEncoder, tmp_path: Path) -> Path:
    encoder.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*cut off")
def test_states_equal_diffusers_pipeline_on_the_same_folder(
    encoder: TextEncoder, folder: Path
) -> None:
    """Its tokenisation (padding to the length, truncation) and transformers' last hidden state."""
    with no_warning_logged():
        pipe = StableDiffusionPipeline(
            text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
            tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            vae=None,
            unet=None,
            scheduler=None,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    expected, _ = pipe.encode_prompt(PROMPTS, torch.device("cpu"), 1, False)
    states = encoder(PROMPTS)
    assert states.shape == (len(PROMPTS), TOKENS, encoder.width)
    assert torch.equal(states, expected)
    assert torch.equal(TextEncoder.from_pretrained(folder)(PROMPTS), expected)


@pytest.mark.filterwarnings("ignore:.*cut off")
def test_a_prompt_alone_and_in_company_has_the_same_ids(encoder: TextEncoder) -> None:
    together = encoder.tokenize(PROMPTS)
    assert together.shape == (len(PROMPTS), TOKENS)
    assert torch.equal(together, torch.cat([encoder.tokenize([prompt]) for prompt in PROMPTS]))


def test_a_prompt_that_is_too_long_warns_with_the_words_cut_off(encoder: TextEncoder) -> None:
    with pytest.warns(
        UserWarning, match=r"17 tokens .* reads 12; cut off: 'houses under .* moon'"
    ) as seen:
        states = encoder([STORY, "a cat"])
    assert len(seen) == 1
    kept = STORY.removesuffix(" houses under the white moon")
    assert torch.equal(encoder([kept])[0], states[0])  # which fills all the places, and is quiet


def test_dropping_out_and_gradients_are_off_whatever_a_training_loop_does() -> None:
    encoder = new_encoder(attention_dropout=0.5)
    still = encoder(PROMPTS[:2])
    model = nn.ModuleList([encoder, nn.Dropout()]).train()
    assert model.training
    assert encoder.train(True) is encoder
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    with torch.enable_grad():
        states = encoder(PROMPTS[:2])
    assert torch.equal(states, still)
    assert not states.requires_grad

    encoder.model.train()  # the dropout is there, and would be felt
    assert not torch.equal(encoder(PROMPTS[:2]), still)


def test_thawed_by_a_training_loop_it_still_passes_no_gradient(encoder: TextEncoder) -> None:
    nn.ModuleList([encoder]).requires_grad_(True)
    try:
        assert not encoder(["a red cat"]).requires_grad
    finally:
        encoder.requires_grad_(False)


def test_a_loaded_encoder_is_frozen(folder: Path) -> None:
    loaded = TextEncoder.from_pretrained(folder)
    assert not any(module.training for module in loaded.modules())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_folder_round_trip_is_bit_exact(encoder: TextEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path / "once")
    loaded = TextEncoder.from_pretrained(tmp_path / "once")
    assert same_weights(loaded, encoder)
    assert loaded.tokenizer.get_vocab() == encoder.tokenizer.get_vocab()
    loaded.save_pretrained(tmp_path / "twice")
    for file in (tmp_path / "once").rglob("*.*"):
        if file.name != "tokenizer_config.json":  # which notes that it comes from a folder
            again = tmp_path / "twice" / file.relative_to(tmp_path / "once")
            assert file.read_bytes() == again.read_bytes(), file


def test_weights_have_the_names_of_published_files(encoder: TextEncoder, folder: Path) -> None:
    """Some releases of transformers write a new tower without the prefix.

    Then no other tool finds a single weight in it. Our tower was written so at first.
    """
    names = load_safetensors(folder / "text_encoder/model.safetensors").keys()
    assert {"text_model.embeddings.token_embedding.weight"} < names
    assert all(name.startswith("text_model.") for name in names)


def test_files_with_the_prefix_without_it_and_with_position_ids_are_read(
    encoder: TextEncoder, folder: Path
) -> None:
    path = folder / "text_encoder/model.safetensors"
    tensors = load_safetensors(path)
    published = {**tensors, "text_model.embeddings.position_ids": torch.arange(TOKENS)[None]}
    bare = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    for form in (published, bare):
        save_safetensors(form, path)
        assert same_weights(TextEncoder.from_pretrained(folder), encoder)


def test_half_precision_on_disk_is_float32_in_memory(encoder: TextEncoder, folder: Path) -> None:
    encoder.save_pretrained(folder, dtype=torch.float16)
    stored = load_safetensors(folder / "text_encoder/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    for model in (
        TextEncoder.from_pretrained(folder).model,
        CLIPTextModel.from_pretrained(folder / "text_encoder"),
    ):
        for name, tensor in encoder.model.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor.half().float())


@pytest.mark.parametrize(
    "names",
    [
        ["text_encoder/config.json"],
        ["text_encoder/model.safetensors"],
        ["tokenizer/tokenizer_config.json"],
        ["tokenizer/vocab.json", "tokenizer/tokenizer.json"],
        ["tokenizer/merges.txt", "tokenizer/tokenizer.json"],
    ],
)
def test_a_missing_file_is_named(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).unlink()
    with pytest.raises(ValueError, match=names[0]):
        TextEncoder.from_pretrained(folder)


@pytest.mark.parametrize(
    "names", [["tokenizer.json"], ["vocab.json", "merges.txt"]], ids=["two files", "one file"]
)
def test_a_tokenizer_may_have_either_form(
    encoder: TextEncoder, folder: Path, names: list[str]
) -> None:
    for name in names:
        (folder / "tokenizer" / name).unlink()
    assert torch.equal(TextEncoder.from_pretrained(folder)(["红 cat"]), encoder(["红 cat"]))


def test_weights_that_do_not_fit_are_refused_and_the_first_is_named(
    encoder: TextEncoder, folder: Path
) -> None:
    """transformers alone draws a tensor that is missing at random, and only logs it."""
    path = folder / "text_encoder/model.safetensors"
    tensors = load_safetensors(path)
    name = "encoder.layers.1.mlp.fc1.bias"
    save_safetensors({n: t for n, t in tensors.items() if not n.endswith(name)}, path)
    with pytest.raises(ValueError, match=f"first {name}: missing in the file"):
        TextEncoder.from_pretrained(folder)

    encoder.save_pretrained(folder)
    config = json.loads((folder / "text_encoder/config.json").read_text())
    (folder / "text_encoder/config.json").write_text(json.dumps({**config, "hidden_size": 18}))
    with pytest.raises(ValueError, match=r"first embeddings\.position.*\(12, 16\).*\(12, 18\)"):
        TextEncoder.from_pretrained(folder)


def test_weights_may_be_a_variant_or_shards(encoder: TextEncoder, folder: Path) -> None:
    path = folder / "text_encoder/model.safetensors"
    path.rename(path.with_name("model.fp16.safetensors"))
    assert same_weights(TextEncoder.from_pretrained(folder, variant="fp16"), encoder)
    with pytest.raises(ValueError, match="variants found: fp16"):
        TextEncoder.from_pretrained(folder)
    path.with_name("model.fp16.safetensors").unlink()

    transformers_tower(encoder).save_pretrained(folder / "text_encoder", max_shard_size="20KB")
    assert (folder / "text_encoder/model.safetensors.index.json").is_file()
    assert same_weights(TextEncoder.from_pretrained(folder), encoder)


def test_weights_become_the_dtype_asked_for(encoder: TextEncoder, folder: Path) -> None:
    half = TextEncoder.from_pretrained(folder, dtype=torch.bfloat16)
    assert same_weights(half, copy.deepcopy(encoder).to(torch.bfloat16))
    assert half(["a red cat"]).dtype == torch.bfloat16
    assert torch.isfinite(half.encode("a (red:1.2) cat", weighting=True)).all()


def test_weights_that_are_not_numbers_are_refused(folder: Path) -> None:
    path = folder / "text_encoder/model.safetensors"
    tensors = load_safetensors(path)
    tensors["text_model.final_layer_norm.bias"][3] = torch.nan
    save_safetensors(tensors, path)
    with pytest.raises(ValueError, match=r"final_layer_norm\.bias holds NaN"):
        TextEncoder.from_pretrained(folder)


def test_the_folder_of_a_whole_clip_gives_its_text_tower(
    encoder: TextEncoder, folder: Path
) -> None:
    """Its configuration is under `text_config`, and its weights stand beside the image tower's."""
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=8,
        patch_size=8,
    )
    clip = CLIPModel(
        CLIPConfig(
            text_config=encoder.model.config.to_dict(),
            vision_config=vision.to_dict(),
            projection_dim=4,
        )
    )
    for name, tensor in encoder.model.state_dict().items():
        clip.get_parameter(f"text_model.{name.removeprefix('text_model.')}").data = tensor
    clip.save_pretrained(folder / "text_encoder")
    assert same_weights(TextEncoder.from_pretrained(folder), encoder)
