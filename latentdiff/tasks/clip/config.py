"""TrainCLIP: the options of `train_clip.py`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from latentdiff.data.config import DataConfig
from latentdiff.models.clip import CLIPSize
from latentdiff.options import group, option
from latentdiff.tasks.clip.augmentation import AugmentationConfig
from latentdiff.tasks.images import check_in_memory
from latentdiff.training.accelerator import ComputeConfig, ParallelConfig
from latentdiff.training.ema import EMAConfig
from latentdiff.training.optimizer import OptimizerConfig
from latentdiff.training.run import LoopConfig


@dataclass(frozen=True)
class TrainCLIP:
    """Train a tokenizer on the captions, then text and image tower contrastively on the pairs.

    With `init`, train existing towers on, and keep their tokenizer."""

    FIRST: ClassVar[Sequence[str]] = (
        "data",
        "output_dir",
        "image_size",
        "caption_columns",
        "max_steps",
        "batch_size",
        "learning_rate",
        "mixed_precision",
        "init",
    )
    EXAMPLES: ClassVar[Sequence[str]] = (
        "--data images --output_dir runs/mine/clip",
        "--config configs/emoji/clip.yaml --max_steps 2000",
    )
    NEEDS: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("bucket_step", "max_aspect"), ""),
        "instance_prompts": "",  # the loss compares captions with each other
        "save_best": "",  # retrieval counts images, and few of them
        "validate_every": "val_fraction",
    }

    init: str | None = None
    """A CLIP to start from: both towers are read from a folder of transformers' CLIPModel; the text
    tower alone from the folder of a pipeline or run, "emoji", a hub id or open_clip:NAME:WEIGHTS.
    Its shapes and tokenizer then replace those of `clip`, `vocab_size` and `max_tokens`."""
    contrastive: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: which of the batch's captions is an image's, and which image a caption's (CLIP);
    sigmoid: of each pair, whether it is one (SigLIP)."""
    val_fraction: float = option(0.01, former_name="held_out")
    """Fraction of the images in the validation split, on which retrieval is measured; it has 256 at
    most. There is no split of a stream, or if it had fewer than two images."""
    clip: CLIPSize = field(default_factory=CLIPSize)
    vocab_size: int = 3072
    """Size of the vocabulary at most; 514 of its tokens are fixed: bytes, start and end."""
    max_tokens: int = 24
    """Tokens of a prompt, with start and end; a longer prompt is truncated with a warning."""
    augmentation: AugmentationConfig = group(AugmentationConfig)
    data: DataConfig = group(DataConfig)
    optimizer: OptimizerConfig = group(OptimizerConfig, learning_rate=1e-3, cooldown_steps=200)
    ema: EMAConfig = group(EMAConfig)
    loop: LoopConfig = group(
        LoopConfig, output_dir=Path("runs/shapes/clip"), max_steps=600, batch_size=128
    )
    compute: ComputeConfig = group(ComputeConfig)
    parallel: ParallelConfig = group(ParallelConfig)

    def __post_init__(self) -> None:
        check_in_memory(self.compute, self.data)
        if self.parallel.sharding != "none":
            raise ValueError(
                f"sharding={self.parallel.sharding!r} must be 'none': CLIP's temperature is one "
                "number, which cannot be split, and is kept below a limit after each step"
            )
        if (steps := self.parallel.gradient_accumulation_steps) != 1:
            raise ValueError(
                f"gradient_accumulation_steps={steps} must be 1: the contrastive loss compares "
                "each image with every caption of the batch, so that micro-batches have another "
                "loss"
            )
        if (size := self.loop.batch_size) < 2:
            raise ValueError(
                f"batch_size={size} must be at least 2: the contrastive loss compares an image "
                "with the captions of the others, and of one alone it is always 0"
            )
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction} must be in [0, 1)")
        if not self.data.caption_columns:
            raise ValueError("caption_columns is empty: CLIP is trained on images with captions")
