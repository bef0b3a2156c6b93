"""Layers of UNet, VAE and DiT: residual block, attention, resampling, time embedding.

Parameter names are diffusers', so that weights move between the two libraries without a key map.
Shapes: B batch, C channels, H/W height and width, N = H·W tokens, L tokens of D in the context.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.models.group_norm import GroupNorm

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of a context, (B, h, L, C/h) each, for the h heads of one attention."""


def repeated(x: Tensor, rows: int) -> Tensor:
    """x (B, …) as a batch of at least `rows`: x itself, or [x, x, …] where these are more than B.

    The halves of guidance see the same x until the text joins: it stays one batch up to there.
    """
    return x if rows <= len(x) else torch.cat([x] * (rows // len(x)))


def normal(*size: int, std: float = 1.0) -> Tensor:
    """Normal numbers; on the meta device none: to draw them there torch imports its compiler."""
    values = torch.empty(size)
    return values if values.is_meta else values.normal_(std=std)


def timestep_embedding(
    timestep: Tensor, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0
) -> Tensor:
    """Sinusoids of the timestep (Vaswani et al. 2017, section 3.5), (B,) -> (B, dim) in float32.

    The frequencies are float32 in every precision, as in diffusers: a float64 network differs from
    it by rounding only when both start from the same sinusoids. Sinusoids, (B, dim), stay as they
    are: what computes in bfloat16 from its inputs on, where 999 and 1000 are one number, gets them.
    """
    if timestep.ndim == 2:
        return timestep
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device)
    angles = timestep[:, None].float() * torch.exp(exponent / (half - freq_shift))  # (B, dim/2)
    parts = [angles.cos(), angles.sin()] if flip_sin_to_cos else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(parts, dim=1), (0, dim % 2))  # (B, dim)


class TimestepEmbedding(nn.Module):
    """Two-layer perceptron on the sinusoids: (B, in_dim) -> (B, out_dim)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, out_dim)
        self.linear_2 = nn.Linear(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class AttentionPooling(nn.Module):
    """Attention pooling, as in CLIP's ResNets, with the mean as query: (B, L, D) -> (B, D)."""

    def __init__(self, dim: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        # Added to the query; name and initialisation are diffusers'.
        self.positional_embedding = nn.Parameter(normal(1, dim, std=dim**-0.5))
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, context: Tensor) -> Tensor:
        mean = context.mean(dim=1, keepdim=True) + self.positional_embedding.to(context.dtype)
        tokens = torch.cat([mean, context], dim=1)  # (B, 1 + L, D)
        q, k, v = (
            rearrange(y, "b n (h d) -> b h n d", h=self.heads)
            for y in (self.q_proj(mean), self.k_proj(tokens), self.v_proj(tokens))
        )
        return rearrange(attend(q, k, v), "b h 1 d -> b (h d)")


class TextTimeEmbedding(nn.Module):
    """A context pooled to one vector, to be added to the time embedding: (B, L, D) -> (B, E)."""

    def __init__(self, dim: int, out_dim: int, *, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.pool = AttentionPooling(dim, heads=heads)
        self.proj = nn.Linear(dim, out_dim)
        self.norm2 = nn.LayerNorm(out_dim)

    def forward(self, context: Tensor) -> Tensor:
        return self.norm2(self.proj(self.pool(self.norm1(context))))


class Conv1x1(nn.Conv2d):
    """A convolution of kernel size 1: (B, C, H, W) -> (B, C', H, W).

    In drawing on a CPU it is a product for each image. oneDNN's convolution adds up in an order
    that depends on the size of the batch in float32, so that an image of a batch would not have the
    bits that it has alone (docs/decisions/0003); the product is as fast. What traces or compiles it
    has kernels of its own.
    """

    def forward(self, input: Tensor) -> Tensor:
        traced = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        traced = traced or torch.compiler.is_compiling()
        if input.device.type != "cpu" or torch.is_grad_enabled() or traced:
            return super().forward(input)
        weight, x = self.weight.flatten(1).expand(len(input), -1, -1), input.flatten(2)
        if self.bias is None:  # peft makes layers of this class
            output = torch.bmm(weight, x)
        else:
            output = torch.baddbmm(self.bias[:, None], weight, x)
        return output.unflatten(2, input.shape[2:])


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, with a skip; the time embedding joins in between.

    (B, in_channels, H, W), (B, time_dim) -> (B, out_channels, H, W). In place of the time it takes
    the `time_shift` of it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        eps: float,
        time_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps=eps, silu=True)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None if time_dim is None else nn.Linear(time_dim, out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps=eps, silu=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = (
            None if in_channels == out_channels else Conv1x1(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        h = self.conv1(self.norm1(x))
        if self.time_emb_proj is not None:
            assert time is not None
            shift = time if time.ndim == 4 else self.time_shift(time)
            h = repeated(h, len(shift)) + shift
        h = self.conv2(self.norm2(h))
        skip = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return h + repeated(skip, len(h))

    def time_shift(self, time: Tensor) -> Tensor:
        """What the time (B, time_dim) adds to each channel: (B, out_channels, 1, 1)."""
        assert self.time_emb_proj is not None
        return self.time_emb_proj(F.silu(time))[:, :, None, None]


class Attention(nn.Module):
    """Multi-head attention of x (B, N, C) to itself or to a context (B, L, D) -> (B, N, C).

    In place of the context it takes the `keys_values` of it.
    """

    def __init__(
        self, channels: int, *, heads: int, context_dim: int | None = None, bias: bool = False
    ) -> None:
        super().__init__()
        assert channels % heads == 0
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(context_dim or channels, channels, bias=bias)
        self.to_v = nn.Linear(context_dim or channels, channels, bias=bias)
        # Index 0 of a list, because diffusers keeps a dropout at index 1.
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor | KeysValues | None = None) -> Tensor:
        q = self._heads(self.to_q(x))
        if isinstance(context, tuple):
            k, v = context
        else:
            k, v = self.keys_values(x if context is None else context)
        out = attend(repeated(q, len(k)), k, v)  # (B, h, N, C/h)
        return self.to_out[0](rearrange(out, "b h n d -> b n (h d)"))

    def keys_values(self, context: Tensor) -> KeysValues:
        """Keys and values of a context (B, L, D), which a sampling run computes once."""
        return self._heads(self.to_k(context)), self._heads(self.to_v(context))

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v (Vaswani et al. 2017, eq. 1): (B, h, N, d), (B, h, L, d) twice -> q's.

    torch's fused kernel, except for few tokens on a CPU, where two plain products are faster:
    forward and backward of 64 by 24 tokens in bfloat16 took 15 ms against 46 ms on one core
    (batch 128, two heads of 64; torch 2.12.1, AMD EPYC with avx512_bf16). What traces it gets the
    fused one, as a trace is for any number of tokens.
    """
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    few = not tracing and q.shape[-2] * k.shape[-2] <= 64 * 64
    if few and q.device.type == "cpu":
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, h, N, L)
        return scores.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class SpatialAttention(Attention):
    """The VAE's single-head self-attention over pixels, with norm and skip: (B, C, H, W)."""

    def __init__(self, channels: int, *, groups: int, eps: float) -> None:
        super().__init__(channels, heads=1, bias=True)
        self.group_norm = GroupNorm(groups, channels, eps=eps)

    def forward(self, x: Tensor, context: Tensor | KeysValues | None = None) -> Tensor:
        assert context is None
        tokens = rearrange(self.group_norm(x), "b c h w -> b (h w) c")
        return x + rearrange(super().forward(tokens), "b (h w) c -> b c h w", h=x.shape[2])


class GEGLU(nn.Module):
    """Gated linear unit with GELU (Shazeer 2020): (…, in_dim) -> (…, out_dim)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, 2 * out_dim)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class GELU(nn.Module):
    """Linear layer and GELU in its form with tanh (Hendrycks & Gimpel 2016)."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """GEGLU, or GELU unless `gated`, to four times the width and back: (…, C) -> (…, C)."""

    def __init__(self, channels: int, *, gated: bool = True) -> None:
        super().__init__()
        first = GEGLU if gated else GELU
        # Identity stands where diffusers has dropout, so that the second linear keeps index 2.
        self.net = nn.Sequential(
            first(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward: (B, N, C), (B, L, D) -> (B, N, C).

    In place of the context it takes the keys and values of it.
    """

    def __init__(self, channels: int, *, heads: int, context_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads=heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads=heads, context_dim=context_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor | KeysValues) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        attended = self.attn2(self.norm2(x), context)
        x = repeated(x, len(attended)) + attended
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, with a skip (LDM, section 3.3).

    (B, C, H, W), (B, L, D) -> (B, C, H, W). `linear` projects tokens (SD 2.x) instead of 1×1
    convolutions (SD 1.x); the arithmetic is the same, the weights' shapes differ. In place of the
    context it takes the `keys_values` of it.
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        context_dim: int,
        groups: int,
        layers: int = 1,
        linear: bool = False,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else Conv1x1(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads=heads, context_dim=context_dim) for _ in range(layers)
        )
        self.proj_out = nn.Linear(channels, channels) if linear else Conv1x1(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor | Sequence[KeysValues]) -> Tensor:
        blocks, height = self.transformer_blocks, x.shape[2]
        h = self.norm(x)
        if self.linear:
            h = self.proj_in(rearrange(h, "b c h w -> b (h w) c"))
        else:
            h = rearrange(self.proj_in(h), "b c h w -> b (h w) c")
        contexts = [context] * len(blocks) if isinstance(context, Tensor) else context
        for block, block_context in zip(blocks, contexts, strict=True):
            h = block(h, block_context)  # (B, N, C)
        if self.linear:
            h = rearrange(self.proj_out(h), "b (h w) c -> b c h w", h=height)
        else:
            h = self.proj_out(rearrange(h, "b (h w) c -> b c h w", h=height))
        return repeated(x, len(h)) + h

    def keys_values(self, context: Tensor) -> tuple[KeysValues, ...]:
        """The keys and values of a context (B, L, D) in each transformer block."""
        blocks: Any = self.transformer_blocks
        return tuple(block.attn2.keys_values(context) for block in blocks)


class Downsample(nn.Module):
    """Convolution of stride 2: (B, C, H, W) -> (B, C, ⌈H/2⌉, ⌈W/2⌉); the VAE pads one side."""

    def __init__(self, channels: int, *, asymmetric: bool = False) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Nearest-neighbour enlargement, then a convolution: (B, C, H, W) -> (B, C, *size)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        size = size if size is not None else (2 * x.shape[2], 2 * x.shape[3])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
