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
from latentdiff.models.discriminator import SMALLEST, Discriminator
from latentdiff.models.fingerprint import fingerprint
from latentdiff.models.vae import VAE
from latentdiff.tasks.vae.config import SMALL, TrainVAE
from latentdiff.tasks.vae.equivariance import (
    Transformation,
    check_equivariance,
    draw_transformation,
)
from latentdiff.tasks.vae.evaluation import discriminator_scores, initial_vae, latent_statistics
from latentdiff.tasks.vae.losses import OutputScale, adversarial_weight, hinge_loss, vae_loss
from latentdiff.tasks.vae.perceptual import Perceptual
from latentdiff.training.learner import Learner
from latentdiff.training.logging.meter import Metrics
from latentdiff.training.randomness import MicroBatch, generator
from latentdiff.training.run import Run


class VAETask:
    """The step, preview and saved folder of a VAE, with its discriminator and output scale."""

    def __init__(
        self,
        config: TrainVAE,
        run: Run,
        *,
        dataset: ImageDataset,
        perceptual: Perceptual | None = None,
    ) -> None:
        """Raises ValueError where `init` cannot be read, or `vae` asks for another network, and for
        an equivariance_probability that the network or the loss cannot have.
        """
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
        # Two stands for all that "auto" does not compile: the sizes of transformed latents, and the
        # adversarial weight's second way back through the decoder, which compiled code may refuse.
        many = config.loss.equivariance_probability > 0 or config.loss.disc_weight > 0
        self.learner = run.learner(network, compute=run.compiled(num_sizes=2 if many else 1))
        self.vae: Any = self.learner.model
        self.ema: Any = self.learner.ema
        self.learners = {"vae": self.learner}
        loss = config.loss
        self.output_scale = OutputScale(loss.reconstruction)
        self.logvar = self.discriminator = None
        if loss.learn_logvar:
            optimizer = replace(
                config.optimizer, learning_rate=OutputScale.LEARNING_RATE, weight_decay=0.0
            )
            self.logvar = run.learner(
                self.output_scale, optimizer=optimizer, ema=None, sharding="none"
            )
            self.learners["logvar"] = self.logvar
        if loss.disc_weight > 0:
            steps = max(1, config.loop.max_steps - loss.disc_start)
            if loss.disc_start >= config.loop.max_steps:
                run.accelerator.print(
                    f"disc_start={loss.disc_start} is not before max_steps="
                    f"{config.loop.max_steps}: no step has the adversarial loss"
                )
            self.discriminator = run.learner(Discriminator(), max_steps=steps, ema=None)
            self.learners["discriminator"] = self.discriminator
        # The KL of a frozen encoder is constant, and a deterministic encoder has none.
        self.has_kl = not config.decoder_only and network.config.encoder == "kl"
        if loss.equivariance_probability > 0:
            self._check_equivariance(loss.equivariance_probability)
        examples = [example["image"] for example in dataset.some_examples(16)]
        self.preview_images = torch.stack([examples[i % len(examples)] for i in range(16)])

    def _check_equivariance(self, probability: float) -> None:
        """Raise ValueError where nothing learns from it, or scaled images are too small."""
        if not self.has_kl:
            raise ValueError(
                f"equivariance_probability={probability} must be 0 with vae.encoder=downsample: "
                "nothing of the encoder is learned"
            )
        smallest = [1]
        if self.perceptual is not None:
            smallest.append(self.perceptual.smallest)
        if self.discriminator is not None:
            smallest.append(SMALLEST)
        size, factor = self.config.data.image_size, self.vae.config.factor
        check_equivariance(size, factor, needed=max(smallest))

    def prepare(self, batch: dict[str, Any], step: int) -> dict[str, Any]:
        """A process's images (b, 3, S, S) uint8 with the random numbers of their step."""
        batch_size, processes = self.config.loop.batch_size, self.run.processes
        rows = MicroBatch(processes.rank, processes.count).rows
        C, f = self.vae.config.latent_channels, self.vae.config.factor
        images = batch["images"]
        shape = (batch_size, C, images.shape[2] // f, images.shape[3] // f)

        def rng(purpose: str) -> torch.Generator:
            return generator(self.config.loop.seed, step, purpose)

        prepared = {
            "images": images,
            "posterior": rows(torch.randn(shape, generator=rng("posterior"))),
        }
        if self.config.random_flip:
            prepared["flip"] = rows(torch.rand(batch_size, generator=rng("flip")))
        return prepared

    def step(self, batch: dict[str, Any], step: int, micro_batch: MicroBatch) -> Metrics:
        """One micro-batch of what `prepare` made, on the device."""
        loss_config = self.config.loss
        images, noise = to_floats(batch["images"]), batch["posterior"]
        if self.config.random_flip:
            images = mirror(images, batch["flip"])
        num_encoded = images[0].numel()
        transformation = self._transformation(step, noise)
        reconstruction, posterior = self.learner.forward_model(images, noise, transformation)
        if transformation is not None:
            images = transformation(images, factor=self.vae.config.factor)
        loss, distance, kl = vae_loss(
            reconstruction,
            images,
            posterior,
            norm=loss_config.reconstruction,
            kl_weight=loss_config.kl_weight if self.has_kl else 0.0,
            logvar=None if self.logvar is None else self.output_scale.logvar.detach().clone(),
            num_encoded=num_encoded,
        )
        metrics = {loss_config.reconstruction: distance}
        if self.has_kl:
            metrics["kl"] = kl
        if self.logvar is not None:
            metrics |= self._update_logvar(self.logvar, distance.detach(), micro_batch)
        if self.perceptual is not None:
            metrics["perceptual"] = self.perceptual(reconstruction, images).mean()
            loss = loss + loss_config.perceptual_weight * metrics["perceptual"]
        metrics["loss"] = loss
        if self.discriminator is None or step < loss_config.disc_start:
            return metrics | {"grad_norm": self.learner.update(loss, micro_batch)}
        adversarial, weight = self._adversarial(self.discriminator, reconstruction, loss)
        metrics["adversarial"] = adversarial
        total = loss + loss_config.disc_weight * weight * adversarial
        metrics["grad_norm"] = self.learner.update(total, micro_batch)
        fakes = reconstruction.detach().to(images)
        return metrics | self._update_discriminator(self.discriminator, images, fakes, micro_batch)

    def _transformation(self, step: int, latents: Tensor) -> Transformation | None:
        """What is done to the latents (b, C, H, W) of a step, in all processes alike."""
        probability, seed = self.config.loss.equivariance_probability, self.config.loop.seed
        if probability == 0:
            return None
        height, width = latents.shape[-2:]
        return draw_transformation(height, width, probability=probability, seed=seed, step=step)

    def _update_logvar(self, logvar: Learner, distance: Tensor, micro_batch: MicroBatch) -> Metrics:
        """Step the output scale down the reconstruction's nats; the VAE gets no gradient."""
        nats = logvar.forward_model(distance)
        metrics = {"pixel_nats": nats, "logvar": self.output_scale.logvar.detach().clone()}
        return metrics | {"grad_norm_logvar": logvar.update(nats, micro_batch)}

    def _adversarial(
        self, discriminator: Learner, reconstruction: Tensor, loss: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The VAE's adversarial loss () and its adaptive weight ()."""
        discriminator.model.requires_grad_(False)
        adversarial = -discriminator.model(reconstruction).mean()
        discriminator.model.requires_grad_(True)
        weight = adversarial_weight(
            loss,
            adversarial,
            self.vae.decoder.conv_out.weight,
            mean=partial(self.run.accelerator.reduce, reduction="mean"),  # pyright: ignore[reportArgumentType]
        )
        return adversarial, weight

    def _update_discriminator(
        self, discriminator: Learner, reals: Tensor, fakes: Tensor, micro_batch: MicroBatch
    ) -> Metrics:
        """Step the discriminator on images and detached reconstructions, in one forward pass."""
        real, fake = discriminator.forward_model(torch.cat([reals, fakes])).chunk(2)
        disc_loss = hinge_loss(real, fake)
        return {
            "disc_loss": disc_loss,
            "disc_real": real.mean(),
            "disc_fake": fake.mean(),
            "grad_norm_disc": discriminator.update(disc_loss, micro_batch),
        }

    def validate(self) -> Metrics:
        """No metrics: the preview and the latent statistics check show how good a VAE is."""
        return {}

    @torch.no_grad()
    def preview(self, path: Path) -> None:
        """Draw images above their reconstructions by the EMA network."""
        images = to_floats(self.preview_images.to(self.run.device))
        decoded = self.ema.decode(self.ema.encode(images).mean)
        rows = torch.cat([images[:8], decoded[:8], images[8:], decoded[8:]])
        image_grid([to_pil(image) for image in rows], columns=8).save(path)

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """Write the EMA network, whose latents are standardised by its own convolutions."""
        config = self.config
        vae = VAE(self.vae.config).to(self.run.device)
        vae.load_state_dict(self.ema.state_dict())
        facts: dict[str, Any] = {"reconstruction": config.loss.reconstruction}
        if self.logvar is not None:
            facts["logvar"] = self.output_scale.logvar.item()
        if self.discriminator is not None:
            images = (example["image"] for example in self.dataset.some_examples(64))
            facts |= discriminator_scores(vae, self.discriminator.model, images)
        if not config.decoder_only:  # whose latents are those of `init`
            images = (example["image"] for example in self.dataset.some_examples(2048))
            vae.fold_latent_statistics(*latent_statistics(vae, images))
        vae.save_pretrained(folder)
        save_json(facts, folder / TRAINING)


def new_vae(config: TrainVAE) -> VAE:
    """The initial network.

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
    """Mirror the images (B, C, H, W) whose u (B,), uniform in [0, 1), is below a half."""
    return torch.where((u < 0.5)[:, None, None, None], images.flip(-1), images)
