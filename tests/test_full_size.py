"""SD 1.5, SD 2.1-base and SD 2.1 at full size, with made-up weights, against diffusers.

The configurations are those of the published folders (their keys, and no others). One network at a
time is in memory, so that the whole needs about 5 GB.
"""

import gc
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from support.interchange_table import DIFFUSERS, Measured
from support.tiny import tiny_tokenizer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from latentdiff.diffusion import Diffusion
from latentdiff.formats.diffusers import check_pipeline_folder, load_scheduler_config
from latentdiff.models.text import TextEncoder
from latentdiff.models.unet import UNet
from latentdiff.models.vae import VAE

pytestmark = pytest.mark.full_size

UNET = {
    "act_fn": "silu",
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 1024,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "use_linear_projection": True,
}
VAE_CONFIG = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 768,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TEXT = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "pad_token_id": 1,
    "projection_dim": 512,
    "torch_dtype": "float16",
    "vocab_size": 49408,
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.10.0.dev0",
    "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "sd15": {
        "unet": UNET
        | {
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
            "upcast_attention": None,
            "use_linear_projection": False,
        },
        "vae": VAE_CONFIG | {"sample_size": 512, "scaling_factor": 0.18215},
        "text_encoder": TEXT
        | {
            "hidden_act": "quick_gelu",
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "projection_dim": 768,
        },
        "scheduler": SCHEDULER,
    },
    "sd21-base": {
        "unet": UNET,
        "vae": VAE_CONFIG,
        "text_encoder": TEXT,
        "scheduler": SCHEDULER,
    },
    "sd21": {
        "unet": UNET | {"sample_size": 96, "upcast_attention": True},
        "vae": VAE_CONFIG,
        "text_encoder": TEXT,
        "scheduler": SCHEDULER
        | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    },
}
PARAMETERS = {"sd15": 859_520_964, "sd21-base": 865_910_724, "sd21": 865_910_724}
LATENTS = (1, 4, 16, 16)
# The attention's layers in the published files of the autoencoder.
FORMER = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def made_up(network: nn.Module) -> dict[str, Tensor]:
    """Weights in half precision that keep the size of what goes through: pieces of one pool."""
    pool = (torch.randn(4_000_037) * 1000).round() / 1000
    tensors, at = {}, 0
    for name, tensor in network.state_dict().items():
        at = (at + 7919) % len(pool)
        count = tensor.numel()
        numbers = pool.roll(-at) if count > len(pool) - at else pool[at:]
        numbers = numbers.repeat(math.ceil(count / len(numbers)))[:count].reshape(tensor.shape)
        if tensor.dim() > 1:
            scale = 0.02 if "embedding.weight" in name else math.prod(tensor.shape[1:]) ** -0.5
            tensors[name] = (numbers * scale).half()
        else:
            tensors[name] = (0.05 * numbers + (name.endswith("weight"))).half()
    return tensors


def write(tensors: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True)
    save_file(tensors, path, metadata={"format": "pt"})


def write_model(name: str, folder: Path) -> None:
    """The folder as published: weights of float16 under the names of the time."""
    stem = "diffusion_pytorch_model.safetensors"
    configs = MODELS[name]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(configs["unet"])
        vae = AutoencoderKL.from_config(configs["vae"])
        text = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"]))
    assert sum(parameter.numel() for parameter in unet.parameters()) == PARAMETERS[name]
    write(made_up(unet), folder / "unet" / stem)
    tensors = made_up(vae)
    for new, former in FORMER.items():
        tensors = {
            n.replace(f"attentions.0.{new}.", f"attentions.0.{former}."): t
            for n, t in tensors.items()
        }
    write(tensors, folder / "vae" / stem)
    tensors = {f"text_model.{n.removeprefix('text_model.')}": t for n, t in made_up(text).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    write(tensors, folder / "text_encoder" / "model.safetensors")
    for part, config in configs.items():
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part).mkdir(exist_ok=True)
        (folder / part / file).write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    tiny_tokenizer(folder / "tokenizer", length=77).save_pretrained(folder / "tokenizer")


@pytest.fixture(scope="module", params=MODELS)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("full") / request.param
    torch.manual_seed(0)
    write_model(request.param, folder)
    gc.collect()
    yield folder
    for path in folder.rglob("*.safetensors"):
        path.unlink()  # 2 to 3 GB


def agree(ours: Tensor, theirs: Tensor, tool: str, what: str, measured: Measured) -> None:
    largest = theirs.abs().max()
    difference = float((ours - theirs).abs().max() / largest)
    measured("folder, full size", "read", tool, f"{what} output, float32", difference)
    assert torch.isfinite(theirs).all()
    assert 0.01 < float(theirs.std()) < 1000
    assert difference < 1e-4


@torch.no_grad()
def test_the_unet_agrees_with_diffusers(model: Path, measured: Measured) -> None:
    width = MODELS[model.name]["unet"]["cross_attention_dim"]
    x, context = torch.randn(LATENTS), torch.randn(1, 77, width)
    reference = UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=torch.float32)
    theirs = reference.eval()(x, torch.tensor([981]), context).sample
    del reference
    gc.collect()
    network = UNet.from_pretrained(model / "unet")
    agree(
        network(x, torch.tensor([981]), context), theirs, DIFFUSERS, f"{model.name} UNet", measured
    )


@torch.no_grad()
def test_the_autoencoder_agrees_with_diffusers(model: Path, measured: Measured) -> None:
    images, latents = torch.rand(1, 3, 64, 64) * 2 - 1, torch.randn(1, 4, 8, 8)
    reference = AutoencoderKL.from_pretrained(model / "vae", torch_dtype=torch.float32).eval()
    network = VAE.from_pretrained(model / "vae")
    mean = reference.encode(images).latent_dist.mean * 0.18215
    agree(network.encode(images).mean, mean, DIFFUSERS, f"{model.name} VAE encoder", measured)
    decoded = reference.decode(latents / 0.18215).sample
    agree(network.decode(latents), decoded, DIFFUSERS, f"{model.name} VAE decoder", measured)


@torch.no_grad()
def test_the_text_encoder_agrees_with_transformers(model: Path, measured: Measured) -> None:
    network = TextEncoder.from_pretrained(model)
    reference = CLIPTextModel.from_pretrained(model / "text_encoder", dtype=torch.float32).eval()
    prompts = ["a photograph of an astronaut riding a horse", ""]
    ids = network.tokenize(prompts)
    assert ids.shape == (2, 77)
    theirs = reference(ids).last_hidden_state
    agree(network(prompts), theirs, "transformers", f"{model.name} text encoder", measured)


def test_the_folder_is_one_that_we_read_and_says_what_the_unet_predicts(model: Path) -> None:
    assert set(check_pipeline_folder(model).values()) == {None}
    diffusion = Diffusion.from_scheduler_config(load_scheduler_config(model))
    expected = "v_prediction" if model.name == "sd21" else "epsilon"
    assert diffusion.prediction == expected
    assert not diffusion.set_alpha_to_one


READ = """
import re, sys
from pathlib import Path
import torch
from latentdiff.models.unet import UNet

def peak():  # not getrusage, which begins with what the parent had
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

before = peak()
network = UNet.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print(peak() - before, sum(p.nbytes for p in network.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_reading_takes_little_more_memory_than_the_network(model: Path, dtype: str) -> None:
    """Once all became float32 first, with the file beside it: 5 GB for a UNet of 1.7 GB."""
    command = [sys.executable, "-c", READ, str(model / "unet"), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, size = map(int, done.stdout.split())
    print(
        f"{model.name} as {dtype}: {size / 1e6:.0f} MB, and {(peak - size) / 1e6:.0f} MB to read it"
    )
    assert peak < size + 150e6  # the largest tensor has 118 MB in float32
