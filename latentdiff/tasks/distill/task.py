"""DistillTask: trains a student by consistency distillation (see consistency.py).

Data, captions, validation, preview and the saved model are those of a denoiser's training
(`DenoiserTask`); a step and its loss are of here.
Shapes: B images of a global batch, C latent channels, H/W latent size.
"""

from typing import Any

import numpy as np
from torch import Tensor

from latentdiff.data.cache import LatentCache
from latentdiff.diffusion import Network
from latentdiff.guidance import guided_denoiser
from latentdiff.loading import Components
from latentdiff.models.vae import Posterior
from latentdiff.tasks.denoiser.task import DenoiserTask
from latentdiff.tasks.distill.config import Distill
from latentdiff.tasks.distill.consistency import (
    consistency_distance,
    consistency_weight,
    same_draws,
)
from latentdiff.tasks.distill.start import frozen, make_student
from latentdiff.training.logging.meter import Metrics
from latentdiff.training.randomness import MicroBatch, generator, seed_of
from latentdiff.training.run import Run


class DistillTask:
    """The step of a student; its validation loss is that of the last stage."""

    def __init__(
        self,
        config: Distill,
        run: Run,
        *,
        cache: LatentCache,
        val: np.ndarray,
        teacher: Components,
    ) -> None:
        """`val` (n,): the indices of the validation split. Raises ValueError as `frozen` and
        `DenoiserTask` do, and for distilled_steps out of range."""
        self.config, self.run = config, run
        student = make_student(teacher, config)
        self.diffusion = student.diffusion
        self.denoiser = DenoiserTask(
            config.denoiser(), run, cache=cache, val=val, model=student, loss=self._loss
        )
        precision = run.accelerator.mixed_precision
        self.teacher = frozen(teacher.unet, precision=precision, device=run.device)
        text_encoder = self.denoiser.text_encoder
        with run.accelerator.autocast():
            self.null_context = text_encoder.states(text_encoder.token_ids([""]))  # (1, L, D)
        self.learners, self.fingerprints = self.denoiser.learners, self.denoiser.fingerprints
        self.learner, self.draws = self.denoiser.learner, self.denoiser.draws
        self.data_summary = self.denoiser.data_summary
        self.validate, self.preview = self.denoiser.validate, self.denoiser.preview
        self.save = self.denoiser.save

    def prepare(self, batch: dict[str, Any], step: int) -> dict[str, Any]:
        """As `DenoiserTask.prepare`, with the two times t > r of each example, each (b,)."""
        consistency, loop, processes = self.config.consistency, self.config.loop, self.run.processes
        rng = generator(loop.seed, step, "t")
        t = consistency.sample_t(self.diffusion, loop.batch_size, generator=rng)
        r = consistency.second(self.diffusion, t, consistency.stage(step))
        rows = MicroBatch(processes.rank, processes.count).rows
        return self.denoiser.prepare(batch, step) | {"t": rows(t), "r": rows(r)}

    def step(self, batch: dict[str, Any], step: int, micro_batch: MicroBatch) -> Metrics:
        """One micro-batch of what `prepare` made, on the device; the host reads none of it."""
        x0 = Posterior.from_moments(batch["moments"]).sample(batch["posterior"])
        with self.run.accelerator.autocast():
            context = self.denoiser.captions.context(batch["caption"])
        seed = seed_of(self.config.loop.seed, step, f"dropout {micro_batch.index}")
        network = same_draws(self.learner.forward_model, seed)
        t, r = batch["t"], batch["r"]
        distance = self._distance(network, x0, context, noise=batch["noise"], t=t, r=r)
        loss = (consistency_weight(self.diffusion, t, r).to(distance) * distance).mean()
        metrics = {"loss": loss, "distance": distance.mean()}
        return metrics | {"grad_norm": self.learner.update(loss, micro_batch)}

    def _distance(
        self, network: Network, x0: Tensor, context: Tensor, *, noise: Tensor, t: Tensor, r: Tensor
    ) -> Tensor:
        """The student's distance at t from what the guided teacher leads to at r, (b,)."""
        dtype = next(self.teacher.parameters()).dtype

        def teacher(x: Tensor, timestep: Tensor, both: Tensor) -> Tensor:
            with self.run.accelerator.autocast():
                output = self.teacher(x.to(dtype), timestep, both.to(dtype))
            return output.to(x.dtype)

        null, scale = self.null_context.to(context), self.config.guidance_scale
        guided = guided_denoiser(self.diffusion, teacher, context, null, scale)
        return consistency_distance(
            self.diffusion, network, guided, x0, context, noise=noise, t=t, r=r
        )

    def _loss(
        self, network: Network, x0: Tensor, context: Tensor, *, noise: Tensor, t: Tensor
    ) -> Tensor:
        """The loss of each held-out example in the last stage, (B,), whatever the stage is: so that
        two values differ by the weights alone."""
        consistency = self.config.consistency
        r = consistency.second(self.diffusion, t, consistency.num_stages - 1)
        distance = self._distance(network, x0, context, noise=noise, t=t, r=r)
        return consistency_weight(self.diffusion, t, r).to(distance) * distance
