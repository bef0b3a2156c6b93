"""CLIP's text tower (Radford et al. 2021, arXiv:2103.00020, section 2.4): token ids to states.

Parameter names, configuration and results are those of transformers' `CLIPTextModel`, which takes
two seconds to import. Shapes: B texts, L tokens, D width.
"""

from collections.abc import Callable
from functools import partial
from types import MappingProxyType

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig

from latentdiff.models.layers import normal

tanh_gelu = partial(F.gelu, approximate="tanh")
ACTIVATIONS: MappingProxyType[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # OpenAI's approximation
        "gelu": F.gelu,
        "gelu_new": tanh_gelu,
        "gelu_pytorch_tanh": tanh_gelu,
        "relu": F.relu,
        "silu": F.silu,
    }
)
"""By transformers' names; those that published CLIPs have, and open_clip."""


class CLIPAttention(nn.Module):
    """Causal multi-head self-attention: (B, L, D) -> (B, L, D)."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.dropout = float(config.attention_dropout or 0)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            rearrange(project(x), "b l (h d) -> b h l d", h=self.heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return self.out_proj(rearrange(out, "b h l d -> b l (h d)"))


class CLIPMLP(nn.Module):
    """Two linear layers with an activation between: (B, L, D) -> (B, L, D)."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPEncoderLayer(nn.Module):
    """A transformer block with norms before attention and layers: (B, L, D) -> (B, L, D)."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.self_attn = CLIPAttention(config)
        self.layer_norm1 = layer_norm(config)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = layer_norm(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


def layer_norm(config: CLIPTextConfig) -> nn.LayerNorm:
    """A norm over the width."""
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps or 0.0)


class CLIPText(nn.Module):
    """Token ids to the last hidden states, which the UNet attends to."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        sizes = {
            "token_embedding": config.vocab_size,
            "position_embedding": config.max_position_embeddings,
        }
        self.embeddings = nn.ModuleDict(
            {n: nn.Embedding(size, width, _weight=normal(size, width)) for n, size in sizes.items()}
        )
        layers = (CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.final_layer_norm = layer_norm(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, D); L is at most `max_position_embeddings`."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.embeddings["token_embedding"](input_ids)
        x = x + self.embeddings["position_embedding"](positions)
        layers: nn.ModuleList = self.encoder["layers"]  # pyright: ignore[reportAssignmentType]
        for layer in layers:
            x = layer(x)
        return self.final_layer_norm(x)
