"""A latent cache for inpainting: what training reads is what the pipeline reads when it draws."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from test_cache import data_config, vae, write, write_images

from latentdiff.data.cache import LatentCache, collate_moments, split_masked
from latentdiff.data.crop_flip import CropFlip
from latentdiff.data.dataset import CaptionedImages
from latentdiff.data.masks import random_mask
from latentdiff.data.samples import Sample
from latentdiff.diffusion import Diffusion
from latentdiff.editing import edit
from latentdiff.images import to_floats, to_pil
from latentdiff.levels import NoiseLevel
from latentdiff.models.inpainting import latent_masks
from latentdiff.models.vae import Posterior
from latentdiff.noise import ImageNoise
from latentdiff.request import Request

MASKED = CropFlip(2, True, masks=3)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> CaptionedImages:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "set", 6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "datasets"))
        return CaptionedImages(data_config(folder / "set"))


@pytest.fixture(scope="module")
def cache(images: CaptionedImages, tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    folder = tmp_path_factory.mktemp("cache")
    write(folder, images, crop_flip=MASKED)
    return LatentCache(folder, vae=vae())


def variants(cache: LatentCache, number: int) -> torch.Tensor:
    pairs = [(number, variant) for variant in range(cache.crop_flip.num_variants)]
    return collate_moments([cache[pair] for pair in pairs])["moments"]


def inpainted(image: torch.Tensor, mask: np.ndarray) -> tuple[torch.Tensor, ...]:
    """The mask and the masked latents that the network gets when an image (3, h, w) is inpainted,
    and the noise that the latents were sampled with.
    """
    request = Request("", image=to_pil(image), mask_image=Image.fromarray(mask), seed=7)
    size = (3, image.shape[1] // 2, image.shape[2] // 2)
    noise, same = (
        ImageNoise(request.seeds, size, device=torch.device("cpu"), dtype=torch.float32)
        for _ in range(2)
    )
    level = Diffusion("flow", "flow_prediction").levels(1)[0]
    seen = list[torch.Tensor]()

    def network(x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        seen.append(x)
        return x

    with torch.no_grad():
        x, denoise = edit(request, network, level, noise, vae=vae(), inpainting_unet=True)
        denoise(x, level)
    assert x.equal(same())
    _, masks, masked = seen[0].split([3, 1, 3], dim=1)
    return masks, masked, same()


def test_training_reads_what_the_pipeline_reads(
    cache: LatentCache, images: CaptionedImages
) -> None:
    """Of every variant, at three shapes: the mask exactly, the latents as far as float16 goes."""
    half = torch.finfo(torch.float16)
    [(_, samples)] = images.chunks(len(images), lambda number: True)
    for number, sample in enumerate(samples):
        assert isinstance(sample, Sample)
        size = cache.sizes[cache.buckets[number]]
        views = to_floats(MASKED.views(sample.image, sample.name, size))
        image, masks, masked = split_masked(variants(cache, number))
        for variant, view in enumerate(views.repeat_interleave(3, 0)):
            pixels = random_mask(f"{sample.name}/{variant}", size)
            mask, latents, eps = inpainted(view, pixels)
            assert masks[variant].equal(mask[0])
            found = Posterior.from_moments(masked[variant][None]).sample(eps)
            torch.testing.assert_close(found, latents, rtol=2 * half.eps, atol=2 * half.eps)
            with torch.no_grad():
                posterior = vae().encode(view[None])
            mean, logvar = image[variant][None].chunk(2, dim=1)
            for stored, exact in ((mean, posterior.mean), (logvar, posterior.logvar)):
                torch.testing.assert_close(stored, exact, rtol=0.51 * half.eps, atol=1e-6)


def test_the_first_variants_mask_is_known_in_pixels(cache: LatentCache) -> None:
    for number in range(len(cache)):
        mask, moments = cache.mask(number), cache[number]["moments"][None]
        width, height = cache.sizes[cache.buckets[number]]
        assert mask.shape == (1, height, width)
        assert latent_masks(mask[None], moments).equal(split_masked(moments)[1])


def test_variants_have_masks_of_their_own_which_two_images_do_not_share(
    cache: LatentCache,
) -> None:
    masks = [MASKED.random_masks(name, (32, 32)) for name in ("a", "b")]
    assert masks[0].equal(MASKED.random_masks("a", (32, 32)))
    assert len({mask.numpy().tobytes() for both in masks for mask in both if not mask.all()}) > 12


def test_a_cache_without_masks_is_what_it_was(tmp_path: Path, images: CaptionedImages) -> None:
    """Its header, and so its fingerprint, knows of no masks."""
    write(tmp_path, images)
    cache = LatentCache(tmp_path)
    assert cache.header["views"] == {"crops": 2, "flip": True}
    assert cache[0]["moments"].shape[0] == 6
    assert cache.crop_flip == CropFlip(2, True)


def test_fewer_than_no_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="masks=-1 must be at least 0"):
        CropFlip(masks=-1)
