"""Train the autoencoder on pictures alone: accelerate launch train/train_vae.py."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from latentdiff.data.batches import batches
from latentdiff.data.cache import data_fingerprint
from latentdiff.data.images import CaptionedImages, DataConfig, collate
from latentdiff.models.vae import VAE, Posterior, VAEConfig
from latentdiff.pictures import picture_grid, to_floats, to_pil
from latentdiff.training.config import parse_config, run_script
from latentdiff.training.learner import Learner, OptimizerConfig
from latentdiff.training.loop import LoopConfig, Metrics, fit, make_accelerator
from latentdiff.training.losses import Reconstruction, vae_loss
from latentdiff.training.processes import Processes
from latentdiff.training.randomness import Share, generator, parts
from latentdiff.training.run_folder import RunFolder

SMALL = VAEConfig(
    block_out_channels=(32, 64, 128),
    layers_per_block=1,
    norm_num_groups=16,
    mid_block_add_attention=False,
)


@dataclass(frozen=True)
class TrainVAE(DataConfig, LoopConfig, OptimizerConfig):
    """Train a VAE on pictures: reconstruction plus KL. Captions are never read."""

    output_dir: Path = Path("runs/shapes/vae")
    max_steps: int = 600
    batch_size: int = 16
    learning_rate: float = 1e-3
    cooldown_steps: int = 200
    caption_columns: tuple[str, ...] = ()
    vae: VAEConfig = field(default_factory=lambda: SMALL)
    """`sample_size` follows image_size."""
    reconstruction: Reconstruction = "l1"
    kl_weight: float = 1e-3
    """Weight of the KL in nats per pixel value."""

    def __post_init__(self) -> None:
        for part in (DataConfig, LoopConfig, OptimizerConfig):
            part.__post_init__(self)


def main() -> None:
    config, settings = parse_config(TrainVAE)
    accelerator = make_accelerator(config)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    run = RunFolder(config.output_dir, settings, Processes(accelerator))
    with accelerator.main_process_first():
        dataset = CaptionedImages(config)
    vae_config = replace(config.vae, sample_size=config.image_size)
    torch.manual_seed(config.seed)
    learner = Learner(VAE(vae_config), config, accelerator)
    ema = learner.ema
    assert isinstance(ema, VAE)
    latent = (vae_config.latent_channels, *(config.image_size // vae_config.factor,) * 2)

    def step(batch: dict[str, Any], number: int, share: Share) -> Metrics:
        images = to_floats(batch["images"].to(accelerator.device))
        noise = torch.randn(
            config.batch_size, *latent, generator=generator(config.seed, number, "posterior")
        )
        reconstruction, posterior = learner.model(images, share.rows(noise).to(images))
        loss, distance, kl = vae_loss(
            reconstruction,
            images,
            posterior,
            norm=config.reconstruction,
            kl_weight=config.kl_weight,
        )
        grad_norm = learner.update(loss, share)
        return {"loss": loss, config.reconstruction: distance, "kl": kl, "grad_norm": grad_norm}

    def data(start: int) -> Iterator[dict[str, Any]]:
        shares = batches(
            dataset,
            start,
            num_samples=len(dataset),
            batch_size=config.batch_size,
            seed=config.seed,
            stop=config.max_steps,
            rank=rank,
            world_size=world_size,
            num_workers=config.num_workers,
            collate=collate,
        )
        return parts(shares, config.accumulation)

    shown = torch.stack([dataset.image(i * len(dataset) // 16) for i in range(16)])

    @torch.no_grad()
    def preview(path: Path) -> None:
        """Pictures above what the EMA network makes of them."""
        images = to_floats(shown.to(accelerator.device))
        decoded = ema.decode(ema.encode(images).mean)
        pairs = torch.cat([images[:8], decoded[:8], images[8:], decoded[8:]])
        picture_grid([to_pil(image) for image in pairs], columns=8).save(path)

    @torch.no_grad()
    def save(folder: Path) -> None:
        """The EMA network with its latents' statistics folded in, so that they are standard."""
        vae = VAE(vae_config).to(accelerator.device)
        vae.load_state_dict(ema.state_dict())
        mean, std = latent_statistics(vae, dataset)
        vae.fold_latent_statistics(mean, std)
        vae.save_pretrained(folder)

    fit(
        step,
        data,
        {"vae": learner},
        config,
        accelerator,
        run,
        save=save,
        preview=preview,
        fingerprints={"data": data_fingerprint(dataset)},
    )


def latent_statistics(vae: VAE, dataset: CaptionedImages) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each channel of the latents of up to 2,048 pictures: (C,), (C,)."""
    device = next(vae.parameters()).device
    count = min(len(dataset), 2048)
    ids = [i * len(dataset) // count for i in range(count)]
    posteriors = [
        vae.encode(to_floats(torch.stack([dataset.image(i) for i in part]).to(device)))
        for part in (ids[at : at + 64] for at in range(0, count, 64))
    ]
    whole = Posterior(
        torch.cat([p.mean for p in posteriors]), torch.cat([p.logvar for p in posteriors])
    )
    mean = whole.mean.mean(dim=(0, 2, 3))
    # The variance of a sampled latent: that of its mean plus the mean of its variance.
    variance = whole.mean.var(dim=(0, 2, 3)) + whole.logvar.exp().mean(dim=(0, 2, 3))
    return mean, variance.sqrt()


if __name__ == "__main__":
    run_script(main)
