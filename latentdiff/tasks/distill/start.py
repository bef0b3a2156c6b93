"""What a distillation begins with: the teacher, and the student that is a copy of it."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch

from latentdiff.formats.weights import check_tensors
from latentdiff.loading import Components
from latentdiff.models.dit import DiT
from latentdiff.models.unet import UNet
from latentdiff.pipeline import Pipeline
from latentdiff.tasks.distill.config import Distill

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def load_teacher(config: Distill, say: Callable[[str], object]) -> Components:
    """The model that `teacher` names, in float32.

    Raises ValueError where there is none, and for one that cannot be distilled: a student, an
    inpainting model, one that has learned its variance, or a DiT into a LoRA.
    """
    name = config.teacher
    if name is None:
        raise ValueError(
            'teacher must be given: a model folder, a single file, the model of a run, or "emoji", '
            "such as --teacher runs/shapes/unet/model"
        )
    try:
        pipeline = Pipeline.from_pretrained(name, device="cpu")
    except ValueError as error:
        raise ValueError(f"teacher: {error}") from error
    diffusion, reason = pipeline.diffusion, None
    if diffusion.distilled_steps is not None:
        reason = f"a student already, of {diffusion.distilled_steps} steps: give its own teacher"
    elif pipeline.inpaints:
        reason = "an inpainting model, which is not distilled here: give one that draws from text"
    elif diffusion.learned_variance:
        reason = "a model with a learned variance, which a student has no use for: give another"
    elif config.lora is not None and not isinstance(pipeline.unet, UNet):
        reason = "a DiT, and a LoRA needs a UNet: leave lora out"
    if reason is not None:
        raise ValueError(f"teacher={name} is {reason}")
    kind = type(pipeline.unet).__name__
    count = sum(p.numel() for p in pipeline.unet.parameters())
    say(
        f"teacher: {name}, a {kind} of {count / 1e6:,.1f} M parameters, guided by "
        f"{config.guidance_scale:g}, prediction={diffusion.prediction}, "
        f"schedule={diffusion.schedule}"
    )
    return pipeline.components


def make_student(teacher: Components, config: Distill) -> Components:
    """A copy of the teacher's network beside its other networks, as a student."""
    return teacher._replace(
        unet=copy.deepcopy(teacher.unet),
        diffusion=teacher.diffusion.student(config.distilled_steps),
    )


def frozen(network: UNet | DiT, *, precision: str, device: torch.device) -> UNet | DiT:
    """The teacher's network as it is evaluated, in half precision where the run computes in it.

    Raises ValueError for weights that are too large for float16.
    """
    if (dtype := DTYPES.get(precision)) is not None:
        check_tensors(network.state_dict(), Path("the network of teacher"), dtype)
        network = network.to(dtype)
    return network.to(device).requires_grad_(False).eval()
