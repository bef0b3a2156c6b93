"""DistillTask: trains a student on its teacher's trajectories (see trajectories.py).

Data, captions, preview and the saved model are those of a denoiser's training (`DenoiserTask`); a
step and its loss are of here. Of an image only its caption and size are used.
Shapes: b images of a batch, C latent channels, H/W latent size; N steps of the student.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentdiff.data.cache import LatentCache
from latentdiff.diffusion import Network
from latentdiff.guidance import guided_denoiser
from latentdiff.loading import Components
from latentdiff.tasks.denoiser.task import DenoiserTask
from latentdiff.tasks.distill.config import Distill
from latentdiff.tasks.distill.start import frozen, make_student
from latentdiff.tasks.distill.trajectories import step_errors, trajectory
from latentdiff.training.logging.meter import Metrics
from latentdiff.training.randomness import MicroBatch
from latentdiff.training.run import Run


class DistillTask:
    """The step of a student, and its validation loss."""

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
        `DenoiserTask` do, and for steps out of range."""
        self.config, self.run = config, run
        student = make_student(teacher, config)
        self.diffusion = student.diffusion
        self.levels = self.diffusion.levels(config.distilled_steps)
        self.teacher_levels = self.diffusion.levels(config.teacher_steps)
        self.denoiser = DenoiserTask(config.denoiser(), run, cache=cache, val=val, model=student)
        precision = run.accelerator.mixed_precision
        self.teacher = frozen(teacher.unet, precision=precision, device=run.device)
        text_encoder = self.denoiser.text_encoder
        with run.accelerator.autocast():
            self.null_context = text_encoder.states(text_encoder.token_ids([""]))  # (1, L, D)
        self.learners, self.fingerprints = self.denoiser.learners, self.denoiser.fingerprints
        self.learner, self.draws = self.denoiser.learner, self.denoiser.draws
        self.data_summary = self.denoiser.data_summary
        self.prepare, self.preview = self.denoiser.prepare, self.denoiser.preview
        self.save = self.denoiser.save

    def step(self, batch: dict[str, Any], step: int, micro_batch: MicroBatch) -> Metrics:
        """One micro-batch of what `prepare` made, on the device; the host reads none of it."""
        with self.run.accelerator.autocast():
            context = self.denoiser.captions.context(batch["caption"])
        self.denoiser.seed_dropout(step, micro_batch)
        errors = self._errors(self.learner.forward_model, batch["noise"], context)
        loss = errors.mean()
        return {"loss": loss, "grad_norm": self.learner.update(loss, micro_batch)}

    def validate(self) -> Metrics:
        """The EMA student's loss on the validation split; `val_loss_0` is its last step's."""
        # As many trajectories at once as in a step; the student's own passes save nothing here.
        return self.denoiser.validate(self._validation_errors, passes=1)

    @torch.no_grad()
    def _validation_errors(self, rows: Sequence[int]) -> Tensor:
        """Losses of validation rows of one size, (b, N), from little noise to much."""
        denoiser = self.denoiser
        moments, captions, randn = denoiser.held_out(rows)
        noise = randn(denoiser.channels, *moments.shape[2:])
        with self.run.accelerator.autocast():
            context = denoiser.text_encoder(captions)
            return self._errors(denoiser.ema, noise, context).flip(0).T

    def _errors(self, student: Network, noise: Tensor, context: Tensor) -> Tensor:
        """How far each of the student's steps ends from the guided teacher's, (N, b).

        noise (b, C, H, W), context (b, L, D).
        """
        dtype = next(self.teacher.parameters()).dtype

        def teacher(x: Tensor, timestep: Tensor, both: Tensor) -> Tensor:
            with self.run.accelerator.autocast():
                output = self.teacher(x.to(dtype), timestep, both.to(dtype))
            return output.to(x.dtype)

        null, scale = self.null_context.to(context), self.config.guidance_scale
        guided = guided_denoiser(self.diffusion, teacher, context, null, scale)
        states = trajectory(guided, noise, self.teacher_levels, len(self.levels))
        return step_errors(self.diffusion, student, states, context, self.levels)
