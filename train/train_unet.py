"""Train the denoising UNet on cached latents: accelerate launch train/train_unet.py."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers.utils import logging

from latentdiff.data.batches import batches
from latentdiff.data.cache import LatentCache, collate_moments, write_cache
from latentdiff.data.images import CaptionedImages, DataConfig
from latentdiff.diffusion import Diffusion
from latentdiff.formats.diffusers import find_part
from latentdiff.models.fingerprint import fingerprint
from latentdiff.models.text import TextEncoder
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.models.vae import VAE, Posterior
from latentdiff.pictures import picture_grid
from latentdiff.pipeline import Pipeline
from latentdiff.training.config import parse_config, run_script
from latentdiff.training.learner import Learner, OptimizerConfig
from latentdiff.training.loop import LoopConfig, Metrics, fit, make_accelerator
from latentdiff.training.processes import Processes
from latentdiff.training.randomness import Share, choose, generator, parts
from latentdiff.training.run_folder import RunFolder

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
    max_steps: int = 800
    batch_size: int = 64
    learning_rate: float = 1e-3
    cooldown_steps: int = 300
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
    timestep_shift: float = 1.0
    """Above 1 a flow is trained more at high noise; 1 is uniform."""
    preview_prompts: Sequence[str] = ()
    """Captions of the preview grid; by default eight of the training data's."""

    def __post_init__(self) -> None:
        for part in (DataConfig, LoopConfig, OptimizerConfig):
            part.__post_init__(self)
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout={self.caption_dropout} must be in [0, 1]")


def main() -> None:
    config, settings = parse_config(TrainUNet)
    logging.disable_progress_bar()  # transformers' would break into ours
    # Captions of training may be longer; nobody wants to read that of each of them.
    warnings.filterwarnings("ignore", "the prompt .* tokens and the text encoder reads")
    accelerator = make_accelerator(config)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    run = RunFolder(config.output_dir, settings, Processes(accelerator))
    vae = VAE.from_pretrained(find_part(config.vae, "vae")).to(accelerator.device)
    text_encoder = TextEncoder.from_pretrained(find_part(config.text_encoder, "text_encoder"))
    text_encoder.to(accelerator.device)
    cache = open_cache(config, vae, accelerator)
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

    def step(batch: dict[str, Any], number: int, share: Share) -> Metrics:
        def draw(purpose: str) -> torch.Tensor:
            """This part's rows of a global batch of N(0, I), (B, *latent)."""
            source = generator(config.seed, number, purpose)
            whole = torch.randn(config.batch_size, *latent, generator=source)
            return share.rows(whole).to(accelerator.device)

        posterior = Posterior.from_moments(batch["moments"].to(accelerator.device))
        x0 = posterior.sample(draw("posterior"))
        with accelerator.autocast():
            context = text_encoder(captions(batch, number, share))
        t = diffusion.sample_t(
            config.batch_size,
            generator=generator(config.seed, number, "t"),
            shift=config.timestep_shift,
        )
        t = share.rows(t).to(accelerator.device)
        noise = draw("noise")
        # Algorithm 1 (Ho et al. 2020): take a gradient step on the error of the prediction.
        loss = diffusion.loss(learner.model, x0, context, noise=noise, t=t).mean()
        return {"loss": loss, "grad_norm": learner.update(loss, share)}

    def captions(batch: dict[str, Any], number: int, share: Share) -> list[str]:
        """One caption an example, or none: the same whatever the number of parts."""
        source = generator(config.seed, number, "caption")
        draws = share.rows(torch.rand(config.batch_size, 2, generator=source)).tolist()
        words = choose(batch["captions"], [place for place, _ in draws])
        kept = [dropout >= config.caption_dropout for _, dropout in draws]
        return [word if keep_it else "" for word, keep_it in zip(words, kept, strict=True)]

    def data(start: int) -> Iterator[dict[str, Any]]:
        shares = batches(
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
        return parts(shares, config.accumulation)

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
        run,
        save=pipeline.save_pretrained,
        preview=preview,
        fingerprints={
            "data": cache.header["data"],
            "vae": cache.header["vae"],
            "text_encoder": fingerprint(text_encoder.model, {}),
        },
    )


def open_cache(config: TrainUNet, vae: VAE, accelerator: Accelerator) -> LatentCache:
    """The cache that the configuration names, or one made now from its data."""
    if config.cache is not None:
        return LatentCache(config.cache, vae=vae)
    with accelerator.main_process_first():
        dataset = CaptionedImages(config)
    write_cache(
        config.output_dir / "cache",
        dataset,
        vae,
        batch_size=64,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        wait=accelerator.wait_for_everyone,
    )
    return LatentCache(config.output_dir / "cache", vae=vae)


if __name__ == "__main__":
    run_script(main)
