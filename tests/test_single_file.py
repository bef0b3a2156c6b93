"""One file with a whole model: written and read back bit for bit, and read by diffusers."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.interchange_table import DIFFUSERS, Measured
from support.parity import no_warning_logged
from support.strategies import unet_configs, vae_configs
from support.tiny import CONTEXT_DIM, randomise, tiny_text_encoder
from torch import Tensor
from transformers import CLIPTextConfig

from latentdiff.diffusion import Diffusion
from latentdiff.formats.diffusers import save_model_index, save_scheduler_config
from latentdiff.formats.header import read_header
from latentdiff.formats.ldm import compatibility
from latentdiff.formats.ldm.modelspec import TOKENIZER_FILES
from latentdiff.formats.single_file import SingleFile, read_single_file, write_single_file
from latentdiff.formats.weights import load_json, load_safetensors
from latentdiff.models.clip_text import CLIPText
from latentdiff.models.text import TextEncoder
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.models.vae import VAE, VAEConfig

pytestmark = [
    pytest.mark.interchange,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

DIFFUSIONS = (
    Diffusion("flow", "flow_prediction"),
    Diffusion("scaled_linear", "epsilon", timestep_spacing="leading", set_alpha_to_one=False),
    Diffusion("scaled_linear", "v_prediction", beta_end=0.0123456789),
    Diffusion("cosine", "epsilon"),
)
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
CONFIGS = {
    "unet_config": "unet/config.json",
    "vae_config": "vae/config.json",
    "text_config": "text_encoder/config.json",
    "scheduler_config": "scheduler/scheduler_config.json",
}
# As in SD: four levels, attention in the first three, heads and norms by its custom.
SMALL_SD = UNetConfig(
    sample_size=8,
    block_out_channels=(32, 32, 64, 64),
    cross_attention_dim=CONTEXT_DIM,
)
SMALL_VAE = VAEConfig(block_out_channels=(32, 32, 64, 64), sample_size=64, layers_per_block=1)
ODD = UNetConfig(
    sample_size=8,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    mid_block_type="UNetMidBlock2D",
    layers_per_block=3,
    cross_attention_dim=CONTEXT_DIM,
    attention_head_dim=(2, 4),
    use_linear_projection=True,
    norm_num_groups=4,
    transformer_layers_per_block=2,
)
ODD_VAE = VAEConfig(block_out_channels=(4, 8), norm_num_groups=2, mid_block_add_attention=False)


@pytest.fixture(scope="session")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return tiny_text_encoder(tmp_path_factory.mktemp("tokenizer"))


def save_folder(
    folder: Path, unet: UNetConfig, vae: VAEConfig, text: TextEncoder, diffusion: Diffusion
) -> None:
    """A pipeline folder with random weights in every layer."""
    torch.manual_seed(0)
    for network, name in ((UNet(unet), "unet"), (VAE(vae), "vae")):
        randomise(network)
        network.save_pretrained(folder / name)
    text.save_pretrained(folder)
    scheduler = diffusion.to_scheduler_config()
    save_scheduler_config(scheduler, folder)
    save_model_index(folder, scheduler_class=scheduler["_class_name"])


def load_folder(folder: Path) -> SingleFile:
    files = [folder / "tokenizer" / name for name in TOKENIZER_FILES]
    return SingleFile(
        **{field: load_safetensors(folder / path) for field, path in WEIGHTS.items()},
        **{field: load_json(folder / path) for field, path in CONFIGS.items()},
        tokenizer={file.name: file.read_text("utf-8") for file in files if file.is_file()},
    )


def assert_same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def check_round_trip(
    folder: Path, unet: UNetConfig, vae: VAEConfig, text: TextEncoder, diffusion: Diffusion
) -> None:
    """Folder -> single file -> folder: the same tensors, configurations and tokenizer."""
    save_folder(folder / "before", unet, vae, text, diffusion)
    before = load_folder(folder / "before")
    write_single_file(before, folder / "model.safetensors")
    after = read_single_file(folder / "model.safetensors")
    for field in (*CONFIGS, "tokenizer"):
        assert getattr(after, field) == getattr(before, field)
    for field in WEIGHTS:
        assert_same_tensors(getattr(after, field), getattr(before, field))
    for cls, config, name in ((UNet, UNetConfig, "unet"), (VAE, VAEConfig, "vae")):
        network: Any = cls(config.from_dict(getattr(after, f"{name}_config")))
        network.load_state_dict(getattr(after, name))
        network.save_pretrained(folder / "after" / name)
        for file in (folder / "before" / name).iterdir():
            assert (folder / "after" / name / file.name).read_bytes() == file.read_bytes()
    assert Diffusion.from_scheduler_config(after.scheduler_config) == diffusion


any_model = given(
    unet=unet_configs(context=CONTEXT_DIM), vae=vae_configs(), diffusion=st.sampled_from(DIFFUSIONS)
)
same_examples = settings(
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.mark.exhaustive
@settings(same_examples, max_examples=60)
@any_model
def test_sixty_models_survive_the_single_file_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    text_encoder: TextEncoder,
    unet: UNetConfig,
    vae: VAEConfig,
    diffusion: Diffusion,
    measured: Measured,
) -> None:
    check_round_trip(tmp_path_factory.mktemp("model"), unet, vae, text_encoder, diffusion)
    measured("single file", "written and read", "latentdiff", "files, models of any shape", 0)


def assert_diffusers_reads(folder: Path, measured: Measured) -> None:
    """diffusers has from folder/model.safetensors the very weights of folder/model."""
    with no_warning_logged():
        theirs = StableDiffusionPipeline.from_single_file(
            str(folder / "model.safetensors"), config=str(folder / "model")
        )
    expected = StableDiffusionPipeline.from_pretrained(folder / "model")
    for name in WEIGHTS:
        assert_same_tensors(
            getattr(theirs, name).state_dict(), getattr(expected, name).state_dict()
        )
    assert theirs.scheduler.config == expected.scheduler.config
    measured("single file", "written", DIFFUSERS, "weights, by from_single_file(config=folder)", 0)


@pytest.mark.parametrize(("unet", "vae"), [(SMALL_SD, SMALL_VAE), (ODD, ODD_VAE)])
def test_diffusers_reads_our_file_bit_for_bit(
    tmp_path: Path,
    text_encoder: TextEncoder,
    unet: UNetConfig,
    vae: VAEConfig,
    measured: Measured,
) -> None:
    save_folder(tmp_path / "model", unet, vae, text_encoder, DIFFUSIONS[1])
    write_single_file(load_folder(tmp_path / "model"), tmp_path / "model.safetensors")
    assert_diffusers_reads(tmp_path, measured)


def test_a_text_tower_of_sd_2_is_written_as_open_clips_and_comes_back(
    tmp_path: Path,
    text_encoder: TextEncoder,
    monkeypatch: pytest.MonkeyPatch,
    measured: Measured,
) -> None:
    """With SD 2.x's 23 layers, though thin ones; other tools expect a 24th, which is not in use."""
    sizes = {"hidden_size": CONTEXT_DIM, "intermediate_size": 32, "num_attention_heads": 2}
    sizes |= {"vocab_size": len(text_encoder.tokenizer), "max_position_embeddings": 12}
    monkeypatch.setattr(compatibility, "SD2_TOWER", compatibility.SD2_TOWER | sizes)
    tower = CLIPText(CLIPTextConfig(**compatibility.SD2_TOWER, projection_dim=8))
    text = TextEncoder(tower, text_encoder.tokenizer)
    save_folder(tmp_path / "model", SMALL_SD, SMALL_VAE, text, DIFFUSIONS[2])
    before = load_folder(tmp_path / "model")
    write_single_file(before, tmp_path / "model.safetensors")
    shapes = read_header(tmp_path / "model.safetensors").shapes
    start = "cond_stage_model.model."
    assert f"{start}transformer.resblocks.23.attn.in_proj_weight" in shapes
    assert shapes[f"{start}text_projection"] == (CONTEXT_DIM, CONTEXT_DIM)
    assert "v_pred" in shapes
    after = read_single_file(tmp_path / "model.safetensors")
    assert_same_tensors(after.text_encoder, before.text_encoder)
    assert_diffusers_reads(tmp_path, measured)


@pytest.fixture
def small(tmp_path: Path, text_encoder: TextEncoder) -> SingleFile:
    save_folder(tmp_path / "model", SMALL_SD, SMALL_VAE, text_encoder, DIFFUSIONS[1])
    return load_folder(tmp_path / "model")


def test_weights_are_converted_on_the_way_in_and_out(small: SingleFile, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    write_single_file(small, path, dtype=torch.float16)
    assert set(read_header(path).dtypes.values()) == {torch.float16}
    loaded = read_single_file(path, dtype=torch.float32)
    assert_same_tensors(loaded.unet, {n: t.half().float() for n, t in small.unet.items()})
    assert read_single_file(path).vae["encoder.conv_in.weight"].dtype == torch.float16


@pytest.mark.parametrize("mixed", [False, True])
def test_the_hash_is_that_of_all_that_follows_the_header(
    small: SingleFile, tmp_path: Path, mixed: bool
) -> None:
    if mixed:
        small.vae = {name: tensor.half() for name, tensor in small.vae.items()}
        small.text_encoder = {name: t.bfloat16() for name, t in small.text_encoder.items()}
        small.unet["conv_in.bias"] = small.unet["conv_in.bias"].double()
    path = tmp_path / "model.safetensors"
    write_single_file(small, path)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    found = read_header(path).metadata["modelspec.hash_sha256"]
    assert found == f"0x{hashlib.sha256(content[start:]).hexdigest()}"


def test_what_a_file_said_of_its_author_goes_on_with_it(small: SingleFile, tmp_path: Path) -> None:
    small.metadata = {"modelspec.author": "Ada", "modelspec.title": "Engine", "ss_seed": "1"}
    write_single_file(small, tmp_path / "one.safetensors")
    write_single_file(read_single_file(tmp_path / "one.safetensors"), tmp_path / "two.safetensors")
    metadata = read_single_file(tmp_path / "two.safetensors").metadata
    for key, value in small.metadata.items():
        assert metadata[key] == value
    assert metadata["modelspec.sai_model_spec"] == "1.0.0"
    assert metadata["modelspec.architecture"] == "latentdiff"
    assert metadata["modelspec.resolution"] == "64x64"
    assert metadata["modelspec.prediction_type"] == "epsilon"


def test_an_ldm_config_of_another_model_that_lies_beside_is_pointed_out(
    small: SingleFile, tmp_path: Path
) -> None:
    """A1111 would build what it describes: a flow has no LDM config, so nothing replaces it."""
    path = tmp_path / "model.safetensors"
    assert "A1111" in write_single_file(small, path)[-1]
    assert (tmp_path / "model.yaml").is_file()
    small.scheduler_config = DIFFUSIONS[0].to_scheduler_config()
    assert "model.yaml, which lies there" in write_single_file(small, path)[-1]


def test_a_path_of_another_kind_is_refused(small: SingleFile, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        write_single_file(small, tmp_path / "model.ckpt")
