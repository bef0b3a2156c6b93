"""Train the denoiser, a UNet or a DiT, on cached latents: accelerate launch train/train_unet.py."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers.utils import logging

from latentdiff.data.batches import batches, check_batch
from latentdiff.data.cache import LatentCache, collate_moments
from latentdiff.data.cache_writer import write_cache
from latentdiff.data.config import DataConfig
from latentdiff.data.crop_flip import CropFlip
from latentdiff.data.dataset import CaptionedImages
from latentdiff.data.latent_check import check_latents
from latentdiff.data.opening import open_images
from latentdiff.data.summary import cache_summary
from latentdiff.diffusion import Diffusion
from latentdiff.formats.diffusers import find_part
from latentdiff.images import image_grid
from latentdiff.models.dit import DiT, DiTConfig
from latentdiff.models.fingerprint import fingerprint
from latentdiff.models.text import TextEncoder
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.models.vae import VAE, Posterior
from latentdiff.pipeline import Pipeline
from latentdiff.training.config import parse_config, run_script
from latentdiff.training.learner import Learner, OptimizerConfig
from latentdiff.training.loop import fit
from latentdiff.training.meter import Metrics
from latentdiff.training.objective import Objective, Uncertainty
from latentdiff.training.processes import Processes
from latentdiff.training.randomness import Share, choose, generator, parts
from latentdiff.training.run_folder import RunFolder
from latentdiff.training.setup import LoopConfig, make_accelerator
from latentdiff.training.validation import BINS, Rest, held_out, held_out_loss, stratified_t

SMALL = UNetConfig(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(64, 128, 256),
    layers_per_block=1,
    attention_head_dim=(1, 2, 4),
    use_linear_projection=True,
)


@dataclass(frozen=True)
class TrainUNet(DataConfig, CropFlip, LoopConfig, OptimizerConfig, Objective):
    """Train a UNet or a DiT to denoise latents of captioned images; leaves a pipeline folder."""

    output_dir: Path = Path("runs/shapes/unet")
    max_steps: int = 800
    batch_size: int = 64
    learning_rate: float = 1e-3
    cooldown_steps: int = 300
    cache: Path | None = None
    """What cache_latents.py made, with its sizes, crops and flips; without it `data`
    is encoded first, into the run folder."""
    vae: str = "emoji"
    """Folder of the VAE or of a pipeline, or "emoji", the embedded one."""
    check_latents: bool = True
    """Where `data` is encoded: refuse a VAE whose latents are not fit to train on; false warns."""
    text_encoder: str = "emoji"
    """Folder with text_encoder/ and tokenizer/, or "emoji"."""
    diffusion: Diffusion = field(default_factory=lambda: Diffusion("flow", "flow_prediction"))
    unet: UNetConfig = field(default_factory=lambda: SMALL)
    """Channels, context width and sample_size follow from VAE, text encoder and cache."""
    dit: DiTConfig | None = None
    """Given, a diffusion transformer is trained in the UNet's place; the same three follow."""
    caption_dropout: float = 0.1
    """Share of examples whose caption is emptied, for classifier-free guidance."""
    held_out: float = 0.01
    """Share of the examples, 256 at most, that are kept out of training for `held_out_loss`."""
    preview_prompts: Sequence[str] = ()
    """Captions of the preview grid; by default up to eight of the training data's."""

    def __post_init__(self) -> None:
        for part in (DataConfig, CropFlip, LoopConfig, OptimizerConfig, Objective):
            part.__post_init__(self)
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout={self.caption_dropout} must be in [0, 1]")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out={self.held_out} must be in [0, 1)")
        self.check(self.diffusion)


def main() -> None:
    config, settings = parse_config(TrainUNet)
    logging.disable_progress_bar()  # transformers' would break into ours
    # Captions of training may be longer; nobody wants to read that of each of them.
    warnings.filterwarnings("ignore", "the prompt .* tokens and the text encoder reads")
    accelerator = make_accelerator(config)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    processes = Processes(accelerator, timeout=config.timeout)
    run = RunFolder(config.output_dir, settings, processes)
    cache, vae = open_cache(config, accelerator, processes)
    held = held_out(len(cache), config.held_out, seed=config.seed)
    examples = Rest(cache, held)
    check_batch(config.batch_size, len(examples))
    text_encoder = TextEncoder.from_pretrained(find_part(config.text_encoder, "text_encoder"))
    text_encoder.to(accelerator.device)
    C = vae.config.latent_channels
    network = replace(
        config.unet if config.dit is None else config.dit,
        in_channels=C,
        out_channels=2 * C if config.diffusion.learned_variance else C,
        sample_size=cache.image_size // vae.config.factor,
        cross_attention_dim=text_encoder.width,
    )
    torch.manual_seed(config.seed)
    unet = UNet(network) if isinstance(network, UNetConfig) else DiT(network)
    check_sizes(cache, vae, unet)
    learner = Learner(unet, config, accelerator)
    learners = {"unet" if isinstance(unet, UNet) else "dit": learner}
    if config.weighting == "uncertainty":
        whole = replace(config, sharding="none")
        learners["uncertainty"] = Learner(Uncertainty(), whole, accelerator, averaged=False)
    diffusion = config.diffusion

    def step(batch: dict[str, Any], number: int, share: Share) -> Metrics:
        shape = (config.batch_size, C, *batch["moments"].shape[2:])  # of this step's size

        def draw(purpose: str) -> torch.Generator:
            return generator(config.seed, number, purpose)

        def own(whole: torch.Tensor) -> torch.Tensor:
            """This part's rows of a global batch."""
            return share.rows(whole).to(accelerator.device)

        posterior = Posterior.from_moments(batch["moments"].to(accelerator.device))
        x0 = posterior.sample(own(torch.randn(shape, generator=draw("posterior"))))
        with accelerator.autocast():
            context = text_encoder(captions(batch, number, share))
        t = own(config.sample_t(diffusion, config.batch_size, generator=draw("t")))
        noise = own(config.noise(shape, generator=draw("noise")))
        # Algorithm 1 (Ho et al. 2020): take a gradient step on the error of the prediction.
        losses, bound = diffusion.losses(learner.model, x0, context, noise=noise, t=t)
        metrics = {"loss": losses.mean()}
        weight = config.weight(diffusion, t).to(losses)
        if "uncertainty" in learners:
            u = learners["uncertainty"].model(*diffusion.alpha_sigma(t))
            weight = torch.exp(-u.detach())
            own_loss = (losses.detach() * torch.exp(-u) + u).mean()
            metrics["grad_norm_uncertainty"] = learners["uncertainty"].update(own_loss, share)
            metrics["uncertainty"] = u.mean()
        loss = (weight * losses).mean()
        if bound is not None:
            metrics["bound"] = bound.mean()
            loss = loss + config.vlb_weight * metrics["bound"]
        return metrics | {"grad_norm": learner.update(loss, share)}

    def captions(batch: dict[str, Any], number: int, share: Share) -> list[str]:
        """One caption an example, or none: the same whatever the number of parts."""
        source = generator(config.seed, number, "caption")
        draws = share.rows(torch.rand(config.batch_size, 2, generator=source)).tolist()
        words = choose(batch["captions"], [place for place, _ in draws])
        kept = [dropout >= config.caption_dropout for _, dropout in draws]
        return [word if keep_it else "" for word, keep_it in zip(words, kept, strict=True)]

    def variants(number: int) -> list[int]:
        """Which variant of each example of a global batch is seen."""
        places = torch.rand(config.batch_size, generator=generator(config.seed, number, "view"))
        return choose([range(cache.crop_flip.num_variants)] * config.batch_size, places.tolist())

    def data(start: int) -> Iterator[dict[str, Any]]:
        shares = batches(
            examples,
            start,
            num_samples=len(examples),
            batch_size=config.batch_size,
            seed=config.seed,
            stop=config.max_steps,
            rank=rank,
            world_size=world_size,
            num_workers=config.num_workers,
            collate=collate_moments,
            buckets=np.delete(cache.buckets, held),
            variants=variants,
        )
        return parts(shares, config.accumulation)

    ema = learner.ema
    assert isinstance(ema, UNet | DiT)
    held_t = stratified_t(diffusion, len(held), seed=config.seed).to(accelerator.device)

    def score(places: Sequence[int]) -> torch.Tensor:
        """Losses of held-out examples of one size, (B, BINS): each with its caption and noise."""
        numbers = held[places].tolist()
        sources = [generator(config.seed, number, "held out noise") for number in numbers]

        def draw(*shape: int) -> torch.Tensor:
            """Each example's own N(0, I), (B, *shape)."""
            drawn = [torch.randn(*shape, generator=source) for source in sources]
            return torch.stack(drawn).to(accelerator.device)

        batch = collate_moments([cache[number] for number in numbers])
        words = choose(batch["captions"], [float(torch.rand((), generator=s)) for s in sources])
        size = batch["moments"].shape[2:]
        x0 = Posterior.from_moments(batch["moments"].to(accelerator.device)).sample(draw(C, *size))
        noise = draw(BINS, C, *size).flatten(0, 1)
        with torch.no_grad(), accelerator.autocast():
            x0, context = (x.repeat_interleave(BINS, 0) for x in (x0, text_encoder(words)))
            losses = diffusion.loss(ema, x0, context, noise=noise, t=held_t[places].flatten())
        return losses.unflatten(0, (-1, BINS))

    def validate() -> Metrics:
        part = config.batch_size // (world_size * config.accumulation)
        buckets = cache.buckets[held].tolist()
        return held_out_loss(score, buckets, batch_size=max(1, part // BINS), processes=processes)

    pipeline = Pipeline(unet=ema, vae=vae, text_encoder=text_encoder, diffusion=diffusion)
    spread = (cache.captions[i * len(cache) // 8][0] for i in range(8))
    shown = list(config.preview_prompts or dict.fromkeys(spread))

    def preview(path: Path) -> None:
        drawn = pipeline(shown, seed=config.seed, steps=20, guidance_scale=4.0, progress=False)
        image_grid(drawn.images, shown).save(path)

    fit(
        step,
        data,
        learners,
        config,
        accelerator,
        run,
        save=pipeline.save_pretrained,
        preview=preview,
        validate=validate if len(held) else None,
        fingerprints={
            "data": cache.fingerprint,
            "vae": cache.header["vae"],
            "text_encoder": fingerprint(text_encoder.model, {}),
        },
        summary=cache_summary(
            cache,
            config.location() if config.cache is None else str(config.cache),
            held_out=len(held),
        ),
    )


def check_sizes(cache: LatentCache, vae: VAE, unet: UNet | DiT) -> None:
    """Raise ValueError for a cache with a size that the network cannot take."""
    needed = vae.config.factor * unet.multiple
    for width, height in cache.sizes:
        if width % needed or height % needed:
            raise ValueError(
                f"patch_size={unet.multiple} needs sides divisible by {needed} pixels, and the "
                f"cache has {width}x{height}; choose another patch_size, image_size or bucket_step"
            )


def open_cache(
    config: TrainUNet, accelerator: Accelerator, processes: Processes
) -> tuple[LatentCache, VAE]:
    """The cache that the configuration names, or one made now from its data; and its VAE.

    Raises ValueError for less data than a batch, before any network is loaded.
    """

    def load_vae() -> VAE:
        return VAE.from_pretrained(find_part(config.vae, "vae")).to(accelerator.device)

    if config.cache is not None:
        cache = LatentCache(config.cache)
        check_batch(config.batch_size, len(cache))
        vae = load_vae()
        cache.check_vae(vae)
        return cache, vae
    dataset = processes.in_turn(lambda: open_images(config))
    if isinstance(dataset, CaptionedImages):  # how much a stream holds is known when it is cached
        check_batch(config.batch_size, len(dataset))
    vae, folder = load_vae(), find_part(config.vae, "vae")
    write_cache(
        config.output_dir / "cache",
        dataset,
        vae,
        batch_size=64,
        crop_flip=CropFlip(crops=config.crops, flip=config.flip),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        together=processes.everywhere,
        check=partial(
            check_latents, vae, dataset, folder, batch_size=64, refuse=config.check_latents
        ),
    )
    return LatentCache(config.output_dir / "cache"), vae


if __name__ == "__main__":
    run_script(main)
