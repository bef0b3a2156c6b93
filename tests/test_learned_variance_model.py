"""A model with learned variances: trained by the script, saved, and drawn with by two libraries."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from support.parity import no_warning_logged
from support.scripts import run_here
from support.tiny import tiny_pipeline, tiny_text_encoder
from test_cache import vae
from torch import Tensor

from latentdiff.data.shapes import build_shapes
from latentdiff.diffusion import Diffusion
from latentdiff.editing import inpainting_denoiser
from latentdiff.levels import NoiseLevel
from latentdiff.pipeline import Pipeline

# Whose last step is from timestep 0: diffusers adds noise after every other.
LEARNED = Diffusion("scaled_linear", "epsilon", learned_variance=True, timestep_spacing="linspace")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learned")
    tiny_pipeline(folder / "tokens", LEARNED).save_pretrained(folder / "model")
    return folder / "model"


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=int)


def test_a_folder_says_that_the_variance_is_learned(folder: Path) -> None:
    unet = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    assert (unet["in_channels"], unet["out_channels"]) == (4, 8)
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    assert config["variance_type"] == "learned_range"
    assert Pipeline.from_pretrained(folder).diffusion == LEARNED


def test_an_image_of_a_batch_is_that_which_is_drawn_alone(folder: Path) -> None:
    pipeline = Pipeline.from_pretrained(folder)
    options: dict[str, Any] = {"steps": 3, "sampler": "ddpm", "progress": False}
    together = pipeline(["a cat", "a dog"], seed=[4, 5], **options).images
    alone = pipeline("a dog", seed=5, **options).images[0]
    assert alone.tobytes() == together[1].tobytes()
    assert together[0].tobytes() != alone.tobytes()


def test_a_single_file_comes_back_and_says_that_the_others_cannot_draw_with_it(
    folder: Path, tmp_path: Path
) -> None:
    pipeline = Pipeline.from_pretrained(folder)
    said = " ".join(pipeline.save_single_file(tmp_path / "model.safetensors"))
    assert "A1111 cannot load it" in said
    assert "ComfyUI cannot load it" in said
    again = Pipeline.from_single_file(tmp_path / "model.safetensors")
    assert again.diffusion == LEARNED
    assert again.unet.config == pipeline.unet.config


@pytest.mark.parametrize("learned", [True, False])
def test_a_model_whose_channels_and_scheduler_disagree_is_refused(
    tmp_path: Path, learned: bool
) -> None:
    diffusion = Diffusion("scaled_linear", "epsilon", learned_variance=learned)
    tiny_pipeline(tmp_path / "tokens", diffusion).save_pretrained(tmp_path / "model")
    other = Diffusion("scaled_linear", "epsilon", learned_variance=not learned)
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(other.to_scheduler_config()), encoding="utf-8")
    message = (
        r"out_channels=8 of the UNet must be 4: .* the variance is not learned"
        if learned
        else r"out_channels=4 of the UNet must be 8: .* the variance is learned"
    )
    with pytest.raises(ValueError, match=message):
        Pipeline.from_pretrained(tmp_path / "model")


def test_inpainting_keeps_the_init_image_and_the_v_of_the_network() -> None:
    latents, eps, v, x = torch.randn(4, 1, 2, 4, 4)
    masks = torch.zeros(1, 1, 4, 4)
    masks[..., :2] = 1

    def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
        return torch.cat([x, v], dim=1)

    level = NoiseLevel(torch.tensor(5.0), torch.tensor(0.8), torch.tensor(0.6))
    estimate = inpainting_denoiser(denoise, masks, latents, eps, noise_only=None)(x, level)
    torch.testing.assert_close(estimate[:, :2], masks * x + (1 - masks) * latents)
    assert torch.equal(estimate[:, 2:], v)


def test_an_inpainting_network_learns_variances_too(tmp_path: Path) -> None:
    pipeline = tiny_pipeline(tmp_path, LEARNED, inpaints=True)
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    image = Image.new("RGB", (16, 16), (200, 30, 30))
    options: dict[str, Any] = {"steps": 3, "sampler": "ddpm", "progress": False}
    drawn = pipeline("a cat", image=image, mask_image=mask, seed=0, **options).images[0]
    assert (pixels(drawn)[:, 8:] == pixels(image)[:, 8:]).all()


@pytest.mark.interchange
def test_diffusers_opens_the_folder_and_draws_our_image(folder: Path) -> None:
    """Without guidance: StableDiffusionPipeline guides the variances like the noise."""
    with no_warning_logged():
        theirs = StableDiffusionPipeline.from_pretrained(folder)
    assert isinstance(theirs.scheduler, DDPMScheduler)
    assert UNet2DConditionModel.from_pretrained(folder / "unet").config["out_channels"] == 8
    assert DDPMScheduler.from_pretrained(folder / "scheduler").variance_type == "learned_range"
    theirs.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    options: dict[str, Any] = {"guidance_scale": 1.0, "num_inference_steps": 20}
    expected = theirs("a cat", generator=generator, **options).images[0]
    drawn = Pipeline.from_pretrained(folder)(
        "a cat", seed=3, sampler="ddpm", progress=False, **options
    ).images[0]
    assert np.abs(pixels(drawn) - pixels(expected)).max() <= 1  # rounded
    guided = options | {"guidance_scale": 3.0}
    assert theirs("a cat", generator=generator, **guided).images[0].size == (16, 16)


UNET = (
    "--unet.block_out_channels=[8,16] --unet.norm_num_groups=4 --unet.attention_head_dim=2 "
    "--unet.down_block_types=[CrossAttnDownBlock2D,DownBlock2D] "
    "--unet.up_block_types=[UpBlock2D,CrossAttnUpBlock2D]"
)
DIT = "--dit.num_layers=2 --dit.num_attention_heads=2 --dit.attention_head_dim=8"
SHORT = (
    "--image_size=16 --max_steps=4 --batch_size=4 --warmup_steps=1 --cooldown_steps=0 "
    "--log_every=1 --preview_every=4 --validate_every=4 --val_fraction=0.2 --mixed_precision=no "
    "--check_latents=false "
    "--diffusion.schedule=linear --diffusion.prediction=v_prediction "
    "--diffusion.learned_variance=true"
)


@pytest.mark.training
@pytest.mark.filterwarnings("ignore:the VAE in .* is not fit to train on")  # it is random
@pytest.mark.parametrize(("name", "network"), [("unet", UNET), ("transformer", DIT)])
def test_the_script_trains_both_halves_and_leaves_a_model_that_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, network: str
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    build_shapes(tmp_path / "set", count=30, seed=0, size=16)
    vae().save_pretrained(tmp_path / "vae")
    tiny_text_encoder(tmp_path / "tokens").save_pretrained(tmp_path / "text")
    paths = {"data": "set", "output_dir": "run", "vae": "vae", "text_encoder": "text"}
    given = [f"--{option}={tmp_path / folder}" for option, folder in paths.items()]
    run_here("train_unet", *given, *SHORT.split(), *network.split())
    lines = (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    bounds = [record["bound"] for record in records if "loss" in record]
    assert len(bounds) == 4
    assert all(np.isfinite(bounds))
    assert any("val_loss" in record for record in records)
    assert (tmp_path / "run" / "previews" / "step-0000004.png").is_file()
    model = tmp_path / "run" / "model"
    config = json.loads((model / name / "config.json").read_text(encoding="utf-8"))
    assert (config["in_channels"], config["out_channels"]) == (3, 6)
    pipeline = Pipeline.from_pretrained(model)
    assert pipeline.diffusion.learned_variance
    drawn = pipeline("a", seed=0, steps=2, sampler="ddpm", progress=False).images
    assert [image.size for image in drawn] == [(16, 16)]
