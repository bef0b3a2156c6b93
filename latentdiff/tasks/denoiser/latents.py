"""The latent cache that a denoiser is trained on, opened or written first, and its batches."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentdiff.data.batches import batches, check_batch
from latentdiff.data.buckets import small_buckets
from latentdiff.data.cache import LatentCache, collate_moments
from latentdiff.data.cache_captions import changed_data
from latentdiff.data.cache_writer import write_cache
from latentdiff.data.joined import Chosen, JoinedLatents, collate_joined
from latentdiff.data.latent_check import check_latents
from latentdiff.data.opening import open_images
from latentdiff.data.resident import ResidentLatents
from latentdiff.models.dit import DiT
from latentdiff.models.unet import UNet
from latentdiff.models.vae import VAE
from latentdiff.tasks.denoiser.config import TrainUNet
from latentdiff.training.randomness import choose, generator
from latentdiff.training.run import Run
from latentdiff.training.validation import Subset


def open_cache(
    config: TrainUNet, run: Run, load_vae: Callable[[str | None], tuple[VAE, Path | None]]
) -> tuple[LatentCache, VAE]:
    """The cache that the configuration names, or a new one of its data; and the VAE of its latents.

    `load_vae(data)` gets the VAE to train beside, on the CPU, and its folder, or None for one that
    a UNet was trained on before, whose latents are not checked; `data` is None where nobody knows
    it. Where the data has changed since the cache was made, that is said. Raises ValueError for
    less data than a batch.
    """
    say = run.accelerator.print
    # Beside class images the data's are repeated.
    batch_size = 1 if config.prior.is_on else config.loop.batch_size
    if config.cache is not None:
        cache = LatentCache(config.cache)
        _check_masks(cache, inpainting=config.inpainting)
        check_batch(batch_size, len(cache))
        vae = load_vae(cache.data)[0].to(run.device)
        cache.check_vae(vae)
        run.processes.on_main(lambda: _say_changes(cache))
        return cache, vae
    dataset = run.processes.main_first(lambda: open_images(config.data))
    if dataset.num_samples is not None:  # that of a stream is known when it is cached
        check_batch(batch_size, dataset.num_samples)
    vae, vae_folder = load_vae(config.data.data)
    vae.to(run.device)

    def check() -> None:
        if vae_folder is not None:
            check_latents(
                vae,
                dataset,
                vae_folder,
                batch_size=64,
                refuse=config.check_latents,
                limits=config.reconstruction,
                say=say,
            )

    cache_folder = config.loop.output_dir / "cache"
    said = write_cache(
        cache_folder,
        dataset,
        vae,
        batch_size=64,
        crop_flip=config.crop_flip,
        rank=run.processes.rank,
        world_size=run.processes.count,
        on_all=run.processes.on_all,
        check=check,
    )
    if said:
        say(said)
    return LatentCache(cache_folder), vae


def _say_changes(cache: LatentCache) -> None:
    if (data := changed_data(cache)) is not None:
        print(
            f"data={data} has changed since {cache.folder} was made of it, and this run trains on "
            "the cache as it is: latentdiff.scripts.cache_latents, run again (of a project, "
            "`latentdiff train PROJECT cache`), reads the captions anew and encodes nothing"
        )


def _check_masks(cache: LatentCache, *, inpainting: bool) -> None:
    masks = cache.crop_flip.masks
    if inpainting and not masks:
        raise ValueError(
            f"{cache.folder} has no masked images, which inpainting=true needs; make a cache with "
            "latentdiff.scripts.cache_latents --masks 4"
        )
    if masks and not inpainting:
        raise ValueError(
            f"{cache.folder} has masks={masks} and is for inpainting=true; make a cache without "
            "masks"
        )


def check_sizes(cache: LatentCache, vae: VAE, unet: UNet | DiT) -> None:
    """Raise ValueError for a cache with a size that the network cannot take."""
    multiple = vae.config.factor * unet.multiple
    for width, height in cache.sizes:
        if width % multiple or height % multiple:
            raise ValueError(
                f"patch_size={unet.multiple} needs sides divisible by {multiple} pixels, and the "
                f"cache has {width}x{height}; choose another patch_size, image_size or bucket_step"
            )


def warn_of_small_sizes(cache: LatentCache, val: np.ndarray, batch_size: int) -> None:
    """Warn of sizes with fewer examples than a batch, without those of the validation split."""
    buckets = np.delete(cache.buckets, val)
    counts = np.bincount(buckets, minlength=len(cache.sizes)).tolist()
    names = (f"{width}x{height}" for width, height in cache.sizes)
    if sentence := small_buckets(dict(zip(names, counts, strict=True)), batch_size):
        warnings.warn(sentence, stacklevel=2)


def latent_batches(
    start: int,
    *,
    cache: LatentCache,
    val: np.ndarray,
    config: TrainUNet,
    run: Run,
    prior: JoinedLatents | None = None,
) -> Iterator[dict[str, Any]]:
    """This process's batches of moments and captions from step `start` on, see `collate_moments`.

    `val` (n,) are the indices of the validation split. With `in_memory` they are those of
    `ResidentLatents`, which have rows in place of captions. With `prior` they are of both its
    kinds and have rows.
    """
    loop = config.loop

    def variants(step: int) -> list[int]:
        """Which variant of each example of a global batch is seen."""
        u = torch.rand(loop.batch_size, generator=generator(loop.seed, step, "view"))
        return choose([range(cache.crop_flip.num_variants)] * loop.batch_size, u.tolist())

    options: dict[str, Any] = {
        "batch_size": loop.batch_size,
        "seed": loop.seed,
        "stop": loop.max_steps,
        "rank": run.processes.rank,
        "world_size": run.processes.count,
        "variants": variants,
    }
    if config.compute.in_memory:
        resident = ResidentLatents(cache if prior is None else prior, run.device)
        run.accelerator.print(f"in memory: {resident.summary()}")
        left = np.delete(np.arange(len(cache)), val)
        examples = left if prior is None else prior.examples
        return resident.batches(start, examples=examples, **options)
    if prior is None:
        train, buckets, collate = Subset(cache, val), np.delete(cache.buckets, val), collate_moments
    else:
        train, buckets = Chosen(prior, prior.examples), prior.buckets[prior.examples]
        collate = collate_joined
    return batches(
        train,
        start,
        num_samples=len(train),
        num_workers=config.data.num_workers,
        collate=collate,
        buckets=buckets,
        **options,
    )
