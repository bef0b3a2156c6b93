"""TrainUNet: the options of `train_unet.py`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar

from latentdiff.data.config import DataConfig
from latentdiff.data.crop_flip import CropFlip
from latentdiff.data.reconstruction_check import ReconstructionLimits
from latentdiff.diffusion import Diffusion
from latentdiff.models.dit import DiTConfig
from latentdiff.models.lora_training import LoRAConfig
from latentdiff.models.unet import UNetConfig
from latentdiff.options import group, option
from latentdiff.tasks.denoiser.loss import LossConfig
from latentdiff.tasks.denoiser.prior import PriorConfig
from latentdiff.training.accelerator import ComputeConfig, ParallelConfig
from latentdiff.training.ema import EMAConfig
from latentdiff.training.optimizer import OptimizerConfig
from latentdiff.training.run import LoopConfig

SMALL = UNetConfig(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(64, 128, 256),
    layers_per_block=1,
    attention_head_dim=(1, 2, 4),
    use_linear_projection=True,
)

OF_THE_CACHE = [
    *(one.name for one in (*fields(DataConfig), *fields(CropFlip)) if one.name != "num_workers"),
    "check_latents",
    *(one.name for one in fields(ReconstructionLimits)),
]
"""Options of encoding: a cache was made with its own."""
OF_THE_FILE = ("rank", "alpha", "layers", "text_encoder")
"""Options of a LoRA that is begun: one that is gone on with has its own."""
FOLLOWS = ("sample_size", "in_channels", "out_channels", "cross_attention_dim")
"""Of a network: they follow from VAE, text encoder and cache."""


@dataclass(frozen=True)
class TrainUNet:
    """Train a UNet or a DiT to denoise latents of captioned images; leaves a pipeline folder."""

    FIRST: ClassVar[Sequence[str]] = (
        "cache",
        "output_dir",
        "vae",
        "text_encoder",
        "init",
        "max_steps",
        "batch_size",
        "learning_rate",
        "mixed_precision",
    )
    EXAMPLES: ClassVar[Sequence[str]] = (
        "--cache runs/mine/cache --vae runs/mine/vae/model --text_encoder runs/mine/clip/model",
        "--config configs/emoji/unet.yaml --max_steps 2000",
    )
    NEEDS: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(OF_THE_CACHE, "cache=null"),
        "num_workers": "cache=null or in_memory=false",
        "masks": "cache=null and inpainting",
        "shuffle_buffer": "",  # a stream is encoded in its order
        **{"lora": "init", "class_prompt": "init"},
        **{f"lora.{name}": "lora.weights=null" for name in OF_THE_FILE},
        "unet": "dit=null and init=null",
        "dit": "init=null",
        **{f"{network}.{name}": "" for network in ("unet", "dit") for name in FOLLOWS},
        "unet.addition_embed_type_num_heads": "unet.addition_embed_type",
        "diffusion.distilled_steps": "",  # of distill.py
        "diffusion.steps_offset": "diffusion.timestep_spacing=leading",
        **{"validate_every": "val_fraction", "save_best": "val_fraction"},
        "preview_prompts": "inpainting=false",
    }

    init: str | None = None
    """A model to start from: a folder, a single file, a hub id, "emoji" or the `model` of a run.
    Network, diffusion, VAE and text encoder are its own; `diffusion`, `vae` and `text_encoder`
    replace them."""
    lora: LoRAConfig | None = None
    """Train a LoRA of `init`, whose weights stay as they are, in place of the whole network."""
    inpainting: bool = False
    """Train the network to paint what a mask covers, which it gets with the rest of the image. A
    network of `init` that has no channels for them gets some, with weights of 0."""
    cache: Path | None = None
    """Folder of a latent cache that cache_latents.py wrote, with its own data, sizes and crops;
    without it `data` is encoded first, into the run folder."""
    vae: str | None = None
    """Folder of the VAE or of a pipeline, or "emoji", the embedded one; by default that of `init`,
    and for "shapes" the embedded one."""
    check_latents: bool = option(True, former_name="gate")
    """Where `data` is encoded: refuse a VAE whose latents are not fit to train on; false warns."""
    text_encoder: str | None = None
    """Folder with text_encoder/ and tokenizer/, or "emoji"; the default is as that of `vae`."""
    diffusion: Diffusion | None = None
    """By default that of `init`, and for a new network schedule flow with flow_prediction; what is
    given is all of it."""
    unet: UNetConfig = field(default_factory=lambda: SMALL)
    """Channels, context width and sample_size follow from VAE, text encoder and cache."""
    dit: DiTConfig | None = None
    """If given, a diffusion transformer is trained instead of the UNet; the same three follow."""
    caption_dropout: float = 0.1
    """Probability that a caption is replaced by the empty one, for classifier-free guidance."""
    val_fraction: float = option(0.01, former_name="held_out")
    """Fraction of the examples in the validation split, which has 256 at most."""
    preview_prompts: Sequence[str] = option((), may_change=True)
    """Prompts of the preview grid; by default up to eight captions of the training data. For
    inpainting the grid shows images of the data, masked and as they are painted by their own
    captions."""
    loss: LossConfig = group(LossConfig)
    prior: PriorConfig = group(PriorConfig)
    data: DataConfig = group(DataConfig)
    reconstruction: ReconstructionLimits = group(ReconstructionLimits)
    crop_flip: CropFlip = group(CropFlip)
    optimizer: OptimizerConfig = group(OptimizerConfig, learning_rate=1e-3, cooldown_steps=300)
    ema: EMAConfig = group(EMAConfig)
    loop: LoopConfig = group(
        LoopConfig, output_dir=Path("runs/shapes/unet"), max_steps=800, batch_size=64
    )
    compute: ComputeConfig = group(ComputeConfig)
    parallel: ParallelConfig = group(ParallelConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout={self.caption_dropout} must be in [0, 1]")
        if self.lora is not None and self.parallel.sharding != "none":
            raise ValueError(
                f"sharding={self.parallel.sharding} must be none with lora: little of it is trained"
            )
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction} must be in [0, 1)")
        if self.inpainting and self.cache is None and self.crop_flip.masks == 0:
            raise ValueError(
                "masks=0 must be at least 1 with inpainting=true: how many random masks of each "
                "crop the network learns from, such as 4"
            )
