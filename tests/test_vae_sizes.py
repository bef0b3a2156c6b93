"""f 4, 8 and 16 with 4 to 32 channels: each learns, is folded, saved, loaded and cached."""

from itertools import product
from pathlib import Path

import pytest
import torch
from support.parity import same_weights
from torch import Tensor

from latentdiff.data.cache import LatentCache, collate_moments
from latentdiff.data.cache_writer import write_cache
from latentdiff.data.config import DataConfig
from latentdiff.data.dataset import CaptionedImages
from latentdiff.data.shapes import build_shapes
from latentdiff.images import to_floats
from latentdiff.models.vae import VAE, Posterior, VAEConfig
from latentdiff.tasks.vae.evaluation import latent_statistics
from latentdiff.tasks.vae.losses import vae_loss


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> CaptionedImages:
    folder = tmp_path_factory.mktemp("shapes") / "set"
    build_shapes(folder, count=16, seed=0, size=32)
    return CaptionedImages(DataConfig(data=str(folder), image_size=32, num_workers=0))


def new(factor: int, channels: int) -> VAE:
    levels = factor.bit_length()
    return VAE(
        VAEConfig(
            block_out_channels=(4,) * (levels - 1) + (8,),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=channels,
            sample_size=32,
        )
    )


def learn_a_step(vae: VAE, images: Tensor) -> None:
    f, C = vae.config.factor, vae.config.latent_channels
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-2)
    reconstruction, posterior = vae(images, torch.randn(len(images), C, 32 // f, 32 // f))
    loss, _, _ = vae_loss(reconstruction, images, posterior, norm="l1", kl_weight=1e-3)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in vae.parameters())
    optimizer.step()


QUICK = ((4, 4), (8, 16), (16, 32))
each_size = pytest.mark.parametrize(
    ("factor", "channels"),
    [
        pytest.param(*size, marks=[] if size in QUICK else pytest.mark.exhaustive)
        for size in product((4, 8, 16), (4, 8, 16, 32))
    ],
)


@each_size
def test_each_size_goes_the_whole_way_to_the_cache(
    tmp_path: Path, shapes: CaptionedImages, factor: int, channels: int
) -> None:
    vae = new(factor, channels)
    assert vae.config.factor == factor
    pixels = torch.stack([shapes.image(i) for i in range(len(shapes))])
    images = to_floats(pixels)
    learn_a_step(vae, images)
    vae.eval()

    with torch.no_grad():
        before = vae.decode(vae.encode(images).mean)
        vae.fold_latent_statistics(*latent_statistics(vae, pixels))
        mean, std = latent_statistics(vae, pixels)
        torch.testing.assert_close(mean, torch.zeros(channels), rtol=0, atol=1e-4)
        torch.testing.assert_close(std, torch.ones(channels), rtol=0, atol=1e-4)
        again = vae.decode(vae.encode(images).mean)
        torch.testing.assert_close(again, before, rtol=1e-4, atol=1e-4)

    vae.save_pretrained(tmp_path / "vae")
    loaded = VAE.from_pretrained(tmp_path / "vae")
    assert same_weights(loaded, vae)
    write_cache(tmp_path / "cache", shapes, loaded, batch_size=8)
    cache = LatentCache(tmp_path / "cache", vae=vae)
    moments = collate_moments([cache[i] for i in range(len(cache))])["moments"]
    assert moments.shape == (len(shapes), 2 * channels, 32 // factor, 32 // factor)
    with torch.no_grad():
        exact = vae.encode(images)
    stored = Posterior.from_moments(moments)
    torch.testing.assert_close(stored.mean, exact.mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(stored.logvar, exact.logvar, rtol=1e-3, atol=1e-3)
