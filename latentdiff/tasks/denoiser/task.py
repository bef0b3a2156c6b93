"""DenoiserTask: trains a UNet or a DiT to denoise latents (Algorithm 1 of DDPM, Ho et al. 2020).

Shapes: B images of a global batch, C latent channels, H/W latent size, L tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentdiff.data.cache import LatentCache, collate_moments
from latentdiff.data.caption_table import CaptionTable, CaptionTokens
from latentdiff.data.summary import cache_summary
from latentdiff.images import image_grid
from latentdiff.models.dit import DiT
from latentdiff.models.fingerprint import fingerprint
from latentdiff.models.text import TextEncoder
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.models.vae import VAE, Posterior
from latentdiff.pipeline import Pipeline
from latentdiff.tasks.denoiser.config import TrainUNet
from latentdiff.tasks.denoiser.latents import check_sizes
from latentdiff.tasks.denoiser.loss import Uncertainty
from latentdiff.training.logging.meter import Metrics
from latentdiff.training.randomness import MicroBatch, choose, generator
from latentdiff.training.run import Run
from latentdiff.training.validation import BINS, stratified_t, validation_loss


class DenoiserTask:
    """The step, validation loss, preview and pipeline folder of a denoiser."""

    def __init__(
        self,
        config: TrainUNet,
        run: Run,
        *,
        cache: LatentCache,
        val: np.ndarray,
        vae: VAE,
        text_encoder: TextEncoder,
    ) -> None:
        """`val` (n,): the indices of the validation split. With `in_memory` the captions of the
        cache are tokenised here. Raises ValueError for a cache with a size that the network cannot
        take."""
        self.config, self.run, self.cache, self.val = config, run, cache, val
        self.text_encoder = text_encoder.to(run.device)
        self.tokens = None
        if config.compute.in_memory:
            self.tokens = CaptionTokens(CaptionTable(cache.captions), text_encoder.token_ids)
            run.accelerator.print(f"in memory: {self.tokens.summary()}")
        self.channels = vae.config.latent_channels
        network = new_denoiser(config, cache=cache, vae=vae, text_encoder=text_encoder)
        check_sizes(cache, vae, network)
        self.learner = run.learner(network, compute=run.compiled(num_sizes=len(cache.sizes)))
        self.learners = {"unet" if isinstance(network, UNet) else "dit": self.learner}
        self.uncertainty = None
        if config.loss.weighting == "uncertainty":
            self.uncertainty = run.learner(Uncertainty(), ema=None, sharding="none")
            self.learners["uncertainty"] = self.uncertainty
        self.ema: Any = self.learner.ema
        self.val_t = stratified_t(config.diffusion, len(val), seed=config.loop.seed).to(run.device)
        self.pipeline = Pipeline(
            unet=self.ema, vae=vae, text_encoder=text_encoder, diffusion=config.diffusion
        )
        self.fingerprints = {
            "data": cache.fingerprint,
            "vae": cache.header["vae"],
            "text_encoder": fingerprint(text_encoder.model, {}),
        }
        data = config.data.location() if config.cache is None else str(config.cache)
        self.data_summary = cache_summary(cache, data, num_val=len(val))

    def prepare(self, batch: dict[str, Any], step: int) -> dict[str, Any]:
        """A process's batch with all that its step needs of the host.

        `batch` has moments (b, 2C, H, W) and captions, or rows of the tokens in memory. Added are
        token ids, timesteps and noise, which are drawn for the global batch.
        """
        config, batch_size = self.config, self.config.loop.batch_size
        processes = self.run.processes
        rows = MicroBatch(processes.rank, processes.count).rows
        shape = (batch_size, self.channels, *batch["moments"].shape[2:])

        def rng(purpose: str) -> torch.Generator:
            """A generator of random numbers for the global batch, the same in every process."""
            return generator(config.loop.seed, step, purpose)

        loss, u = config.loss, rows(torch.rand(batch_size, 2, generator=rng("caption")))
        return {
            "moments": batch["moments"],
            "input_ids": self._token_ids(batch, u),
            "posterior": rows(torch.randn(shape, generator=rng("posterior"))),
            "t": rows(loss.sample_t(config.diffusion, batch_size, generator=rng("t"))),
            "noise": rows(loss.noise(shape, generator=rng("noise"))),
        }

    def _token_ids(self, batch: dict[str, Any], u: Tensor) -> Tensor:
        """(b, L): one caption of each example, or "" with probability `caption_dropout`, by u."""
        dropped = u[:, 1].double().numpy() < self.config.caption_dropout
        if self.tokens is not None:
            return self.tokens(batch["rows"], u[:, 0], empty=dropped)
        chosen = choose(batch["captions"], u[:, 0].tolist())
        captions = zip(chosen, dropped.tolist(), strict=True)
        return self.text_encoder.token_ids(["" if drop else caption for caption, drop in captions])

    def step(self, batch: dict[str, Any], step: int, micro_batch: MicroBatch) -> Metrics:
        """One micro-batch of what `prepare` made, on the device; the host reads none of it."""
        diffusion, loss_config = self.config.diffusion, self.config.loss
        x0 = Posterior.from_moments(batch["moments"]).sample(batch["posterior"])
        with self.run.accelerator.autocast():
            context = self.text_encoder.states(batch["input_ids"])
        t, noise = batch["t"], batch["noise"]
        # Algorithm 1 (Ho et al. 2020): take a gradient step on the error of the prediction.
        errors, vlb = diffusion.losses(self.learner.forward_model, x0, context, noise=noise, t=t)
        metrics = {"loss": errors.mean()}
        weight = loss_config.weight(diffusion, t).to(errors)  # (b,), as are errors and vlb
        if self.uncertainty is not None:  # EDM2, eq. 21, of which each network minimises its part
            u = self.uncertainty.forward_model(*diffusion.alpha_sigma(t))
            weight = torch.exp(-u.detach())
            u_loss = (errors.detach() * torch.exp(-u) + u).mean()
            metrics["grad_norm_uncertainty"] = self.uncertainty.update(u_loss, micro_batch)
            metrics["uncertainty"] = u.mean()
        total = (weight * errors).mean()
        if vlb is not None:  # L_simple + lambda L_vlb (Nichol & Dhariwal 2021)
            metrics["bound"] = vlb.mean()
            total = total + loss_config.vlb_weight * metrics["bound"]
        return metrics | {"grad_norm": self.learner.update(total, micro_batch)}

    def validate(self) -> Metrics:
        """The EMA network's loss on the validation split, in bins of t."""
        if len(self.val) == 0:
            return {}
        loop, parallel = self.config.loop, self.config.parallel
        count = self.run.processes.count * parallel.gradient_accumulation_steps
        return validation_loss(
            self._validation_errors,
            self.cache.buckets[self.val].tolist(),
            batch_size=max(1, loop.batch_size // count // BINS),
            processes=self.run.processes,
        )

    @torch.no_grad()
    def _validation_errors(self, rows: Sequence[int]) -> Tensor:
        """Losses of validation examples of one size, (B, BINS); each has a generator of its own."""
        indices = self.val[rows].tolist()
        seed = self.config.loop.seed
        rngs = [generator(seed, index, "held out noise") for index in indices]

        def randn(*shape: int) -> Tensor:
            """N(0, I) of shape (B, *shape), from the examples' generators."""
            noise = [torch.randn(*shape, generator=rng) for rng in rngs]
            return torch.stack(noise).to(self.run.device)

        batch = collate_moments([self.cache[index] for index in indices])
        captions = choose(batch["captions"], [float(torch.rand((), generator=rng)) for rng in rngs])
        size = batch["moments"].shape[2:]
        posterior = Posterior.from_moments(batch["moments"].to(self.run.device))
        x0 = posterior.sample(randn(self.channels, *size))
        noise = randn(BINS, self.channels, *size).flatten(0, 1)
        t = self.val_t[rows].flatten()
        with self.run.accelerator.autocast():
            context = self.text_encoder(captions)
            x0, context = (x.repeat_interleave(BINS, 0) for x in (x0, context))
            errors = self.config.diffusion.loss(self.ema, x0, context, noise=noise, t=t)
        return errors.unflatten(0, (-1, BINS))

    def preview(self, path: Path) -> None:
        """Draw images of up to eight captions, which are the same each time."""
        captions = (self.cache.captions[i * len(self.cache) // 8][0] for i in range(8))
        prompts = list(self.config.preview_prompts or dict.fromkeys(captions))
        seed = self.config.loop.seed
        output = self.pipeline(prompts, seed=seed, steps=20, guidance_scale=4.0, progress=False)
        image_grid(output.images, prompts).save(path)

    def save(self, folder: Path) -> None:
        """Write a pipeline folder with the EMA network."""
        self.pipeline.save_pretrained(folder)


def new_denoiser(
    config: TrainUNet, *, cache: LatentCache, vae: VAE, text_encoder: TextEncoder
) -> UNet | DiT:
    """The untrained network, whose channels and sizes fit the VAE, text encoder and cache."""
    channels = vae.config.latent_channels
    network = replace(
        config.unet if config.dit is None else config.dit,
        in_channels=channels,
        out_channels=2 * channels if config.diffusion.learned_variance else channels,
        sample_size=cache.image_size // vae.config.factor,
        cross_attention_dim=text_encoder.width,
    )
    torch.manual_seed(config.loop.seed)
    return UNet(network) if isinstance(network, UNetConfig) else DiT(network)
