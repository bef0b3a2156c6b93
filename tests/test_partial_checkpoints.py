"""Single files with less, or other names, than a whole checkpoint: opened where that is right."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.ldm import checkpoint
from support.tiny import tiny_tokenizer
from torch import Tensor

from latentdiff.formats.ldm.keys import UNET, VAE
from latentdiff.formats.single_file import read_single_file
from latentdiff.formats.weights import save_safetensors
from latentdiff.models.unet import UNetConfig
from latentdiff.models.vae import VAEConfig
from latentdiff.pipeline import Pipeline

pytestmark = pytest.mark.filterwarnings("ignore:.*assumed:UserWarning")

UNET_CONFIG = UNetConfig(
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=64,
)
VAE_CONFIG = VAEConfig(block_out_channels=(32, 64), layers_per_block=2)
WORDS = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
TOWER = "cond_stage_model."
DRAWING = {"steps": 2, "seed": 3, "height": 32, "width": 32, "progress": False}


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    tensors = checkpoint(UNET_CONFIG, VAE_CONFIG) | {WORDS: torch.randn(514, 64)}
    return {name: tensor * 0.1 for name, tensor in tensors.items()}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    tiny_tokenizer(tmp_path / "scratch").save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def without(tensors: dict[str, Tensor], *starts: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(starts)}


@pytest.mark.parametrize("quant", [True, False], ids=["with quant_conv", "without"])
def test_a_vae_without_its_encoder_draws_and_takes_no_images(
    whole: dict[str, Tensor], tokenizer: Path, tmp_path: Path, quant: bool
) -> None:
    """Its decoder's tensors were "no tensor of Stable Diffusion"."""
    save_safetensors(whole, tmp_path / "whole.safetensors")
    half = without(whole, f"{VAE}encoder.", *([] if quant else [f"{VAE}quant_conv."]))
    save_safetensors(half, tmp_path / "half.safetensors")
    expected = Pipeline.from_single_file(tmp_path / "whole.safetensors", tokenizer=tokenizer)
    with pytest.warns(UserWarning, match="its VAE has no encoder, so that it draws from text"):
        pipe = Pipeline.from_single_file(tmp_path / "half.safetensors", tokenizer=tokenizer)
    drawn = [p("a cat", **DRAWING).images[0].tobytes() for p in (pipe, expected)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 10
    with pytest.raises(ValueError, match=r"this VAE has no encoder.*image-to-image"):
        pipe("a cat", image=Image.new("RGB", (32, 32)), strength=0.9, steps=2, progress=False)
    pipe.save_pretrained(tmp_path / "folder")
    again = Pipeline.from_pretrained(tmp_path / "folder")
    assert again.vae.config == pipe.vae.config
    assert again("a cat", **DRAWING).images[0].tobytes() == drawn[0]
    with pytest.raises(ValueError, match="encoder='none' has no place in a single file"):
        pipe.save_single_file(tmp_path / "other.safetensors")


def test_half_an_encoder_is_refused_by_the_name_of_what_is_missing(
    whole: dict[str, Tensor], tokenizer: Path, tmp_path: Path
) -> None:
    save_safetensors(without(whole, f"{VAE}encoder.mid."), tmp_path / "x.safetensors")
    with pytest.raises(
        ValueError, match=r"VAE of the file does not fit .* first encoder\.mid_block.*: missing"
    ) as refusal:
        Pipeline.from_single_file(tmp_path / "x.safetensors", tokenizer=tokenizer)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ([f"{VAE}decoder."], "it holds no decoder of its VAE"),
        ([VAE], "it holds no VAE"),
        ([VAE, TOWER], "it holds no VAE, no text encoder"),
        ([UNET, TOWER], "it holds no UNet, no text encoder"),
        ([UNET, VAE], "it holds no UNet, no VAE"),
    ],
)
def test_what_is_missing_is_named(
    whole: dict[str, Tensor], tmp_path: Path, missing: list[str], said: str
) -> None:
    save_safetensors(without(whole, *missing), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"no whole checkpoint of SD; {said}$"):
        read_single_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("start", "keep", "said"),
    [
        (UNET, "", "a UNet alone"),
        (VAE, "", "a VAE alone"),
        (VAE, "decoder.", "a VAE alone"),
        (f"{TOWER}transformer.", "", "a text encoder alone"),
    ],
)
def test_a_network_alone_is_called_by_its_name(
    whole: dict[str, Tensor], tmp_path: Path, start: str, keep: str, said: str
) -> None:
    """A UNet as ComfyUI saves it was refused for the first of its tensors."""
    alone = {n.removeprefix(start): t for n, t in whole.items() if n.startswith(start + keep)}
    save_safetensors(alone, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"seems to be {said}"):
        read_single_file(tmp_path / "x.safetensors")


def test_the_attention_of_a_vae_may_have_diffusers_names(
    whole: dict[str, Tensor], tmp_path: Path
) -> None:
    """A script of diffusers' left them so, as matrices; ComfyUI found its keys missing."""
    new = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    odd = {}
    for name, tensor in whole.items():
        match = re.fullmatch(r"(.+\.mid\.attn_1\.)(q|k|v|proj_out)\.(weight|bias)", name)
        odd[name if match is None else f"{match[1]}{new[match[2]]}.{match[3]}"] = (
            tensor if match is None else tensor.flatten(1) if tensor.ndim > 1 else tensor
        )
    assert len(odd.keys() - whole.keys()) == 16
    save_safetensors(whole, tmp_path / "whole.safetensors")
    save_safetensors(odd, tmp_path / "odd.safetensors")
    found, expected = (
        read_single_file(tmp_path / f"{name}.safetensors").vae for name in ("odd", "whole")
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    twice = odd | {f"{VAE}decoder.mid.attn_1.q.bias": torch.zeros(64)}
    save_safetensors(twice, tmp_path / "twice.safetensors")
    with pytest.raises(ValueError, match="is there twice"):
        read_single_file(tmp_path / "twice.safetensors")
