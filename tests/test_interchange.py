"""Folders that we and diffusers both open: no warning, the same image from the same latents."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from support.interchange_table import DIFFUSERS, Measured
from support.parity import no_warning_logged
from support.tiny import (
    CONTEXT_DIM,
    Recording,
    tiny_pipeline,
    tiny_text_encoder,
    transformers_tower,
)
from torch import Tensor

from latentdiff.diffusion import Diffusion
from latentdiff.formats.diffusers import find_model
from latentdiff.models.unet import UNet
from latentdiff.pipeline import Pipeline

# diffusers' own business, inside its DPMSolverMultistepScheduler.
pytestmark = [
    pytest.mark.interchange,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

DIFFUSIONS = {
    "flow": Diffusion("flow", "flow_prediction"),
    "epsilon": Diffusion(
        "scaled_linear", "epsilon", timestep_spacing="leading", set_alpha_to_one=False
    ),
    "v": Diffusion("scaled_linear", "v_prediction"),
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return tiny_pipeline(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def folder(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    return folder


def first_noise(seed: int, *shape: int) -> Tensor:
    """Latents (1, *shape)."""
    return torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed))


def decibels(ours: Tensor, theirs: Tensor) -> float:
    """Peak signal-to-noise ratio of images in [0, 1]."""
    return float(-10 * torch.log10((ours.double() - theirs.double()).square().mean() + 1e-30))


def assert_same_image(folder: Path, diffusers_pipeline: Any, sampler: str, **size: int) -> float:
    """Our pipeline of the folder and diffusers' draw the same image from the same latents.

    Returns the largest difference of a pixel, in [0, 1].
    """
    ours = Recording.from_pretrained(folder)
    diffusers_pipeline.set_progress_bar_config(disable=True)
    f, side = ours.vae.config.factor, ours.unet.config.sample_size
    latent_size = (size["height"] // f, size["width"] // f) if size else (side, side)
    theirs = diffusers_pipeline(
        "a cat",
        negative_prompt="a dog",
        latents=first_noise(3, ours.vae.config.latent_channels, *latent_size),
        num_inference_steps=20,
        guidance_scale=4.0,
        output_type="pt",
        **size,
    ).images
    output = ours(
        "a cat",
        negative_prompt="a dog",
        seed=3,
        steps=20,
        guidance_scale=4.0,
        sampler=sampler,
        progress=False,
        **size,
    )
    with torch.no_grad():
        floats = (ours.vae.decode(ours.latents) / 2 + 0.5).clamp(0, 1)
    assert decibels(floats, theirs) > 100
    image = np.asarray(output.images[0], dtype=np.float32) / 255
    assert np.abs(image - theirs[0].permute(1, 2, 0).numpy()).max() < 0.51 / 255  # rounded
    return float((floats - theirs).abs().max())


def load_in_diffusers(folder: Path) -> Any:
    with no_warning_logged():
        return StableDiffusionPipeline.from_pretrained(folder)


def test_diffusers_opens_our_flow_folder_without_a_warning_and_draws_our_image(
    folder: Path, measured: Measured
) -> None:
    theirs = load_in_diffusers(folder)
    assert theirs.scheduler.config.prediction_type == "flow_prediction"
    found = assert_same_image(folder, theirs, "dpmpp_2m")
    measured("folder", "written", DIFFUSERS, "pixels in [0, 1], flow, dpmpp_2m", found)


@pytest.mark.parametrize("kind", ["epsilon", "v"])
@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [("ddim", DDIMScheduler), ("dpmpp_2m", DPMSolverMultistepScheduler)],
)
def test_diffusers_opens_our_beta_folder_without_a_warning_and_draws_our_image(
    tmp_path: Path, kind: str, sampler: str, scheduler: Any, measured: Measured
) -> None:
    tiny_pipeline(tmp_path / "tokens", DIFFUSIONS[kind]).save_pretrained(tmp_path / "model")
    theirs = load_in_diffusers(tmp_path / "model")
    theirs.scheduler = scheduler.from_config(theirs.scheduler.config)
    found = assert_same_image(tmp_path / "model", theirs, sampler)
    measured("folder", "written", DIFFUSERS, f"pixels in [0, 1], {kind}, {sampler}", found)


def test_a_image_that_is_not_square_is_diffusers_too(folder: Path) -> None:
    assert_same_image(folder, load_in_diffusers(folder), "dpmpp_2m", height=24, width=40)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_we_open_a_folder_that_diffusers_wrote_and_draw_its_image(
    tmp_path: Path, prediction: str, measured: Measured
) -> None:
    text_encoder = tiny_text_encoder(tmp_path / "tokens")
    theirs = StableDiffusionPipeline(
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=CONTEXT_DIM,
            attention_head_dim=(2, 4),
            norm_num_groups=4,
            use_linear_projection=True,
        ),
        vae=AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            sample_size=16,
        ),
        text_encoder=transformers_tower(text_encoder),
        tokenizer=text_encoder.tokenizer,
        scheduler=PNDMScheduler(  # as in SD 1.x and 2.x
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction,
            set_alpha_to_one=False,
            skip_prk_steps=True,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    theirs.save_pretrained(tmp_path / "model")
    # SD's published configurations hold clip_sample too, although PNDMScheduler has no such key.
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config, clip_sample=False)
    found = assert_same_image(tmp_path / "model", theirs, "ddim")
    measured("folder", "read", DIFFUSERS, f"pixels in [0, 1], {prediction}, ddim", found)


@pytest.mark.parametrize("kind", DIFFUSIONS)
@pytest.mark.parametrize("channels", [4, 9])
def test_every_key_of_every_configuration_is_the_one_that_diffusers_writes(
    tmp_path: Path, kind: str, channels: int
) -> None:
    """A key left out would be read with the default of whichever release reads it."""
    ours = tiny_pipeline(tmp_path / "tokens", DIFFUSIONS[kind])
    if channels == 9:
        ours.unet = UNet(dataclasses.replace(ours.unet.config, in_channels=9))
    ours.save_pretrained(tmp_path / "ours")
    with no_warning_logged():
        theirs = DiffusionPipeline.from_pretrained(tmp_path / "ours")
    name = "StableDiffusionPipeline" if channels == 4 else "StableDiffusionInpaintPipeline"
    assert type(theirs).__name__ == name
    theirs.save_pretrained(tmp_path / "theirs")
    compared = 0
    for path in (tmp_path / "theirs").rglob("*.json"):
        wanted = json.loads(path.read_text())
        wanted.pop("_name_or_path", None)  # where it was read from
        if wanted.get("lambda_min_clipped") == float("-inf"):  # which JSON has no word for
            del wanted["lambda_min_clipped"]
        found = json.loads((tmp_path / "ours" / path.relative_to(tmp_path / "theirs")).read_text())
        assert found == wanted, path
        compared += 1
    assert compared == 7


def test_half_precision_on_disk_is_float32_when_loaded(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path, dtype=torch.float16)
    loaded = Pipeline.from_pretrained(tmp_path)
    for name in ("unet", "vae", "text_encoder"):
        before, after = getattr(pipeline, name).state_dict(), getattr(loaded, name).state_dict()
        for key, tensor in before.items():
            assert after[key].dtype == tensor.dtype
            half = tensor.half().float() if tensor.is_floating_point() else tensor
            assert torch.equal(after[key], half), key
    sizes = [path.stat().st_size for path in tmp_path.glob("unet/*.safetensors")]
    assert sum(sizes) < 2.5 * sum(parameter.numel() for parameter in pipeline.unet.parameters())
    load_in_diffusers(tmp_path)


def test_diffusers_opens_the_embedded_model_and_draws_its_image(measured: Measured) -> None:
    emoji = find_model("emoji")
    found = assert_same_image(emoji, load_in_diffusers(emoji), "dpmpp_2m")
    measured("folder", "written", DIFFUSERS, "pixels in [0, 1], emoji, dpmpp_2m", found)


def test_the_embedded_model_fits_into_64_megabytes() -> None:
    files = [path for path in find_model("emoji").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 64_000_000
