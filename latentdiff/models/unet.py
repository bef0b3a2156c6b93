"""The denoising UNet with cross-attention to the text (LDM, Rombach et al. 2022, section 3.3).

Configuration keys and parameter names are those of diffusers' `UNet2DConditionModel`, for all that
SD 1.x and 2.x use, and for pooled text added to the time embedding.
Shapes: B batch, C latent channels, H/W latent size, L tokens, D context width, E time width.
"""

from collections.abc import Iterator, Sequence
from itertools import repeat

import torch
from torch import Tensor, nn

from latentdiff.models.group_norm import GroupNorm
from latentdiff.models.layers import (
    Downsample,
    KeysValues,
    ResnetBlock,
    SpatialTransformer,
    TextTimeEmbedding,
    TimestepEmbedding,
    Upsample,
    repeated,
    timestep_embedding,
)
from latentdiff.models.network_folder import load_network, save_network
from latentdiff.models.unet_config import ATTENTION_BLOCKS, ATTENTION_UP_BLOCKS, UNetConfig

States = Tensor | tuple[KeysValues, ...]
"""What a transformer reads of the text: the context (B, L, D), or its keys and values there."""


class DownBlock(nn.Module):
    """Residual blocks, each followed by a transformer if `heads` is given, then half the size.

    `times` and `contexts` of these blocks yield what the next residual block and transformer take.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        config: UNetConfig,
        *,
        heads: int | None,
        downsample: bool,
    ) -> None:
        super().__init__()
        layers = range(config.layers_per_block)
        self.resnets = nn.ModuleList(
            resnet(out_channels if i else in_channels, out_channels, config) for i in layers
        )
        self.attentions = nn.ModuleList(
            transformer(out_channels, config, heads) for _ in layers if heads is not None
        )
        self.downsamplers = nn.ModuleList([Downsample(out_channels)] if downsample else [])

    def forward(
        self, x: Tensor, times: Iterator[Tensor], contexts: Iterator[States]
    ) -> list[Tensor]:
        """(B, C, H, W), (B, E), (B, L, D) -> every map made on the way; the last is the output."""
        maps = []
        for i, block in enumerate(self.resnets):
            x = block(x, next(times))
            if self.attentions:
                x = self.attentions[i](x, next(contexts))
            maps.append(x)
        for downsample in self.downsamplers:
            maps.append(downsample(x))
        return maps


class UpBlock(nn.Module):
    """Residual blocks that read the maps of the way down, transformers, then twice the size."""

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        config: UNetConfig,
        *,
        heads: int | None,
        upsample: bool,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnet(ch, out_channels, config) for ch in in_channels)
        self.attentions = nn.ModuleList(
            transformer(out_channels, config, heads) for _ in in_channels if heads is not None
        )
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])

    def forward(
        self,
        x: Tensor,
        skips: list[Tensor],
        times: Iterator[Tensor],
        contexts: Iterator[States],
        kept: list[Tensor] | None = None,
    ) -> Tensor:
        """(B, C, H, W), maps of the way down (takes the last ones off), … -> (B, C', H', W').

        `kept` gets what each residual block reads from below.
        """
        for i, block in enumerate(self.resnets):
            if kept is not None:
                kept.append(x)
            x = block(torch.cat([x, repeated(skips.pop(), len(x))], dim=1), next(times))
            if self.attentions:
                x = self.attentions[i](x, next(contexts))
        for upsample in self.upsamplers:
            # To the size of the map that comes next, which is not twice this one when odd.
            x = upsample(x, skips[-1].shape[-2:])
        return x


class MidBlock(nn.Module):
    """Residual block, then transformer and residual block if there is attention, at the bottom."""

    def __init__(self, channels: int, config: UNetConfig, *, heads: int | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            resnet(channels, channels, config) for _ in range(1 if heads is None else 2)
        )
        self.attentions = nn.ModuleList(
            [] if heads is None else [transformer(channels, config, heads)]
        )

    def forward(self, x: Tensor, times: Iterator[Tensor], contexts: Iterator[States]) -> Tensor:
        x = self.resnets[0](x, next(times))
        for attention, block in zip(self.attentions, self.resnets[1:], strict=True):
            x = block(attention(x, next(contexts)), next(times))
        return x


def resnet(in_channels: int, out_channels: int, config: UNetConfig) -> ResnetBlock:
    """A residual block with this network's norms and time width."""
    return ResnetBlock(
        in_channels,
        out_channels,
        groups=config.norm_num_groups,
        eps=config.norm_eps,
        time_dim=config.time_width,
    )


def transformer(channels: int, config: UNetConfig, heads: int) -> SpatialTransformer:
    """A spatial transformer that attends to this network's context."""
    if heads < 1 or channels % heads:
        raise ValueError(
            f"attention_head_dim={config.attention_head_dim!r}: {heads} heads must divide the "
            f"{channels} channels of their block"
        )
    return SpatialTransformer(
        channels,
        heads=heads,
        context_dim=config.cross_attention_dim,
        groups=config.norm_num_groups,
        layers=config.transformer_layers_per_block,
        linear=config.use_linear_projection,
    )


class UNet(nn.Module):
    """ε, v, x0 or velocity from noisy latents, the timestep and the text."""

    config_class = UNetConfig
    from_pretrained = classmethod(load_network)
    save_pretrained = save_network
    multiple = 1
    """What the sides of the latents must be divisible by."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels, dim = config.block_out_channels, config.cross_attention_dim
        time_dim = 4 * channels[0]
        self.time_embedding = TimestepEmbedding(channels[0], time_dim)
        self.class_embedding = self.add_embedding = None
        if config.class_embed_type is not None:
            self.class_embedding = nn.Linear(dim, time_dim)
        if config.addition_embed_type is not None:
            heads = config.addition_embed_type_num_heads
            if dim % heads:
                raise ValueError(
                    f"addition_embed_type_num_heads={heads} must divide cross_attention_dim={dim}"
                )
            self.add_embedding = TextTimeEmbedding(dim, time_dim, heads=heads)
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = down_blocks(config)
        self.mid_block = mid_block(config)
        self.up_blocks = up_blocks(config)
        self.conv_norm_out = GroupNorm(
            config.norm_num_groups, channels[0], eps=config.norm_eps, silu=True
        )
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)
        self.init_weights()

    def init_weights(self) -> None:
        """LDM's start from scratch: every residual branch and the output begin at zero.

        The network then starts as the zero function with well-scaled gradients; diffusers leaves
        these layers at PyTorch's default.
        """
        for module in self.modules():
            if isinstance(module, ResnetBlock):
                zero(module.conv2)
            elif isinstance(module, SpatialTransformer):
                zero(module.proj_out)
        zero(self.conv_out)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | Sequence[Tensor],
        context: Tensor | Sequence[tuple[KeysValues, ...]],
        *,
        kept: list[Tensor] | None = None,
    ) -> Tensor:
        """(B, C, H, W), (B,), (B, L, D) -> (B, C, H, W); any H and W.

        `timestep` is on diffusers' scale: 0 … 999 for SD's weights (the least noise is 0). In a
        sampling run `prepare_times` and `prepare_context` give what takes the place of timestep and
        context. With contexts of 2B rows, as guidance has them, the result is that of [x, x], and
        what does not depend on them is computed once. `kept` gets what each residual block of the
        last block reads from below (`latentdiff.feature_cache`).
        """
        if isinstance(timestep, Tensor):
            assert isinstance(context, Tensor), "the text may join the time"
            times = repeat(self._with_text(self._embedded(timestep, x.dtype), context))
        else:
            times = iter(timestep)
        contexts = repeat(context) if isinstance(context, Tensor) else iter(context)
        h = self.conv_in(x)
        skips = [h]
        for block in self.down_blocks:
            skips += block(h, times, contexts)
            h = skips[-1]
        if self.mid_block is not None:
            h = self.mid_block(h, times, contexts)
        for block in self.up_blocks[:-1]:
            h = block(h, skips, times, contexts)
        h = self.up_blocks[-1](h, skips, times, contexts, kept)
        return self.conv_out(self.conv_norm_out(h))

    def prepare_context(self, context: Tensor) -> tuple[tuple[KeysValues, ...], ...]:
        """Of a context (B, L, D) the keys and values in each transformer, in the order of use."""
        return tuple(
            module.keys_values(context)
            for module in self.modules()
            if isinstance(module, SpatialTransformer)
        )

    def prepare_times(
        self, timesteps: Tensor, context: Tensor, *, dtype: torch.dtype
    ) -> list[tuple[Tensor, ...]]:
        """Of each of N timesteps (N,) the shifts of all residual blocks, (B or 1, C, 1, 1) each.

        They are of each row of the context (B, L, D) where the text joins the time, else of all.
        `dtype` is that of x.
        """
        time = self._embedded(timesteps, dtype)  # (N, E)
        times = [time]
        if self.class_embedding is not None or self.add_embedding is not None:
            # Row by row, so that no other row changes the bits of one.
            times = [self._with_text(time, row) for row in context.split(1)]
        shifts = [
            torch.stack([module.time_shift(row) for row in times], dim=1)
            for module in self.modules()
            if isinstance(module, ResnetBlock)
        ]
        return list(zip(*shifts, strict=True))

    def _embedded(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) -> (B, E), computed in `dtype`."""
        config = self.config
        time = timestep_embedding(
            timestep,
            config.block_out_channels[0],
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        )
        return self.time_embedding(time.to(dtype))

    def _with_text(self, time: Tensor, context: Tensor) -> Tensor:
        """(…, B, E), (B, L, D) -> (…, B, E or 2E): the time, with the text if it joins it here."""
        if self.class_embedding is not None:
            text = self.class_embedding(context.mean(dim=1))
            concat = self.config.class_embeddings_concat
            time = torch.cat([time, text.expand_as(time)], -1) if concat else time + text
        if self.add_embedding is not None:
            time = time + self.add_embedding(context)
        return time


def down_blocks(config: UNetConfig) -> nn.ModuleList:
    """The blocks of the way down, one a level; the last does not halve the size."""
    channels = config.block_out_channels
    attends = [ATTENTION_BLOCKS[block] for block in config.down_block_types]
    return nn.ModuleList(
        DownBlock(
            channels[max(i - 1, 0)],
            channels[i],
            config,
            heads=config.heads[i] if attends[i] else None,
            downsample=i < len(channels) - 1,
        )
        for i in range(len(channels))
    )


def mid_block(config: UNetConfig) -> MidBlock | None:
    """The block at the bottom, or None where the configuration has none."""
    if config.mid_block_type is None:
        return None
    attends = config.mid_block_type == "UNetMidBlock2DCrossAttn"
    return MidBlock(
        config.block_out_channels[-1], config, heads=config.heads[-1] if attends else None
    )


def up_blocks(config: UNetConfig) -> nn.ModuleList:
    """The blocks of the way up, from the bottom; each has one layer more than on the way down."""
    channels, layers = config.block_out_channels, config.layers_per_block
    attends = [ATTENTION_UP_BLOCKS[block] for block in config.up_block_types]
    skips = [channels[0]]  # channels of every map that is made on the way down, in order
    for i, ch in enumerate(channels):
        skips += [ch] * (layers + (i < len(channels) - 1))
    blocks = nn.ModuleList()
    below = channels[-1]  # channels of what comes from the block below
    for i, (ch, heads) in enumerate(zip(reversed(channels), reversed(config.heads), strict=True)):
        inputs = [(ch if j else below) + skips.pop() for j in range(layers + 1)]
        blocks.append(
            UpBlock(
                inputs,
                ch,
                config,
                heads=heads if attends[i] else None,
                upsample=i < len(channels) - 1,
            )
        )
        below = ch
    return blocks


def zero(module: nn.Module) -> None:
    """Set all parameters of a layer to zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
