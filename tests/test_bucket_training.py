"""A UNet trained on images of several shapes, with crops and flips: one batch, one size."""

import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from support.scripts import run_here
from support.tiny import tiny_text_encoder
from test_cache import vae, write_images

from latentdiff.data.cache import LatentCache
from latentdiff.formats.weights import load_safetensors
from latentdiff.pipeline import Pipeline
from latentdiff.tasks.denoiser.latents import warn_of_small_sizes

# The networks have learned nothing, and the latent check before a cache says so.
pytestmark = [pytest.mark.training, pytest.mark.filterwarnings("ignore:the VAE in .* is not fit")]

SHAPES = "--image_size=16 --bucket_step=8 --max_aspect=4 --flip=true --crops=2"
TINY = (
    "--unet.block_out_channels=[8,16] --unet.norm_num_groups=4 --unet.attention_head_dim=2 "
    "--unet.down_block_types=[CrossAttnDownBlock2D,DownBlock2D] --max_steps=6 --batch_size=4 "
    "--unet.up_block_types=[UpBlock2D,CrossAttnUpBlock2D] --mixed_precision=no --log_every=1 "
    "--checkpoint_every=3 --warmup_steps=1 --cooldown_steps=0 --preview_every=6"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Images, networks, a cache, and a UNet that was trained on it for six steps."""
    folder = tmp_path_factory.mktemp("home")
    write_images(folder / "set", 40)
    vae().save_pretrained(folder / "vae")
    tiny_text_encoder(folder / "tokens").save_pretrained(folder / "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "datasets"))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        options = f"--data={folder / 'set'} --output_dir={folder / 'cache'} --vae={folder / 'vae'}"
        run_here("cache_latents", *options.split(), *SHAPES.split(), "--check_latents=false")
        train(folder, "run")
        yield folder


def train(home: Path, run: str, options: str = "") -> None:
    cached = options or f"--cache={home / 'cache'}"
    networks = f"--vae={home / 'vae'} --text_encoder={home / 'text'} {TINY}"
    run_here("train_unet", f"--output_dir={home / run}", *cached.split(), *networks.split())


def losses(run: Path) -> list[float]:
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_safetensors(run / "checkpoints" / "step-6" / "unet.safetensors")


def test_it_resumes_in_the_middle_bit_for_bit(home: Path) -> None:
    train(home, "again", f"--cache={home / 'cache'} --resume_from={home}/run/checkpoints/step-3")
    found, expected = weights(home / "again"), weights(home / "run")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_parts_and_an_own_cache_train_as_whole_batches_do(home: Path) -> None:
    own = f"--data={home / 'set'} {SHAPES} --check_latents=false"
    train(home, "parts", f"{own} --gradient_accumulation_steps=2")
    assert losses(home / "parts") == pytest.approx(losses(home / "run"), rel=1e-4)


def test_what_is_trained_on_has_three_sizes_and_four_views(home: Path) -> None:
    cache = LatentCache(home / "cache")
    assert cache.crop_flip.num_variants == 4
    assert len(np.unique(cache.buckets)) == 3


def test_the_pipeline_draws_squares_by_default_and_other_shapes_when_asked(home: Path) -> None:
    pipeline = Pipeline.from_pretrained(home / "run" / "model")
    drawn = pipeline("a", seed=0, steps=1, progress=False).images
    assert [image.size for image in drawn] == [(16, 16)]
    drawn = pipeline("a", seed=0, steps=1, width=32, height=8, progress=False).images
    assert [image.size for image in drawn] == [(32, 8)]


def test_sizes_of_less_than_a_batch_are_told(home: Path) -> None:
    """Their batches repeat images, which nobody was told."""
    cache = LatentCache(home / "cache")
    names, counts = np.unique(cache.buckets, return_counts=True)
    few = int(counts.min())
    val = np.flatnonzero(cache.buckets == names[counts.argmin()])[:1]
    warn_of_small_sizes(cache, val, few - 1)
    with pytest.warns(UserWarning, match=rf"^1 of 3 sizes have fewer .*x\d+ has {few - 1};"):
        warn_of_small_sizes(cache, val, few)
