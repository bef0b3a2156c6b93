"""Distill: the options of `distill.py`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from latentdiff.data.config import DataConfig
from latentdiff.data.crop_flip import CropFlip
from latentdiff.models.lora_training import LoRAConfig
from latentdiff.options import group, option
from latentdiff.tasks.denoiser.config import OF_THE_CACHE, OF_THE_FILE, TrainUNet
from latentdiff.training.accelerator import ComputeConfig, ParallelConfig
from latentdiff.training.ema import EMAConfig
from latentdiff.training.optimizer import OptimizerConfig
from latentdiff.training.run import LoopConfig

OF_A_CHECK = ("check_latents", "min_psnr", "max_colour_error")
"""The teacher's VAE is not checked: the student's latents are what the teacher was trained on."""


@dataclass(frozen=True)
class Distill:
    """Distil a model into a student that draws in few steps; leaves a pipeline folder or a LoRA."""

    FIRST: ClassVar[Sequence[str]] = (
        "teacher",
        "cache",
        "output_dir",
        "distilled_steps",
        "guidance_scale",
        "teacher_steps",
        "max_steps",
        "batch_size",
        "learning_rate",
    )
    EXAMPLES: ClassVar[Sequence[str]] = ("--teacher runs/mine/unet/model --cache runs/mine/cache",)
    NEEDS: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys((one for one in OF_THE_CACHE if one not in OF_A_CHECK), "cache=null"),
        "num_workers": "cache=null or in_memory=false",
        "masks": "",
        **{f"lora.{name}": "lora.weights=null" for name in OF_THE_FILE},
        "lora.text_encoder": "",  # the teacher reads the same states of a text
        "shuffle_buffer": "",  # a stream is encoded in its order
        "validate_every": "val_fraction",
    }

    teacher: str | None = None
    """The model to distil, which must be given: a folder, a single file, a hub id, "emoji" or the
    `model` of a run. The student begins as it, and has its VAE, text encoder and schedule."""
    guidance_scale: float = 4.0
    """The teacher's guidance scale, at least 1, which becomes part of the student."""
    distilled_steps: int = 4
    """Steps that the student draws in; each example teaches it all of them."""
    teacher_steps: int = 20
    """Steps of DPM-Solver++(2M) in which the teacher draws each example, a multiple of
    `distilled_steps`."""
    lora: LoRAConfig | None = None
    """Make the student as a LoRA of the teacher, a file of a few MB, in place of a whole model."""
    cache: Path | None = None
    """Folder of a latent cache of the teacher's VAE, that cache_latents.py wrote; without it `data`
    is encoded first, into the run folder."""
    val_fraction: float = 0.01
    """Fraction of the examples in the validation split, which has 256 at most."""
    preview_prompts: Sequence[str] = option((), may_change=True)
    """Prompts of the preview grid; by default up to eight captions of the training data."""
    data: DataConfig = group(DataConfig)
    crop_flip: CropFlip = group(CropFlip)
    optimizer: OptimizerConfig = group(OptimizerConfig, beta2=0.999, weight_decay=0.0)
    ema: EMAConfig = group(EMAConfig)
    loop: LoopConfig = group(LoopConfig, output_dir=Path("runs/distill"), max_steps=8000)
    compute: ComputeConfig = group(ComputeConfig)
    parallel: ParallelConfig = group(ParallelConfig)

    def __post_init__(self) -> None:
        if not 1 <= self.guidance_scale < float("inf"):
            raise ValueError(
                f"guidance_scale={self.guidance_scale} must be at least 1, which is no guidance"
            )
        for name in ("distilled_steps", "teacher_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.teacher_steps % self.distilled_steps:
            nearest = -(-self.teacher_steps // self.distilled_steps) * self.distilled_steps
            raise ValueError(
                f"teacher_steps={self.teacher_steps} must be a multiple of distilled_steps="
                f"{self.distilled_steps}, such as {nearest}"
            )
        self.denoiser()  # whose checks are those of the shared options

    def denoiser(self) -> TrainUNet:
        """The fine-tuning of the teacher that has the same data, captions, network and run.

        Every caption is given: guidance, which needs the empty one, is part of the student.
        """
        return TrainUNet(
            init=self.teacher,
            lora=self.lora,
            cache=self.cache,
            caption_dropout=0.0,
            val_fraction=self.val_fraction,
            preview_prompts=self.preview_prompts,
            data=self.data,
            crop_flip=self.crop_flip,
            optimizer=self.optimizer,
            ema=self.ema,
            loop=self.loop,
            compute=self.compute,
            parallel=self.parallel,
        )
