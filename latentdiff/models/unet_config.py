"""The configuration of a UNet, with the keys of diffusers' `UNet2DConditionModel`."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from latentdiff.formats.header import short_repr
from latentdiff.models.network_config import (
    MAX_LAYERS,
    MAX_WIDTH,
    check_levels,
    check_range,
    check_types,
    config_from_dict,
    means,
    one_number,
)

ATTENTION_BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
ATTENTION_UP_BLOCKS = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)


@dataclass(frozen=True)
class UNetConfig:
    """The keys of a `UNet2DConditionModel`; the defaults are those of SD 1.5."""

    sample_size: int | None = 64
    """Side of the latents that it was trained on; a pipeline's default image size follows."""
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: Sequence[str] = (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    )
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: Sequence[str] = (
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
    )
    block_out_channels: Sequence[int] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    cross_attention_dim: int = 768
    attention_head_dim: int | Sequence[int] = 8
    """The NUMBER of heads, of all blocks or of each: diffusers' misnomer, which every file has."""
    transformer_layers_per_block: int = 1
    use_linear_projection: bool = False
    upcast_attention: bool | None = False
    """Read and written for SD 2.1; our attention accumulates its softmax in float32 anyway."""
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    addition_embed_type: Literal["text"] | None = None
    """text: the context, pooled by an attention of its own, is added to the time."""
    addition_embed_type_num_heads: int = 64
    """Of that attention; they divide `cross_attention_dim`, which the UNet checks: in a training it
    follows from the text encoder."""
    class_embed_type: Literal["simple_projection"] | None = None
    """simple_projection: the mean of the context, projected, is added to the time, or
    concatenated with it (AudioLDM's words; there a sound's embedding stands in its place)."""
    class_embeddings_concat: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("down_block_types", "up_block_types", "block_out_channels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not isinstance(self.attention_head_dim, int):
            object.__setattr__(self, "attention_head_dim", tuple(self.attention_head_dim))
        check_range(self, 1, MAX_WIDTH, "in_channels", "out_channels", "cross_attention_dim")
        check_range(self, 1, MAX_WIDTH, "attention_head_dim", "sample_size")
        check_range(self, 1, MAX_WIDTH, "addition_embed_type_num_heads")
        check_range(self, 1, MAX_LAYERS, "transformer_layers_per_block")
        check_levels(self, transformer_layers=self.transformer_layers_per_block)
        check_range(self, 1e-12, 1.0, "norm_eps")
        check_range(self, 0, (self.block_out_channels[0] - 1) // 2, "freq_shift")
        levels = len(self.block_out_channels)
        for name, allowed in (
            ("down_block_types", ATTENTION_BLOCKS),
            ("up_block_types", ATTENTION_UP_BLOCKS),
        ):
            blocks = getattr(self, name)
            if len(blocks) != levels or any(block not in allowed for block in blocks):
                raise ValueError(
                    f"{name}={short_repr(list(blocks))} must be {levels} of {sorted(allowed)}, "
                    f"one for each of block_out_channels={list(self.block_out_channels)}"
                )
        if self.mid_block_type not in MID_BLOCKS:
            given = short_repr(self.mid_block_type)
            raise ValueError(f"mid_block_type={given} must be one of {MID_BLOCKS}")
        if len(self.heads) != levels:
            given = short_repr(self.attention_head_dim)
            raise ValueError(f"attention_head_dim={given} must be one number or {levels}")

        self._check_pooled_text()

    def _check_pooled_text(self) -> None:
        if self.addition_embed_type is not None and self.class_embed_type is not None:
            raise ValueError(
                f"class_embed_type={self.class_embed_type!r} must be null where "
                "addition_embed_type is given: text joins the time in one way"
            )
        if self.class_embeddings_concat and self.class_embed_type is None:
            raise ValueError("class_embeddings_concat=True must be False without class_embed_type")

    @property
    def time_width(self) -> int:
        """Width of the time embedding that the blocks get, with pooled text if there is any."""
        width = 4 * self.block_out_channels[0]
        return 2 * width if self.class_embeddings_concat else width

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of attention heads at each level."""
        if isinstance(self.attention_head_dim, int):
            return (self.attention_head_dim,) * len(self.block_out_channels)
        return tuple(self.attention_head_dim)

    def to_dict(self) -> dict[str, Any]:
        """Every key of `UNet2DConditionModel`."""
        # The width of what is pooled is that of the context.
        width = None if self.class_embed_type is None else self.cross_attention_dim
        return {**FIXED, **dataclasses.asdict(self), PROJECTED: width}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read a `UNet2DConditionModel` configuration.

        Raises ValueError, naming the key, for what this network cannot do.
        """
        values = dict(values)
        width = values.pop(PROJECTED, None)
        said = {key: values.pop(key, None) for key in _IMPLIED}
        channels = values.get("block_out_channels", cls.block_out_channels)
        levels = len(channels) if isinstance(channels, (list, tuple)) else 0
        for key in _REPEATED & values.keys():
            values[key] = one_number(values[key], 2 if key == "sample_size" else levels)
        config = config_from_dict(cls, values, fixed=FIXED, absent=ABSENT)
        if width != config.to_dict()[PROJECTED]:
            raise ValueError(
                f"{PROJECTED}={short_repr(width)} must be {config.to_dict()[PROJECTED]!r}: "
                "cross_attention_dim where class_embed_type is given, and else null"
            )
        config._check_implied(said)
        return config

    def _check_implied(self, said: dict[str, Any]) -> None:
        """Raise ValueError where a file gives a key of `_IMPLIED` another value than follows."""
        heads = self.heads if len(set(self.heads)) > 1 else self.heads[0]
        follows = (heads, 4 * self.block_out_channels[0], self.transformer_layers_per_block)
        for (key, value), expected in zip(said.items(), follows, strict=True):
            if value is not None and not means(value, expected):
                raise ValueError(
                    f"{key}={short_repr(value)} is not supported, only null or {expected!r}, "
                    "which follows from the other keys"
                )


# Keys that say again what others say; null in SD 1.x and 2.x.
_IMPLIED = ("num_attention_heads", "time_embedding_dim", "reverse_transformer_layers_per_block")
# Keys for which diffusers takes a list, too: of height and width, or of one number a level.
_REPEATED = {"sample_size", "layers_per_block", "cross_attention_dim"}
_REPEATED |= {"transformer_layers_per_block"}
PROJECTED = "projection_class_embeddings_input_dim"
# Keys of UNet2DConditionModel that SD 1.x and 2.x leave at one value.
FIXED: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "addition_time_embed_dim": None,
    "attention_type": "default",
    "center_input_sample": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
# What an absent key means to diffusers, where it is not SD 1.5's value.
ABSENT: dict[str, Any] = {"sample_size": None, "cross_attention_dim": 1280}
