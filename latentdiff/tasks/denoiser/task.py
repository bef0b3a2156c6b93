"""DenoiserTask: trains a UNet or a DiT to denoise latents (Algorithm 1 of DDPM, Ho et al. 2020).

Shapes: B images of a global batch, C latent channels, H/W latent size, L tokens, D width.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentdiff.data.cache import LatentCache, collate_moments, split_masked
from latentdiff.data.joined import JoinedLatents
from latentdiff.data.summary import cache_summary
from latentdiff.images import image_grid
from latentdiff.loading import Components
from latentdiff.models.dit import DiT
from latentdiff.models.fingerprint import fingerprint
from latentdiff.models.vae import Posterior
from latentdiff.pipeline import Pipeline
from latentdiff.tasks.denoiser.config import TrainUNet
from latentdiff.tasks.denoiser.inpainting import painted, sampled_channels, with_channels
from latentdiff.tasks.denoiser.latents import check_sizes
from latentdiff.tasks.denoiser.lora import (
    UNetWithText,
    drawing_networks,
    lora_metadata,
    lora_network,
    save_lora,
)
from latentdiff.tasks.denoiser.loss import Uncertainty
from latentdiff.tasks.denoiser.text import StepCaptions
from latentdiff.training.logging.meter import Metrics
from latentdiff.training.randomness import MicroBatch, choose, generator, seed_of
from latentdiff.training.run import Run
from latentdiff.training.validation import BINS, num_draws, stratified_t, validation_loss

PREVIEW = {"steps": 20, "guidance_scale": 4.0}
"""How previews are drawn; a student draws in its own way."""


Randn = Callable[..., Tensor]  # a shape -> N(0, I) of it for each example


class DenoiserTask:
    """The step, validation loss, preview and pipeline folder of a denoiser."""

    def __init__(
        self,
        config: TrainUNet,
        run: Run,
        *,
        cache: LatentCache,
        val: np.ndarray,
        model: Components,
        prior: JoinedLatents | None = None,
    ) -> None:
        """`val` (n,): the indices of the validation split; `model`: what is trained, and what it is
        trained beside; `prior`: the cache with that of class images. Raises ValueError for a cache
        with a size that the network cannot take, and for a LoRA that does not fit the network.
        """
        self.config, self.run, self.cache, self.val = config, run, cache, val
        self.prior, joined = prior, cache if prior is None else prior
        self.diffusion, self.channels = model.diffusion, model.vae.config.latent_channels
        check_sizes(cache, model.vae, model.unet)
        # Of the weights as they are given, which a LoRA's training converts.
        self.fingerprints = {
            "data": joined.fingerprint,
            "vae": cache.header["vae"],
            "text_encoder": fingerprint(model.text_encoder.model, {}),
        }
        if config.init is not None:
            self.fingerprints["init"] = fingerprint(model.unet, {})
        self.model, network, lora = model, model.unet, config.lora
        if lora is not None:
            precision = run.accelerator.mixed_precision
            network = lora_network(model, lora, seed=config.loop.seed, precision=precision)
        model.vae.to(run.device)
        self.text_encoder = model.text_encoder.to(run.device)
        self.trains_text = isinstance(network, UNetWithText)
        self.captions = StepCaptions(
            joined.captions, self.text_encoder, run, frozen=not self.trains_text
        )
        self.learner = run.learner(network, compute=run.compiled(num_sizes=len(cache.sizes)))
        name = "dit" if isinstance(network, DiT) else "unet"
        self.learners = {name if lora is None else "lora": self.learner}
        self.uncertainty = None
        if config.loss.weighting == "uncertainty":
            self.uncertainty = run.learner(Uncertainty(), ema=None, sharding="none")
            self.learners["uncertainty"] = self.uncertainty
        self.ema: Any = self.learner.ema
        loop = config.loop
        self.draws = num_draws(
            len(val), validate_every=loop.validate_every, batch_size=loop.batch_size
        )
        t = stratified_t(self.diffusion, len(val) * self.draws, seed=loop.seed)
        self.val_t = t.to(run.device)
        unet, text_encoder = drawing_networks(self.ema, self.text_encoder)
        self.pipeline = Pipeline(
            unet=unet, vae=model.vae, text_encoder=text_encoder, diffusion=self.diffusion
        )
        data = config.data.location() if config.cache is None else str(config.cache)
        self.data_summary = cache_summary(cache, data, num_val=len(val))
        self.data_summary |= {} if prior is None else {"class_images": prior.summary()}

    def prepare(self, batch: dict[str, Any], step: int) -> dict[str, Any]:
        """A process's batch with all that its step needs of the host.

        `batch` has moments (b, 2C, H, W), or (b, 4C + 1, H, W) with masks, and captions, or rows of
        the tokens in memory. Timesteps and noise are drawn for the global batch.
        """
        config, batch_size = self.config, self.config.loop.batch_size
        processes = self.run.processes
        rows = MicroBatch(processes.rank, processes.count).rows
        shape = (batch_size, self.channels, *batch["moments"].shape[2:])

        def rng(purpose: str) -> torch.Generator:
            """A generator of random numbers for the global batch, the same in every process."""
            return generator(config.loop.seed, step, purpose)

        loss, u = config.loss, rows(torch.rand(batch_size, 2, generator=rng("caption")))
        dropped = u[:, 1].double().numpy() < config.caption_dropout
        prepared = {
            "moments": batch["moments"],
            "caption": self.captions.prepare(batch, u[:, 0], dropped),
            "posterior": rows(torch.randn(shape, generator=rng("posterior"))),
            "t": rows(loss.sample_t(self.diffusion, batch_size, generator=rng("t"))),
            "noise": rows(loss.noise(shape, generator=rng("noise"))),
        }
        if config.inpainting:
            names = ("moments", "mask", "masked_moments")
            prepared |= zip(names, split_masked(batch["moments"]), strict=True)
            noise = torch.randn(shape, generator=rng("masked posterior"))
            prepared["masked_posterior"] = rows(noise)
        if self.prior is not None:
            prepared["loss_weight"] = self.prior.loss_weights[batch["rows"]]
        return prepared

    def step(self, batch: dict[str, Any], step: int, micro_batch: MicroBatch) -> Metrics:
        """One micro-batch of what `prepare` made, on the device; the host reads none of it."""
        diffusion, loss_config = self.diffusion, self.config.loss
        network = self.learner.forward_model
        if self.config.inpainting:
            masked = batch["mask"], batch["masked_moments"], batch["masked_posterior"]
            network = with_channels(network, sampled_channels(*masked))
        x0 = Posterior.from_moments(batch["moments"]).sample(batch["posterior"])
        context = batch["caption"]
        if not self.trains_text:  # the network itself reads the token ids otherwise
            with self.run.accelerator.autocast():
                context = self.captions.context(context)
        self.seed_dropout(step, micro_batch)
        t, noise = batch["t"], batch["noise"]
        # Algorithm 1 (Ho et al. 2020): take a gradient step on the error of the prediction.
        errors, vlb = diffusion.losses(network, x0, context, noise=noise, t=t)
        metrics = {"loss": errors.mean()}
        weight = loss_config.weight(diffusion, t).to(errors)  # (b,), as are errors and vlb
        if self.uncertainty is not None:  # EDM2, eq. 21, of which each network minimises its part
            u = self.uncertainty.forward_model(*diffusion.alpha_sigma(t))
            weight = torch.exp(-u.detach())
            u_loss = (errors.detach() * torch.exp(-u) + u).mean()
            metrics["grad_norm_uncertainty"] = self.uncertainty.update(u_loss, micro_batch)
            metrics["uncertainty"] = u.mean()
        of_example = batch.get("loss_weight", 1.0)  # of a class image another than of an own one
        total = (weight * of_example * errors).mean()
        if vlb is not None:  # L_simple + lambda L_vlb (Nichol & Dhariwal 2021)
            metrics["bound"] = vlb.mean()
            total = total + loss_config.vlb_weight * (of_example * vlb).mean()
        return metrics | {"grad_norm": self.learner.update(total, micro_batch)}

    def seed_dropout(self, step: int, micro_batch: MicroBatch) -> None:
        """Have what a LoRA's dropout leaves out follow from the step alone."""
        if self.config.lora is not None and self.config.lora.dropout > 0:
            torch.manual_seed(seed_of(self.config.loop.seed, step, f"dropout {micro_batch.index}"))

    def validate(
        self, errors: Callable[[Sequence[int]], Tensor] | None = None, *, passes: int = BINS
    ) -> Metrics:
        """The mean of `errors` on the validation split: by default the EMA network's, in bins of t.

        `errors(rows)` gives those of validation rows of one size, a column for each bin, and takes
        a network through `passes` rows at once for each of them.
        """
        if len(self.val) == 0:
            return {}
        loop, parallel = self.config.loop, self.config.parallel
        count = self.run.processes.count * parallel.gradient_accumulation_steps
        return validation_loss(
            self._validation_errors if errors is None else errors,
            self.cache.buckets[self.val].repeat(self.draws).tolist(),
            batch_size=max(1, loop.batch_size // count // passes),
            processes=self.run.processes,
            draws=self.draws,
        )

    def held_out(self, rows: Sequence[int]) -> tuple[Tensor, list[str], Randn]:
        """Of validation rows of one size the moments (B, ...), on the device, a caption each, and
        `randn(*shape)`: N(0, I) of (B, *shape). Each row has a generator of its own."""
        seed, indices = self.config.loop.seed, [int(self.val[row // self.draws]) for row in rows]
        draws = [row % self.draws for row in rows]
        purposes = [f"held out noise {draw}" if draw else "held out noise" for draw in draws]
        pairs = zip(indices, purposes, strict=True)
        rngs = [generator(seed, index, purpose) for index, purpose in pairs]

        def randn(*shape: int) -> Tensor:
            noise = [torch.randn(*shape, generator=rng) for rng in rngs]
            return torch.stack(noise).to(self.run.device)

        batch = collate_moments([self.cache[index] for index in indices])
        captions = choose(batch["captions"], [float(torch.rand((), generator=rng)) for rng in rngs])
        return batch["moments"].to(self.run.device), captions, randn

    @torch.no_grad()
    def _validation_errors(self, rows: Sequence[int]) -> Tensor:
        """Losses of validation rows of one size, (B, BINS)."""
        (moments, captions, randn), network = self.held_out(rows), self.ema
        size = moments.shape[2:]
        if self.config.inpainting:
            moments, mask, masked = split_masked(moments)
            channels = sampled_channels(mask, masked, randn(self.channels, *size))
            network = with_channels(network, channels.repeat_interleave(BINS, 0))
        x0 = Posterior.from_moments(moments).sample(randn(self.channels, *size))
        noise = randn(BINS, self.channels, *size).flatten(0, 1)
        t = self.val_t[rows].flatten()
        with self.run.accelerator.autocast():
            if self.trains_text:
                context = self.text_encoder.token_ids(captions).to(self.run.device)
            else:
                context = self.text_encoder(captions)
            x0, context = (x.repeat_interleave(BINS, 0) for x in (x0, context))
            errors = self.diffusion.loss(network, x0, context, noise=noise, t=t)
        return errors.unflatten(0, (-1, BINS))

    def preview(self, path: Path) -> None:
        """Draw images of up to eight captions, or paint as many masked images, the same each time.

        The images are of the validation split, if there is one.
        """
        seed = self.config.loop.seed
        # The frozen weights of a LoRA are in half precision, its own are not.
        mixed = nullcontext() if self.config.lora is None else self.run.accelerator.autocast()
        if self.config.inpainting:
            known = self.val if len(self.val) else np.arange(len(self.cache))
            examples = np.unique(known[np.arange(8) * len(known) // 8]).tolist()
            prompts = [self.cache.captions[index][0] for index in examples]
            with mixed:
                images = painted(self.pipeline, self.cache, examples, prompts, seed=seed)
        else:
            prompts = list(self.config.preview_prompts or self._preview_prompts())
            options = PREVIEW if self.diffusion.distilled_steps is None else {}
            with mixed:
                images = self.pipeline(prompts, seed=seed, progress=False, **options).images
        image_grid(images, prompts).save(path)

    def _preview_prompts(self) -> list[str]:
        """Captions of the data, and last that of class images, which shows how the class drifts."""
        count = 8 if self.prior is None else 7
        rows = (i * len(self.cache) // 8 for i in range(8))
        prompts = self.cache.header.get("options", {}).get("instance_prompts")
        prompts = list(dict.fromkeys(prompts or (self.cache.captions[row][0] for row in rows)))
        return prompts[:count] + ([] if self.prior is None else [self.prior.classes.captions[0][0]])

    def save(self, folder: Path) -> None:
        """Write a pipeline folder with the EMA network, or the EMA LoRA as one file."""
        if self.config.lora is None:
            self.pipeline.save_pretrained(folder)
        else:
            steps = self.diffusion.distilled_steps
            save_lora(self.ema, folder, self.config.lora, self.lora_metadata, steps)

    @cached_property
    def lora_metadata(self) -> dict[str, str]:
        """What the LoRA's file says of its training."""
        base = self.fingerprints["init"]
        metadata = lora_metadata(self.model, self.config, self.cache, base=base)
        if self.prior is not None:
            metadata["ss_num_reg_images"] = str(len(self.prior.classes))
        return metadata
