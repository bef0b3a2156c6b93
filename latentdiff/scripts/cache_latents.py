"""Encode a data set once, for train_unet.py: `python -m latentdiff.scripts.cache_latents`."""

from latentdiff.training.help import show_help

if __name__ == "__main__":  # before the imports, which take seconds
    show_help("latentdiff.scripts.cache_latents", "CacheLatents")

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from latentdiff.data.bad_samples import breakdown
from latentdiff.data.cache import LatentCache
from latentdiff.data.cache_writer import CHUNK, write_cache
from latentdiff.data.config import DataConfig
from latentdiff.data.crop_flip import CropFlip
from latentdiff.data.latent_check import check_latents
from latentdiff.data.opening import open_images
from latentdiff.data.reconstruction_check import ReconstructionLimits
from latentdiff.models.vae import VAE
from latentdiff.options import group, option
from latentdiff.tasks.frozen import frozen_component
from latentdiff.training.accelerator import exact_accelerator
from latentdiff.training.command_line import parse_config, run_script, write_config
from latentdiff.training.processes import Processes

WEEK = 7 * 24 * 3600  # seconds


@dataclass(frozen=True)
class CacheLatents:
    """Encode images with a trained VAE and keep the posterior moments and the captions.

    Run again on a finished cache, it reads the captions anew and encodes nothing.
    """

    FIRST: ClassVar[Sequence[str]] = (
        "data",
        "vae",
        "output_dir",
        "image_size",
        "bucket_step",
        "crops",
        "caption_columns",
        "batch_size",
        "check_latents",
    )
    EXAMPLES: ClassVar[Sequence[str]] = (
        "--data images --vae runs/mine/vae/model --output_dir runs/mine/cache",
    )
    NEEDS: ClassVar[Mapping[str, str]] = {"shuffle_buffer": ""}  # samples keep their order

    output_dir: Path = Path("runs/shapes/cache")
    vae: str | None = None
    """The VAE's folder, that of a pipeline, or "emoji", the embedded one, which is the default for
    "shapes" alone."""
    batch_size: int = 64
    """Images that are encoded at a time."""
    check_latents: bool = option(True, former_name="gate")
    """Refuse a VAE whose latents are not fit to train on; false warns and goes on."""
    chunk_size: int = CHUNK
    """Samples of a file: a process that is killed has to encode the last so many again."""
    data: DataConfig = group(DataConfig)
    reconstruction: ReconstructionLimits = group(ReconstructionLimits)
    crop_flip: CropFlip = group(CropFlip)

    def __post_init__(self) -> None:
        for name in ("batch_size", "chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def main() -> None:
    """Run it with the options of the command line."""
    config, settings = parse_config(CacheLatents)
    accelerator = exact_accelerator()
    # The first process that is done waits for the last, which is no sign of a fault.
    processes = Processes(accelerator, timeout=WEEK)
    dataset = processes.main_first(lambda: open_images(config.data))
    folder = frozen_component("vae", config.vae, data=config.data.data, say=accelerator.print)
    vae = VAE.from_pretrained(folder).to(accelerator.device)
    check = partial(
        check_latents,
        vae,
        dataset,
        folder,
        batch_size=config.batch_size,
        refuse=config.check_latents,
        limits=config.reconstruction,
    )
    try:
        said = write_cache(
            config.output_dir,
            dataset,
            vae,
            batch_size=config.batch_size,
            crop_flip=config.crop_flip,
            chunk_size=config.chunk_size,
            rank=processes.rank,
            world_size=processes.count,
            on_all=processes.on_all,
            check=check,
        )
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(
            f"interrupted; {config.output_dir} keeps each {config.chunk_size} images that are "
            "encoded, and the same command goes on from there"
        ) from interrupt
    if accelerator.is_main_process:
        write_config(settings, config.output_dir)
        cache = LatentCache(config.output_dir)
        sizes = Counter(cache.sizes[bucket] for bucket in cache.buckets.tolist())
        shapes = ", ".join(f"{count} of {w} x {h}" for (w, h), count in sorted(sizes.items()))
        bad = dataset.left_out + Counter(cache.header["left_out"])
        left_out = f"; left out: {breakdown(bad)}" if bad else ""
        print(f"{len(cache)} images are in {config.output_dir}: {shapes}{left_out}")
        if said:
            print(said)
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
