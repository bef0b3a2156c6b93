"""Train the denoising UNet on cached latents: accelerate launch train/train_unet.py [--key value …]."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from latentdiff.data.batches import batches, shard
from latentdiff.data.cache import LatentCache, collate_moments, write_cache
from latentdiff.data.images import CaptionedImages, DataConfig
from latentdiff.diffusion import Diffusion
from latentdiff.formats.diffusers import find_part
from latentdiff.models.text import TextEncoder
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.models.vae import VAE
from latentdiff.pipeline import Pipeline, picture_grid
from latentdiff.training.config import parse_config, run_script, write_config
from latentdiff.training.learner import Learner, OptimizerConfig
from latentdiff.training.loop import LoopConfig, Metrics, fit, make_accelerator
from latentdiff.training.randomness import choose, generator

SMALL = UNetConfig(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(64, 128, 256),
    layers_per_block=1,
    attention_head_dim=(1, 2, 4),
    use_linear_projection=True,
)


@dataclass(frozen=True)
class TrainUNet(DataConfig, LoopConfig, OptimizerConfig):
    """Train a UNet to denoise the latents of captioned pictures; leaves a whole pipeline folder."""

    output_dir: Path = Path("runs/shapes/unet")
    max_steps: int = 2000
    batch_size: int = 64
    learning_rate: float = 1e-3
    cooldown_steps: int = 500
    cache: Path | None = None
    """What cache_latents.py made; without it `data` is encoded first, into the run folder."""
    vae: str = "emoji"
    """Folder of the VAE or of a pipeline, or "emoji", the embedded one."""
    text_encoder: str = "emoji"
    """Folder with text_encoder/ and tokenizer/, or "emoji"."""
    diffusion: Diffusion = field(default_factory=lambda: Diffusion("flow", "flow_prediction"))
    unet: UNetConfig = field(default_factory=lambda: SMALL)
    """Channels, context width and sample_size follow from VAE, text encoder and cache."""
    caption_dropout: float = 0.1
    """Share of examples whose caption is emptied, for classifier-free guidance."""
    preview_prompts: Sequence[str] = ()
    """Captions of the preview grid; by default eight of the training data's."""


def main() -> None:
    config, text = parse_config(TrainUNet)
    accelerator = make_accelerator(config)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    if accelerator.is_main_process:
        write_config(text, config.output_dir)
    vae = VAE.from_pretrained(find_part(config.vae, "vae")).to(accelerator.device)
    text_encoder = TextEncoder.from_pretrained(find_part(config.text_encoder, "text_encoder"))
    text_encoder.to(accelerator.device)
    cache = open_cache(config, vae, rank, world_size, accelerator.wait_for_everyone)
    latent = (vae.config.latent_channels, *cache.moments.shape[2:])
    unet_config = replace(
        config.unet,
        in_channels=latent[0],
        out_channels=latent[0],
        sample_size=latent[1],
        cross_attention_dim=text_encoder.width,
    )
    torch.manual_seed(config.seed)
    learner = Learner(UNet(unet_config), config, accelerator)
    diffusion = config.diffusion

    def draw(number: int, purpose: str, *shape: int) -> torch.Tensor:
        """This process's rows of a global batch of N(0, I), (B, *shape)."""
        source = generator(config.seed, number, purpose)
        whole = torch.randn(config.batch_size, *shape, generator=source)
        return shard(whole, rank, world_size).to(accelerator.device)

    def step(batch: dict[str, Any], number: int) -> Metrics:
        x0 = batch["posterior"].to(accelerator.device).sample(draw(number, "posterior", *latent))
        context = text_encoder(captions(batch, number))
        t = diffusion.sample_t(config.batch_size, generator=generator(config.seed, number, "t"))
        t = shard(t, rank, world_size).to(accelerator.device)
        noise = draw(number, "noise", *latent)
        # Algorithm 1 (Ho et al. 2020): take a gradient step on the error of the prediction.
        loss = diffusion.loss(learner.model, x0, context, noise=noise, t=t).mean()
        return {"loss": loss, "grad_norm": learner.update(loss)}

    def captions(batch: dict[str, Any], number: int) -> list[str]:
        """One caption an example, or none: the same whatever the number of processes."""
        keep = torch.rand(config.batch_size, generator=generator(config.seed, number, "dropout"))
        words = choose(batch["captions"], generator(config.seed, number, f"caption {rank}"))
        kept = shard(keep >= config.caption_dropout, rank, world_size).tolist()
        return [word if keep_it else "" for word, keep_it in zip(words, kept, strict=True)]

    def data(start: int) -> Iterator[dict[str, Any]]:
        return batches(
            cache,
            start,
            num_samples=len(cache),
            batch_size=config.batch_size,
            seed=config.seed,
            stop=config.max_steps,
            rank=rank,
            world_size=world_size,
            num_workers=config.num_workers,
            collate=collate_moments,
        )

    ema = learner.ema
    assert isinstance(ema, UNet)
    pipeline = Pipeline(unet=ema, vae=vae, text_encoder=text_encoder, diffusion=diffusion)
    shown = list(config.preview_prompts) or [
        cache.captions[i * len(cache) // 8][0] for i in range(8)
    ]

    def preview(path: Path) -> None:
        drawn = pipeline(shown, seed=config.seed, steps=20, guidance_scale=4.0, progress=False)
        picture_grid(drawn.images, shown).save(path)

    fit(
        step,
        data,
        {"unet": learner},
        config,
        accelerator,
        save=pipeline.save_pretrained,
        preview=preview,
    )


def open_cache(config: TrainUNet, vae: VAE, rank: int, world_size: int, wait: Any) -> LatentCache:
    """The cache that the configuration names, or one made now from its data."""
    folder = config.cache if config.cache is not None else config.output_dir / "cache"
    if config.cache is None:
        dataset = CaptionedImages(config)
        write_cache(
            folder, dataset, vae, batch_size=64, rank=rank, world_size=world_size, wait=wait
        )
    return LatentCache(folder, vae=vae)


if __name__ == "__main__":
    run_script(main)
