"""Image-to-image, inpainting and variations: parity with diffusers, and what must not change."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from PIL import Image
from support.interchange_table import DIFFUSERS, Measured
from support.tiny import Recording, tiny_pipeline

from latentdiff.diffusion import Diffusion
from latentdiff.noise import slerp
from latentdiff.pipeline import Pipeline

EPSILON = Diffusion("scaled_linear", "epsilon", timestep_spacing="leading", set_alpha_to_one=False)
FLOW = Diffusion("flow", "flow_prediction")


def make_image(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def left_half(size: tuple[int, int] = (16, 16)) -> Image.Image:
    """White, to be drawn anew, on the left."""
    mask = np.zeros(size, dtype=np.uint8)
    mask[:, : size[1] // 2] = 255
    return Image.fromarray(mask)


@pytest.fixture(scope="module", params=[False, True], ids=["any", "nine-channels"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model for any use, and of an inpainting model."""
    tokens, folder = tmp_path_factory.mktemp("tokens"), tmp_path_factory.mktemp("model")
    tiny_pipeline(tokens, EPSILON, inpaints=request.param).save_pretrained(folder)
    return folder


def draw(folder: Path, **options: Any) -> torch.Tensor:
    pipeline = Recording.from_pretrained(folder)
    pipeline(
        ["a cat", "a dog"],
        negative_prompt="a hat",
        steps=10,
        guidance_scale=4.0,
        seed=[5, 6],
        progress=False,
        **options,
    )
    return pipeline.latents


def draw_in_diffusers(cls: Any, folder: Path, **options: Any) -> torch.Tensor:
    theirs = cls.from_pretrained(folder)
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    latents = [
        theirs(
            prompt,
            negative_prompt="a hat",
            num_inference_steps=10,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            **options,
        ).images
        for prompt, seed in (("a cat", 5), ("a dog", 6))
    ]
    return torch.cat(latents)


@pytest.mark.interchange
@pytest.mark.parametrize("folder", [False], ids=["any"], indirect=True)
@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
def test_image_to_image_is_diffusers(folder: Path, strength: float, measured: Measured) -> None:
    ours = draw(folder, image=make_image(0), strength=strength)
    theirs = draw_in_diffusers(
        StableDiffusionImg2ImgPipeline, folder, image=make_image(0), strength=strength
    )
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    measured("folder, image-to-image", "read", DIFFUSERS, "latents after 10 steps", difference)
    assert difference < 1e-5


@pytest.mark.interchange
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpainting_is_diffusers(folder: Path, strength: float, measured: Measured) -> None:
    """Where alpha_1 is the last level, diffusers puts the kept latents in without their noise."""
    given: dict[str, Any] = {
        "image": make_image(1),
        "mask_image": left_half(),
        "strength": strength,
    }
    ours = draw(folder, **given)
    theirs = draw_in_diffusers(StableDiffusionInpaintPipeline, folder, height=16, width=16, **given)
    drawn = slice(None) if Pipeline.from_pretrained(folder).inpaints else slice(0, 4)
    ours, theirs = ours[..., drawn], theirs[..., drawn]
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    measured("folder, inpainting", "read", DIFFUSERS, "latents after 10 steps", difference)
    assert difference < 1e-5


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "heun"])
def test_what_the_mask_keeps_stays_bit_for_bit(folder: Path, sampler: str) -> None:
    original = make_image(2)
    output = Pipeline.from_pretrained(folder)(
        "a cat", steps=4, image=original, mask_image=left_half(), sampler=sampler, progress=False
    )
    before, after = np.asarray(original), np.asarray(output.images[0])
    assert np.array_equal(after[:, 8:], before[:, 8:])
    assert not np.array_equal(after[:, :8], before[:, :8])


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return tiny_pipeline(tmp_path_factory.mktemp("tokens"), FLOW)


def pixels(pipeline: Pipeline, **options: Any) -> list[bytes]:
    options = {"steps": 4, "guidance_scale": 3.0, "progress": False, **options}
    return [image.tobytes() for image in pipeline("a cat", **options).images]


def test_an_image_is_the_same_alone_and_among_others(pipeline: Pipeline) -> None:
    for given in ({"image": make_image(3)}, {"image": make_image(3), "mask_image": left_half()}):
        together = pixels(pipeline, seed=[7, 8, 9], num_images=3, **given)
        assert pixels(pipeline, seed=8, **given) == together[1:2]


def test_less_strength_starts_from_less_noise() -> None:
    levels = FLOW.levels(10)
    assert [len(levels.last(n)) for n in (1, 5, 10)] == [1, 5, 10]
    noise = [float(levels.last(n).sigma[0]) for n in range(1, 11)]
    assert noise == sorted(noise)
    assert noise[-1] == FLOW.levels(10).sigma[0]


def test_a_given_image_decides_the_size_and_height_and_width_resize_it(
    pipeline: Pipeline,
) -> None:
    options: dict[str, Any] = {"steps": 2, "progress": False}
    wide = make_image(4, (18, 33))  # the VAE's factor is 2
    assert pipeline("a", image=wide, **options).images[0].size == (32, 18)
    assert pipeline("a", image=wide, width=20, **options).images[0].size == (20, 18)


def test_what_is_transparent_is_white(pipeline: Pipeline) -> None:
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    white = Image.new("RGB", (16, 16), "white")
    assert pixels(pipeline, image=clear, seed=0) == pixels(pipeline, image=white, seed=0)


def test_a_variation_goes_from_one_seed_to_the_other(pipeline: Pipeline) -> None:
    own, other = pixels(pipeline, seed=1), pixels(pipeline, seed=2)
    assert pixels(pipeline, seed=1, variation_seed=2, variation_strength=1.0) == other
    half = pixels(pipeline, seed=1, variation_seed=2, variation_strength=0.5)
    assert half not in (own, other)
    back = pixels(pipeline, seed=2, variation_seed=1, variation_strength=0.5)
    assert half == back


def test_variations_of_one_seed_count_up_in_their_own_seeds(pipeline: Pipeline) -> None:
    options = {"seed": 1, "variation_strength": 0.3}
    three = pixels(pipeline, num_images=3, variation_seed=20, **options)
    assert three == [pixels(pipeline, variation_seed=20 + i, **options)[0] for i in range(3)]
    assert len(set(three)) == 3


def test_slerp_keeps_lengths_and_turns_evenly() -> None:
    a = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    b = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).reshape(-1, 1, 1, 1)

    def angle(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cosine_similarity(x.flatten(1), y.flatten(1)).arccos()

    for fraction in (0.1, 0.5, 0.9):
        turned = slerp(a, b, fraction)
        torch.testing.assert_close(turned.flatten(1).norm(dim=1), a.flatten(1).norm(dim=1))
        torch.testing.assert_close(angle(a, turned), fraction * angle(a, b))
    assert torch.equal(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, a, 0.3), a)


def test_an_inpainting_model_asks_for_an_image_and_a_mask(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    pipeline = tiny_pipeline(tmp_path_factory.mktemp("tokens"), FLOW, inpaints=True)
    for given in ({}, {"image": make_image(0)}):
        with pytest.raises(ValueError, match="needs an image and a mask_image"):
            pipeline("a cat", steps=2, progress=False, **given)
