"""TrainVAE: the options of `train_vae.py`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from latentdiff.data.config import DataConfig
from latentdiff.models.vae import VAEConfig
from latentdiff.options import group
from latentdiff.tasks.images import check_in_memory
from latentdiff.tasks.vae.losses import VAELossConfig
from latentdiff.training.accelerator import ComputeConfig, ParallelConfig
from latentdiff.training.ema import EMAConfig
from latentdiff.training.optimizer import OptimizerConfig
from latentdiff.training.run import LoopConfig

SMALL = VAEConfig(
    block_out_channels=(32, 64, 128),
    layers_per_block=1,
    norm_num_groups=16,
    mid_block_add_attention=False,
)


@dataclass(frozen=True)
class TrainVAE:
    """Train a VAE on images: reconstruction, KL and, if asked for, LPIPS and a discriminator.

    Captions are never read.
    """

    FIRST: ClassVar[Sequence[str]] = (
        "data",
        "output_dir",
        "image_size",
        "max_steps",
        "batch_size",
        "learning_rate",
        "mixed_precision",
        "init",
        "seed",
    )
    EXAMPLES: ClassVar[Sequence[str]] = (
        "--data images --output_dir runs/mine/vae",
        "--config configs/emoji/vae.yaml --max_steps 2000",
    )
    NEEDS: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("bucket_step", "max_aspect", "validate_every", "vae.sample_size"), ""),
        **dict.fromkeys(("instance_prompts", "save_best"), ""),
        "vae.use_quant_conv": "vae.encoder=kl",
        "kl_weight": "decoder_only=false",
    }

    vae: VAEConfig = field(default_factory=lambda: SMALL)
    """`sample_size` follows image_size."""
    init: str | None = None
    """Folder of a VAE or of a pipeline, or "emoji": the VAE to train on; `vae` is then left out."""
    decoder_only: bool = False
    """Train the decoder of `init` alone: its latents keep their bits, so that UNets and latent
    caches stay valid. The loss has no KL."""
    random_flip: bool = False
    """Mirror each image with probability 1/2."""
    loss: VAELossConfig = group(VAELossConfig)
    data: DataConfig = group(DataConfig, caption_columns=())
    optimizer: OptimizerConfig = group(OptimizerConfig, learning_rate=1e-3, cooldown_steps=200)
    ema: EMAConfig = group(EMAConfig)
    loop: LoopConfig = group(
        LoopConfig, output_dir=Path("runs/shapes/vae"), max_steps=600, batch_size=16
    )
    compute: ComputeConfig = group(ComputeConfig)
    parallel: ParallelConfig = group(ParallelConfig)

    def __post_init__(self) -> None:
        check_in_memory(self.compute, self.data)
        if self.ema.ema_lengths:
            raise ValueError(
                f"ema_lengths={list(self.ema.ema_lengths)} must be empty: a VAE is saved with the "
                "statistics of its latents, which other weights change"
            )
        if self.init is None:  # an `init` is checked when it is read
            self.vae.check_folds()
        if self.decoder_only and self.init is None:
            raise ValueError("decoder_only=True needs init, the VAE whose latents are kept")
        probability = self.loss.equivariance_probability
        if self.decoder_only and probability > 0:
            raise ValueError(
                f"equivariance_probability={probability} must be 0 with decoder_only: it is the "
                "encoder that learns from it"
            )
        sharding = self.parallel.sharding
        if self.decoder_only and sharding in ("zero1", "zero2"):
            raise ValueError(
                f"sharding={sharding!r} must be 'none' or 'full' with decoder_only: DeepSpeed "
                "keeps moments of every parameter"
            )
        for name, alone in (("gradient_accumulation_steps", 1), ("sharding", "none")):
            value = getattr(self.parallel, name)
            if self.loss.disc_weight > 0 and value != alone:
                raise ValueError(
                    f"{name}={value!r} must be {alone!r} with a disc_weight: the weight of the "
                    "adversarial loss follows from the whole batch and network"
                )
        way = self.compute.compile
        if self.loss.disc_weight > 0 and way in ("network", "graph"):
            raise ValueError(
                f"compile={way!r} must be true or false with a disc_weight: its gradient goes "
                "through the decoder twice"
            )
