"""The configuration of a VAE, with the keys of diffusers' `AutoencoderKL`."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from latentdiff.formats.header import short_repr
from latentdiff.models.network_config import (
    MAX_LEVELS,
    MAX_WIDTH,
    check_levels,
    check_range,
    check_types,
    config_from_dict,
    means,
    one_number,
)


@dataclass(frozen=True)
class VAEConfig:
    """The keys of an `AutoencoderKL`; the defaults are those of SD 1.x and 2.x."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: Sequence[int] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 512
    """Side of the images that it was trained on, in pixels."""
    scaling_factor: float = 0.18215
    """Multiplies latents so that they have unit variance."""
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    """A last 1×1 convolution of the encoder "kl"; downsample has none."""
    use_post_quant_conv: bool = True
    force_upcast: bool = True
    """Tells diffusers' half-precision users to decode in float32; our own code ignores it."""
    encoder: Literal["kl", "downsample", "none"] = "kl"
    """kl is learned, and gives a Gaussian; downsample averages areas of the image, so that
    latent_channels equals in_channels, and only the decoder, which upscales, is learned; none is
    what a file without an encoder has, which can only draw."""

    def __post_init__(self) -> None:
        check_types(self)
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))
        check_levels(self)
        check_range(self, 1, MAX_WIDTH, "in_channels", "out_channels", "latent_channels")
        check_range(self, 1, MAX_WIDTH, "sample_size")
        check_range(self, 1e-6, 1e6, "scaling_factor")
        if self.encoder == "downsample" and self.latent_channels != self.in_channels:
            raise ValueError(
                f"latent_channels={self.latent_channels} must be {self.in_channels}, the "
                "in_channels, with encoder='downsample': the latent is the image made small"
            )

    @property
    def factor(self) -> int:
        """How many times smaller a latent's side is than its image's."""
        return 2 ** (len(self.block_out_channels) - 1)

    def check_folds(self) -> None:
        """Raise ValueError without a convolution that `VAE.fold_latent_statistics` needs."""
        if self.encoder == "none":
            raise ValueError("encoder='none' must be 'kl' or 'downsample': no image has a latent")
        learned = ("use_quant_conv",) if self.encoder == "kl" else ()
        for name in (*learned, "use_post_quant_conv"):
            if not getattr(self, name):
                raise ValueError(f"{name}=False must be true: latents are standardised in it")

    def to_dict(self) -> dict[str, Any]:
        """Every key that `AutoencoderKL` needs.

        The key `encoder`, which diffusers does not have, is left out with "kl".
        """
        values = {**_fixed(self.encoder, len(self.block_out_channels)), **dataclasses.asdict(self)}
        if self.encoder == "kl":
            del values["encoder"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read an `AutoencoderKL` configuration.

        Raises ValueError, naming the key, for what this network cannot do.
        """
        values = dict(values)
        channels = values.get("block_out_channels", ABSENT["block_out_channels"])
        if not isinstance(channels, (list, tuple)) or len(channels) > MAX_LEVELS:
            raise ValueError(
                f"block_out_channels={short_repr(channels)} must be a list of 1 to "
                f"{MAX_LEVELS} numbers"
            )
        values["sample_size"] = one_number(values.get("sample_size", ABSENT["sample_size"]), 2)
        if means(values.get("latents_std"), 1):  # they divide by 1
            del values["latents_std"]
        encoder = values.get("encoder", "kl")
        fixed = _fixed(encoder if encoder in ("downsample", "none") else "kl", len(channels))
        return config_from_dict(cls, values, fixed=fixed, absent=ABSENT)


# Keys of AutoencoderKL that have one supported value, and what an absent key means to diffusers.
FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}
ABSENT: dict[str, Any] = {"block_out_channels": (64,), "layers_per_block": 1, "sample_size": 32}
# The class and the type of its down blocks, by encoder. diffusers has those of "kl" alone, so that
# it refuses the other folders rather than add an encoder of random weights.
_CLASSES = {
    "kl": ("AutoencoderKL", "DownEncoderBlock2D"),
    "downsample": ("VAE", "AreaAverage"),
    "none": ("VAE", "NoEncoder"),
}


def _fixed(encoder: Literal["kl", "downsample", "none"], levels: int) -> dict[str, Any]:
    """The keys whose value follows from the other keys."""
    class_name, down = _CLASSES[encoder]
    return {
        "_class_name": class_name,
        **FIXED,
        "down_block_types": [down] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
