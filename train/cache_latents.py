"""Encode a data set once, for train_unet.py: accelerate launch train/cache_latents.py."""

from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from latentdiff.data.cache import write_cache
from latentdiff.data.images import CaptionedImages, DataConfig
from latentdiff.formats.diffusers import find_part
from latentdiff.models.vae import VAE
from latentdiff.training.config import parse_config, run_script, write_config
from latentdiff.training.loop import uses_cpu


@dataclass(frozen=True)
class CacheLatents(DataConfig):
    """Encode pictures with a trained VAE and keep the posterior moments and the captions."""

    output_dir: Path = Path("runs/shapes/cache")
    vae: str = "emoji"
    """The VAE's folder, that of a pipeline, or "emoji", the embedded one."""
    batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")


def main() -> None:
    config, text = parse_config(CacheLatents)
    accelerator = Accelerator(cpu=uses_cpu(), mixed_precision="no")  # written once, so exactly
    vae = VAE.from_pretrained(find_part(config.vae, "vae")).to(accelerator.device)
    with accelerator.main_process_first():
        dataset = CaptionedImages(config)
    write_cache(
        config.output_dir,
        dataset,
        vae,
        batch_size=config.batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        wait=accelerator.wait_for_everyone,
    )
    if accelerator.is_main_process:
        write_config(text, config.output_dir)
        print(f"{len(dataset)} pictures are in {config.output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
