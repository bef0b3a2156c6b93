"""Train the autoencoder on images alone: accelerate launch train/train_vae.py."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from latentdiff.data.batches import check_batch
from latentdiff.data.config import DataConfig
from latentdiff.data.dataset import CaptionedImages
from latentdiff.data.latent_check import TRAINING
from latentdiff.data.opening import image_batches, open_images, some_examples
from latentdiff.data.summary import images_summary
from latentdiff.formats.diffusers import find_part
from latentdiff.formats.weights import save_json
from latentdiff.images import image_grid, to_floats, to_pil
from latentdiff.models.discriminator import Discriminator
from latentdiff.models.fingerprint import fingerprint
from latentdiff.models.vae import VAE, VAEConfig
from latentdiff.training.autoencoder import (
    discriminator_scores,
    given_vae,
    latent_statistics,
)
from latentdiff.training.config import parse_config, run_script
from latentdiff.training.learner import Learner, OptimizerConfig
from latentdiff.training.loop import fit
from latentdiff.training.losses import (
    OutputScale,
    Reconstruction,
    adversarial_weight,
    hinge_loss,
    vae_loss,
)
from latentdiff.training.meter import Metrics
from latentdiff.training.perceptual import Perceptual
from latentdiff.training.processes import Processes
from latentdiff.training.randomness import Share, generator, parts
from latentdiff.training.run_folder import RunFolder
from latentdiff.training.setup import LoopConfig, make_accelerator

SMALL = VAEConfig(
    block_out_channels=(32, 64, 128),
    layers_per_block=1,
    norm_num_groups=16,
    mid_block_add_attention=False,
)


@dataclass(frozen=True)
class TrainVAE(DataConfig, LoopConfig, OptimizerConfig):
    """Train a VAE on images: reconstruction, KL and, if asked for, LPIPS and a discriminator.

    Captions are never read.
    """

    output_dir: Path = Path("runs/shapes/vae")
    max_steps: int = 600
    batch_size: int = 16
    learning_rate: float = 1e-3
    cooldown_steps: int = 200
    caption_columns: tuple[str, ...] = ()
    vae: VAEConfig = field(default_factory=lambda: SMALL)
    """`sample_size` follows image_size."""
    init: str | None = None
    """Folder of a VAE or of a pipeline, or "emoji", whose weights training begins with; the network
    is then that one, and `vae` is left out."""
    decoder_only: bool = False
    """Train the decoder of `init` alone: its latents stay the same to the last bit, and with them
    UNets and latent caches. No KL is counted."""
    reconstruction: Reconstruction = "l1"
    kl_weight: float = 1e-3
    """Weight of the KL in nats per pixel value; without one for `vae.encoder: downsample`."""
    learn_logvar: bool = False
    """Learn the width of the pixels' density too, so that the reconstruction counts in nats:
    Gaussian for l2, Laplace for l1. With a kl_weight of 1 the loss is then the negative ELBO."""
    perceptual_weight: float = 0.0
    """Above 0, LPIPS (LDM: 1) is added, by the network in perceptual_weights."""
    perceptual_weights: Path | None = None
    """A safetensors file with torchvision's VGG16, as in LDM, or AlexNet."""
    disc_weight: float = 0.0
    """Above 0 a PatchGAN judges the reconstructions (LDM: 0.5): its pull at the decoder's last
    layer as a share of that of all the rest."""
    disc_start: int = 0
    """Steps before that begins; a decoder that knows nothing yet would only lose."""
    random_flip: bool = False
    """Every second image is mirrored, drawn anew at each visit."""

    def __post_init__(self) -> None:
        for part in (DataConfig, LoopConfig, OptimizerConfig):
            part.__post_init__(self)
        if self.ema_lengths:
            raise ValueError(
                f"ema_lengths={list(self.ema_lengths)} must be empty: a VAE is saved with the "
                "statistics of its latents, which other weights change"
            )
        for name in ("perceptual_weight", "disc_weight", "disc_start"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.perceptual_weight > 0 and self.perceptual_weights is None:
            raise ValueError(
                f"perceptual_weight={self.perceptual_weight} needs perceptual_weights, a "
                "safetensors file of torchvision's VGG16 or AlexNet"
            )
        if self.init is None:  # of a given one this is asked when it is read
            self.vae.check_folds()
        if self.decoder_only and self.init is None:
            raise ValueError("decoder_only=True needs init, the VAE whose latents are kept")
        if self.decoder_only and self.sharding in ("zero1", "zero2"):
            raise ValueError(
                f"sharding={self.sharding!r} must be 'none' or 'full' with decoder_only: DeepSpeed "
                "keeps moments of every parameter"
            )
        for name, alone in (("accumulation", 1), ("sharding", "none")):
            if self.disc_weight > 0 and getattr(self, name) != alone:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be {alone!r} with a disc_weight: the "
                    "weight of the adversarial loss follows from the whole batch and network"
                )


def main() -> None:
    config, settings = parse_config(TrainVAE)
    accelerator = make_accelerator(config)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    processes = Processes(accelerator, timeout=config.timeout)
    run = RunFolder(config.output_dir, settings, processes)
    perceptual = None
    if config.perceptual_weight > 0:
        assert config.perceptual_weights is not None
        perceptual = Perceptual(config.perceptual_weights, image_size=config.image_size)
        perceptual.to(accelerator.device)
    dataset = processes.in_turn(lambda: open_images(config))
    if isinstance(dataset, CaptionedImages):  # a stream tells when its first epoch ends
        check_batch(config.batch_size, len(dataset))
    torch.manual_seed(config.seed)
    network = new_vae(config)
    fingerprints = {"data": dataset.fingerprint}
    if config.init is not None:  # a resumed run reads it again
        fingerprints["init"] = fingerprint(network, network.config.to_dict())
    if perceptual is not None:
        fingerprints["perceptual_weights"] = fingerprint(perceptual, {})
    learner = Learner(network, config, accelerator)
    raw, ema = learner.raw, learner.ema
    assert isinstance(raw, VAE)
    assert isinstance(ema, VAE)
    vae_config = raw.config
    learners = {"vae": learner}
    scale = OutputScale(config.reconstruction)
    if config.learn_logvar:
        own = replace(config, learning_rate=scale.RATE, weight_decay=0.0, sharding="none")
        learners["logvar"] = Learner(scale, own, accelerator, averaged=False)
    if config.disc_weight > 0:
        steps = max(1, config.max_steps - config.disc_start)
        learners["discriminator"] = Learner(
            Discriminator(), replace(config, max_steps=steps), accelerator, averaged=False
        )
    latent = (vae_config.latent_channels, *(config.image_size // vae_config.factor,) * 2)
    # A given encoder's KL is as it is, and that of a point says nothing.
    counts_kl = not config.decoder_only and vae_config.encoder == "kl"

    def step(batch: dict[str, Any], number: int, share: Share) -> Metrics:
        images = to_floats(batch["images"].to(accelerator.device))
        if config.random_flip:
            places = torch.rand(config.batch_size, generator=generator(config.seed, number, "flip"))
            images = mirror(images, share.rows(places).to(images))
        noise = torch.randn(
            config.batch_size, *latent, generator=generator(config.seed, number, "posterior")
        )
        reconstruction, posterior = learner.model(images, share.rows(noise).to(images))
        loss, distance, kl = vae_loss(
            reconstruction,
            images,
            posterior,
            norm=config.reconstruction,
            kl_weight=config.kl_weight if counts_kl else 0.0,
            logvar=scale.logvar.detach().clone() if config.learn_logvar else None,
        )
        metrics = {config.reconstruction: distance}
        if counts_kl:
            metrics["kl"] = kl
        if "logvar" in learners:
            nats = learners["logvar"].model(distance.detach())
            metrics |= {"pixel_nats": nats, "logvar": scale.logvar.detach().clone()}
            metrics["grad_norm_logvar"] = learners["logvar"].update(nats, share)
        if perceptual is not None:
            metrics["perceptual"] = perceptual(reconstruction, images).mean()
            loss = loss + config.perceptual_weight * metrics["perceptual"]
        metrics["loss"] = loss
        if "discriminator" not in learners or number < config.disc_start:
            return metrics | {"grad_norm": learner.update(loss, share)}
        critic = learners["discriminator"]
        # The VAE's step: of its own weights alone, for a better score.
        critic.raw.requires_grad_(False)
        adversarial = -critic.raw(reconstruction).mean()
        critic.raw.requires_grad_(True)
        weight = adversarial_weight(
            loss,
            adversarial,
            raw.decoder.conv_out.weight,
            mean=partial(accelerator.reduce, reduction="mean"),  # pyright: ignore[reportArgumentType]
        )
        whole = loss + config.disc_weight * weight * adversarial
        metrics |= {"adversarial": adversarial, "grad_norm": learner.update(whole, share)}
        # The discriminator's step: both kinds in one pass, and nothing reaches the VAE.
        scores = critic.model(torch.cat([images, reconstruction.detach().to(images)]))
        real, fake = scores.chunk(2)
        disc_loss = hinge_loss(real, fake)
        return metrics | {
            "disc_loss": disc_loss,
            "disc_real": real.mean(),
            "disc_fake": fake.mean(),
            "grad_norm_disc": critic.update(disc_loss, share),
        }

    def data(start: int) -> Iterator[dict[str, Any]]:
        shares = image_batches(
            dataset,
            start,
            batch_size=config.batch_size,
            seed=config.seed,
            stop=config.max_steps,
            rank=rank,
            world_size=world_size,
        )
        return parts(shares, config.accumulation)

    examples = [example["image"] for example in some_examples(dataset, 16)]
    shown = torch.stack([examples[i % len(examples)] for i in range(16)])

    @torch.no_grad()
    def preview(path: Path) -> None:
        """Images above what the EMA network makes of them."""
        images = to_floats(shown.to(accelerator.device))
        decoded = ema.decode(ema.encode(images).mean)
        pairs = torch.cat([images[:8], decoded[:8], images[8:], decoded[8:]])
        image_grid([to_pil(image) for image in pairs], columns=8).save(path)

    @torch.no_grad()
    def save(folder: Path) -> None:
        """The EMA network with its latents' statistics folded in, so that they are standard."""
        vae = VAE(vae_config).to(accelerator.device)
        vae.load_state_dict(ema.state_dict())
        facts: dict[str, Any] = {"reconstruction": config.reconstruction}
        if config.learn_logvar:
            facts["logvar"] = scale.logvar.item()
        if "discriminator" in learners:
            judged = (example["image"] for example in some_examples(dataset, 64))
            facts |= discriminator_scores(vae, learners["discriminator"].raw, judged)
        if not config.decoder_only:  # the latents of which are the given ones
            measured = (example["image"] for example in some_examples(dataset, 2048))
            vae.fold_latent_statistics(*latent_statistics(vae, measured))
        vae.save_pretrained(folder)
        save_json(facts, folder / TRAINING)

    fit(
        step,
        data,
        learners,
        config,
        accelerator,
        run,
        save=save,
        preview=preview,
        fingerprints=fingerprints,
        summary=images_summary(dataset),
    )


def new_vae(config: TrainVAE) -> VAE:
    """The network that training begins with.

    Raises ValueError where `init` cannot be read, or `vae` asks for another network.
    """
    size = config.image_size
    if config.init is None:
        return VAE(replace(config.vae, sample_size=size))
    folder = find_part(config.init, "vae")
    vae = given_vae(folder, image_size=size, decoder_only=config.decoder_only)
    if replace(config.vae, sample_size=size) not in (replace(SMALL, sample_size=size), vae.config):
        raise ValueError(f"vae differs from the network of init={config.init!r}; leave out one")
    return vae


def mirror(images: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Mirror the images (B, C, H, W) whose place, uniform in [0, 1), is below a half."""
    return torch.where((places < 0.5)[:, None, None, None], images.flip(-1), images)


if __name__ == "__main__":
    run_script(main)
