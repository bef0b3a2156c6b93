"""VAETask: trains an autoencoder on images (VAE, Kingma & Welling 2014; LDM, appendix G).

Shapes: B images of a global batch, b of a micro-batch, C latent channels, f the VAE's factor.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.data.latent_check import TRAINING
from latentdiff.data.opening import ImageDataset
from latentdiff.data.summary import images_summary
from latentdiff.formats.diffusers import find_component
from latentdiff.formats.weights import save_json
from latentdiff.images import image_grid, to_floats, to_pil
from latentdiff.models.discriminator import Discriminator
from latentdiff.models.fingerprint import fingerprint
from latentdiff.models.vae import VAE
from latentdiff.tasks.vae.config import SMALL, TrainVAE
from latentdiff.tasks.vae.evaluation import discriminator_scores, initial_vae, latent_statistics
from latentdiff.tasks.vae.losses import OutputScale, adversarial_weight, hinge_loss, vae_loss
from latentdiff.tasks.vae.perceptual import Perceptual
from latentdiff.training.learner import Learner
from latentdiff.training.logging.meter import Metrics
from latentdiff.training.randomness import MicroBatch, generator
from latentdiff.training.run import Run


class VAETask:
    """The step, preview and saved folder of a VAE, its discriminator and its learned width."""

    def __init__(
        self,
        config: TrainVAE,
        run: Run,
        *,
        dataset: ImageDataset,
        perceptual: Perceptual | None = None,
    ) -> None:
        """Raises ValueError where `init` cannot be read, or `vae` asks for another network."""
        self.config, self.run, self.dataset = config, run, dataset
        self.perceptual = None if perceptual is None else perceptual.to(run.device)
        torch.manual_seed(config.loop.seed)
        network = new_vae(config)
        self.fingerprints = {"data": dataset.fingerprint}
        if config.init is not None:  # a resumed run reads it again
            self.fingerprints["init"] = fingerprint(network, network.config.to_dict())
        if perceptual is not None:
            self.fingerprints["perceptual_weights"] = fingerprint(perceptual, {})
        self.data_summary = images_summary(dataset)
        self.learner = run.learner(network)
        self.vae: Any = self.learner.model
        self.ema: Any = self.learner.ema
        self.learners = {"vae": self.learner}
        loss = config.loss
        self.scale = OutputScale(loss.reconstruction)
        self.logvar = self.critic = None
        if loss.learn_logvar:
            optimizer = replace(config.optimizer, learning_rate=OutputScale.RATE, weight_decay=0.0)
            self.logvar = run.learner(self.scale, optimizer=optimizer, ema=None, sharding="none")
            self.learners["logvar"] = self.logvar
        if loss.disc_weight > 0:
            steps = max(1, config.loop.max_steps - loss.disc_start)
            self.critic = run.learner(Discriminator(), max_steps=steps, ema=None)
            self.learners["discriminator"] = self.critic
        # The KL of a frozen encoder is constant, and that of a point says nothing.
        self.has_kl = not config.decoder_only and network.config.encoder == "kl"
        examples = [example["image"] for example in dataset.some_examples(16)]
        self.preview_images = torch.stack([examples[i % len(examples)] for i in range(16)])

    def step(self, batch: dict[str, Any], step: int, micro_batch: MicroBatch) -> Metrics:
        """One micro-batch of images (b, 3, S, S) uint8."""
        images = self._images(batch, step, micro_batch)
        reconstruction, loss, metrics = self._reconstruct(images, step, micro_batch)
        if self.critic is None or step < self.config.loss.disc_start:
            return metrics | {"grad_norm": self.learner.update(loss, micro_batch)}
        adversarial, weight = self._adversarial(self.critic, reconstruction, loss)
        total = loss + self.config.loss.disc_weight * weight * adversarial
        metrics |= {
            "adversarial": adversarial,
            "grad_norm": self.learner.update(total, micro_batch),
        }
        # The discriminator's step: both kinds in one pass, and nothing reaches the VAE.
        scores = self.critic.forward_model(torch.cat([images, reconstruction.detach().to(images)]))
        real, fake = scores.chunk(2)
        disc_loss = hinge_loss(real, fake)
        return metrics | {
            "disc_loss": disc_loss,
            "disc_real": real.mean(),
            "disc_fake": fake.mean(),
            "grad_norm_disc": self.critic.update(disc_loss, micro_batch),
        }

    def _images(self, batch: dict[str, Any], step: int, micro_batch: MicroBatch) -> Tensor:
        """The images in [-1, 1], (b, 3, S, S), mirrored at random if asked for."""
        images = to_floats(batch["images"].to(self.run.device))
        if self.config.random_flip:
            loop = self.config.loop
            u = torch.rand(loop.batch_size, generator=generator(loop.seed, step, "flip"))
            images = mirror(images, micro_batch.rows(u).to(images))
        return images

    def _reconstruct(
        self, images: Tensor, step: int, micro_batch: MicroBatch
    ) -> tuple[Tensor, Tensor, Metrics]:
        """Reconstructions (b, 3, S, S), the loss () without the discriminator's, and metrics."""
        loop, loss_config = self.config.loop, self.config.loss
        latent = (
            images.shape[2] // self.vae.config.factor,
            images.shape[3] // self.vae.config.factor,
        )
        noise = torch.randn(
            (loop.batch_size, self.vae.config.latent_channels, *latent),
            generator=generator(loop.seed, step, "posterior"),
        )
        reconstruction, posterior = self.learner.forward_model(
            images, micro_batch.rows(noise).to(images)
        )
        loss, distance, kl = vae_loss(
            reconstruction,
            images,
            posterior,
            norm=loss_config.reconstruction,
            kl_weight=loss_config.kl_weight if self.has_kl else 0.0,
            logvar=None if self.logvar is None else self.scale.logvar.detach().clone(),
        )
        metrics = {loss_config.reconstruction: distance}
        if self.has_kl:
            metrics["kl"] = kl
        if self.logvar is not None:
            nats = self.logvar.forward_model(distance.detach())
            metrics |= {"pixel_nats": nats, "logvar": self.scale.logvar.detach().clone()}
            metrics["grad_norm_logvar"] = self.logvar.update(nats, micro_batch)
        if self.perceptual is not None:
            metrics["perceptual"] = self.perceptual(reconstruction, images).mean()
            loss = loss + loss_config.perceptual_weight * metrics["perceptual"]
        metrics["loss"] = loss
        return reconstruction, loss, metrics

    def _adversarial(
        self, critic: Learner, reconstruction: Tensor, loss: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The VAE's adversarial loss () and its adaptive weight (); the critic stays as it is."""
        critic.model.requires_grad_(False)
        adversarial = -critic.model(reconstruction).mean()
        critic.model.requires_grad_(True)
        weight = adversarial_weight(
            loss,
            adversarial,
            self.vae.decoder.conv_out.weight,
            mean=partial(self.run.accelerator.reduce, reduction="mean"),  # pyright: ignore[reportArgumentType]
        )
        return adversarial, weight

    def validate(self) -> Metrics:
        """Nothing: the preview and the latent statistics check show what a VAE is worth."""
        return {}

    @torch.no_grad()
    def preview(self, path: Path) -> None:
        """Images above what the EMA network makes of them."""
        images = to_floats(self.preview_images.to(self.run.device))
        decoded = self.ema.decode(self.ema.encode(images).mean)
        rows = torch.cat([images[:8], decoded[:8], images[8:], decoded[8:]])
        image_grid([to_pil(image) for image in rows], columns=8).save(path)

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """The EMA network with its latents' statistics folded in, so that they are standard."""
        config = self.config
        vae = VAE(self.vae.config).to(self.run.device)
        vae.load_state_dict(self.ema.state_dict())
        facts: dict[str, Any] = {"reconstruction": config.loss.reconstruction}
        if self.logvar is not None:
            facts["logvar"] = self.scale.logvar.item()
        if self.critic is not None:
            judged = (example["image"] for example in self.dataset.some_examples(64))
            facts |= discriminator_scores(vae, self.critic.model, judged)
        if not config.decoder_only:  # whose latents are those of `init`
            measured = (example["image"] for example in self.dataset.some_examples(2048))
            vae.fold_latent_statistics(*latent_statistics(vae, measured))
        vae.save_pretrained(folder)
        save_json(facts, folder / TRAINING)


def new_vae(config: TrainVAE) -> VAE:
    """The network that training begins with.

    Raises ValueError where `init` cannot be read, or `vae` asks for another network.
    """
    size = config.data.image_size
    if config.init is None:
        return VAE(replace(config.vae, sample_size=size))
    folder = find_component(config.init, "vae")
    vae = initial_vae(folder, image_size=size, decoder_only=config.decoder_only)
    if replace(config.vae, sample_size=size) not in (replace(SMALL, sample_size=size), vae.config):
        raise ValueError(f"vae differs from the network of init={config.init!r}; leave out one")
    return vae


def mirror(images: Tensor, u: Tensor) -> Tensor:
    """Mirror the images (B, C, H, W) whose number u (B,), uniform in [0, 1), is below a half."""
    return torch.where((u < 0.5)[:, None, None, None], images.flip(-1), images)
