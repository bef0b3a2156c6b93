"""A diffusion transformer, with the interface of the UNet that it replaces.

DiT (Peebles & Xie 2023, arXiv:2212.09748): patches of the latents are tokens, and time modulates
every block by adaLN-Zero. The text joins by cross-attention, or in the attention itself (MMDiT,
Esser et al. 2024, arXiv:2403.03206, section 4), where text and patches have separate weights.
The blocks' parameters are named as diffusers names them.
Shapes: B batch, C latent channels, H/W latent size, N patches, L tokens of D in the context,
E width.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.models.layers import (
    Attention,
    FeedForward,
    KeysValues,
    TimestepEmbedding,
    attend,
    repeated,
    timestep_embedding,
)
from latentdiff.models.network_config import (
    MAX_TRANSFORMERS,
    MAX_WIDTH,
    check_range,
    check_types,
    config_from_dict,
)
from latentdiff.models.network_folder import load_network, save_network

FREQUENCIES = 256  # of the timestep's sinusoids, as in DiT
MAX_PATCH = 64
FIXED: dict[str, Any] = {"_class_name": "DiT"}


@dataclass(frozen=True)
class DiTConfig:
    """The shape of a DiT; names are diffusers' where its transformers have one."""

    sample_size: int | None = 64
    """Side of the latents that it was trained on; a pipeline's default image size follows."""
    in_channels: int = 4
    out_channels: int = 4
    patch_size: int = 2
    """Side of the square of latents that is one token."""
    num_layers: int = 8
    num_attention_heads: int = 5
    attention_head_dim: int = 64
    """Width of a head; all heads together are the width of the network."""
    cross_attention_dim: int = 768
    """Width of the context."""
    attention: Literal["cross", "joint"] = "cross"
    """cross: patches look at the text. joint: patches and text look at both, each with weights of
    its own (MMDiT), which makes the network almost twice as large."""
    pooled_text: bool = False
    """Whether the mean of the context joins the time, as SD 3's pooled text does."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, 1, MAX_WIDTH, "in_channels", "out_channels", "cross_attention_dim")
        check_range(self, 1, MAX_WIDTH, "num_attention_heads", "attention_head_dim", "sample_size")
        check_range(self, 1, MAX_TRANSFORMERS, "num_layers")
        check_range(self, 1, MAX_PATCH, "patch_size")
        if self.width > MAX_WIDTH or self.width % 4:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} times "
                f"attention_head_dim={self.attention_head_dim} must be a multiple of 4 and at most "
                f"{MAX_WIDTH}"
            )

    @property
    def width(self) -> int:
        """Width of a token."""
        return self.num_attention_heads * self.attention_head_dim

    def to_dict(self) -> dict[str, Any]:
        """The configuration as config.json has it."""
        return {**FIXED, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read config.json. Raises ValueError, naming the key, for what this network cannot do."""
        return config_from_dict(cls, values, fixed=FIXED, absent={})


class Modulation(nn.Module):
    """adaLN-Zero: `count` vectors (B, 1, count · E) from the time (B, E), all zero at the start."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, count * width)

    def forward(self, time: Tensor) -> Tensor:
        return self.linear(F.silu(time))[:, None]


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights, then the time's scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class CrossBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward.

    (B, N, E), (B, L, D), (B, E) -> (B, N, E) and the context as it came. In place of the time it
    takes the `modulation` of it, in place of the context its keys and values in `attn2`.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, heads, dim = config.width, config.num_attention_heads, config.cross_attention_dim
        self.norm1 = Modulation(width, 6)
        self.attn1 = Attention(width, heads=heads, bias=True)
        self.attn2 = Attention(width, heads=heads, context_dim=dim, bias=True)
        self.ff = FeedForward(width, gated=False)

    def forward(
        self, x: Tensor, context: Tensor | KeysValues, time: Tensor
    ) -> tuple[Tensor, Tensor | KeysValues]:
        time = time if time.ndim == 3 else self.modulation(time)
        shift1, scale1, gate1, shift2, scale2, gate2 = time.chunk(6, dim=-1)
        x = repeated(x, len(time))
        x = x + gate1 * self.attn1(modulated(x, shift1, scale1))
        attended = self.attn2(F.layer_norm(x, x.shape[-1:], eps=1e-6), context)
        x = repeated(x, len(attended)) + attended
        return x + gate2 * self.ff(modulated(x, shift2, scale2)), context

    def modulation(self, time: Tensor) -> Tensor:
        """All vectors that the time (B, E) modulates by: (B, 1, 6 · E)."""
        return self.norm1(time)


class JointAttention(nn.Module):
    """One attention over patches and text, each with separate projections.

    (B, N, E), (B, L, E) -> both; with `last` the text gives keys and values, and has no output.
    """

    def __init__(self, width: int, *, heads: int, last: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.add_k_proj, self.add_v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.add_q_proj = self.to_add_out = None
        if not last:
            self.add_q_proj, self.to_add_out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor | None]:
        queries = [self.to_q(x)]
        if self.add_q_proj is not None:
            queries.append(self.add_q_proj(context))
        keys, values = (
            [self.to_k(x), self.add_k_proj(context)],
            [self.to_v(x), self.add_v_proj(context)],
        )
        q, k, v = (
            rearrange(torch.cat(tokens, dim=1), "b n (h d) -> b h n d", h=self.heads)
            for tokens in (queries, keys, values)
        )
        out = rearrange(attend(q, k, v), "b h n d -> b n (h d)")  # (B, N + L, E)
        x, context = out[:, : x.shape[1]], out[:, x.shape[1] :]
        return self.to_out[0](x), None if self.to_add_out is None else self.to_add_out(context)


class JointBlock(nn.Module):
    """Joint attention, then a feed-forward each for patches and text.

    (B, N, E), (B, L, E), (B, E) -> both. The `last` block has no output for the text, and no
    parameters for one: the text gives only keys and values. In place of the time it takes the
    `modulation` of it.
    """

    def __init__(self, config: DiTConfig, *, last: bool) -> None:
        super().__init__()
        width = config.width
        self.norm1 = Modulation(width, 6)
        self.norm1_context = Modulation(width, 2 if last else 6)
        self.attn = JointAttention(width, heads=config.num_attention_heads, last=last)
        self.ff = FeedForward(width, gated=False)
        self.ff_context = None if last else FeedForward(width, gated=False)

    def forward(self, x: Tensor, context: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        time = time if time.ndim == 3 else self.modulation(time)
        shift1, scale1, gate1, shift2, scale2, gate2, *of_context = time.split(x.shape[-1], dim=-1)
        x = repeated(x, len(context))
        patches = modulated(x, shift1, scale1)
        if self.ff_context is None:
            scale1, shift1 = of_context  # in diffusers' order, for its weights
            attended, _ = self.attn(patches, modulated(context, shift1, scale1))
        else:
            shift1, scale1, gate3, shift4, scale4, gate4 = of_context
            attended, context_attended = self.attn(patches, modulated(context, shift1, scale1))
            context = context + gate3 * context_attended
            context = context + gate4 * self.ff_context(modulated(context, shift4, scale4))
        x = x + gate1 * attended
        return x + gate2 * self.ff(modulated(x, shift2, scale2)), context

    def modulation(self, time: Tensor) -> Tensor:
        """All vectors that the time (B, E) modulates by: (B, 1, 12 · E), or 8 · E in the last."""
        return torch.cat([self.norm1(time), self.norm1_context(time)], dim=-1)


class DiT(nn.Module):
    """ε, v, x0 or velocity from noisy latents, the timestep and the text."""

    config_class = DiTConfig
    from_pretrained = classmethod(load_network)
    save_pretrained = save_network

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, dim, p = config.width, config.cross_attention_dim, config.patch_size
        layers = config.num_layers
        self.patch_embed = nn.Conv2d(config.in_channels, width, p, stride=p)
        self.time_embedding = TimestepEmbedding(FREQUENCIES, width)
        self.text_embedding = TimestepEmbedding(dim, width) if config.pooled_text else None
        if config.attention == "cross":
            self.context_embedder = None
            blocks = [CrossBlock(config) for _ in range(layers)]
        else:
            self.context_embedder = nn.Linear(dim, width)
            blocks = [JointBlock(config, last=i == layers - 1) for i in range(layers)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.norm_out = Modulation(width, 2)
        self.proj_out = nn.Linear(width, p * p * config.out_channels)
        self.init_weights()

    @property
    def multiple(self) -> int:
        """What the sides of the latents must be divisible by."""
        return self.config.patch_size

    def init_weights(self) -> None:
        """DiT's start (its section 3.2): every block is the identity, and the output is zero.

        The attention to the text has no gate; its output layer starts at zero instead.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))
        nn.init.zeros_(self.patch_embed.get_parameter("bias"))
        for layer in (self.time_embedding.linear_1, self.time_embedding.linear_2):
            nn.init.normal_(layer.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.linear.weight)
            elif isinstance(module, CrossBlock):
                for parameter in module.attn2.to_out.parameters():
                    nn.init.zeros_(parameter)
        nn.init.zeros_(self.proj_out.weight)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | Sequence[Tensor],
        context: Tensor | Sequence[KeysValues],
    ) -> Tensor:
        """(B, C, H, W), (B,), (B, L, D) -> (B, C, H, W); any H and W that `patch_size` divides.

        `timestep` is on diffusers' scale, 0 … 999. In a sampling run `prepare_times` and
        `prepare_context` give what takes the place of both, as in the UNet: with contexts of 2B
        rows the result is that of [x, x]. Raises ValueError for another size.
        """
        p = self.config.patch_size
        if x.shape[2] % p or x.shape[3] % p:
            raise ValueError(f"latents of {tuple(x.shape[2:])} must be divisible by patch_size={p}")
        height, width = x.shape[2] // p, x.shape[3] // p
        if isinstance(timestep, Tensor):
            assert isinstance(context, Tensor), "the text may join the time"
            time = self._with_text(self._embedded(timestep, x.dtype), context)  # (B, E)
            times, modulation = [time] * len(self.transformer_blocks), self.norm_out(time)
            states = context if self.context_embedder is None else self.context_embedder(context)
        else:
            (*times, modulation), states = timestep, context
        tokens = rearrange(self.patch_embed(x), "b e h w -> b (h w) e")  # (B, N, E)
        where = positions(height, width, self.config.width, device=x.device)
        # In x's precision, not the convolution's: under autocast the blocks add up in float32.
        tokens = tokens + where.to(x.dtype)
        for i, (block, time) in enumerate(zip(self.transformer_blocks, times, strict=True)):
            if isinstance(states, Tensor):
                tokens, states = block(tokens, states, time)
            else:
                tokens, _ = block(tokens, states[i], time)
        scale, shift = modulation.chunk(2, dim=-1)
        tokens = self.proj_out(modulated(tokens, shift, scale))  # (B, N, p·p·C)
        return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=height, w=width, p=p, q=p)

    def prepare_context(self, context: Tensor) -> Tensor | tuple[KeysValues, ...]:
        """Of a context (B, L, D) the keys and values in each block, or with joint attention its
        embedding (B, L, E), of which each block makes another.
        """
        if self.context_embedder is not None:
            return self.context_embedder(context)
        return tuple(block.attn2.keys_values(context) for block in self.transformer_blocks)

    def prepare_times(
        self, timesteps: Tensor, context: Tensor, *, dtype: torch.dtype
    ) -> list[tuple[Tensor, ...]]:
        """Of each of N timesteps (N,) the modulation of each block and of the output.

        They have a row for each row of the context (B, L, D) where the text joins the time, else
        one. `dtype` is that of x.
        """
        time = self._embedded(timesteps, dtype)[:, None]  # (N, 1, E)
        if self.text_embedding is not None:
            time = self._with_text(time.expand(-1, len(context), -1), context)  # (N, B, E)
        rows = time.flatten(0, 1)
        modulations = [block.modulation(rows) for block in self.transformer_blocks]
        modulations.append(self.norm_out(rows))
        return list(zip(*(m.unflatten(0, time.shape[:2]) for m in modulations), strict=True))

    def _embedded(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) -> (B, E), computed in `dtype`."""
        return self.time_embedding(timestep_embedding(timestep, FREQUENCIES).to(dtype))

    def _with_text(self, time: Tensor, context: Tensor) -> Tensor:
        """(…, B, E), (B, L, D) -> (…, B, E): the time, and the text if this network adds it."""
        if self.text_embedding is None:
            return time
        return time + self.text_embedding(context.mean(dim=1))


def positions(height: int, width: int, dim: int, *, device: torch.device) -> Tensor:
    """Sinusoids of each patch's column and row, (height · width, dim): half of dim for each.

    Those of DiT, which count patches from the upper left corner: a size that the network was not
    trained on has the same ones, and more or fewer of them.
    """
    rows, columns = (
        timestep_embedding(torch.arange(n, device=device), dim // 2, flip_sin_to_cos=False)
        for n in (height, width)
    )
    both = [columns[None].expand(height, -1, -1), rows[:, None].expand(-1, width, -1)]
    return torch.cat(both, dim=-1).flatten(0, 1)
