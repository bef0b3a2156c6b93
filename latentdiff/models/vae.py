"""The autoencoder between images and latents: a KL-regularised VAE (LDM, Rombach et al. 2022).

Configuration keys and parameter names are those of diffusers' `AutoencoderKL`. With the encoder
"downsample", which diffusers does not have, nothing is learned but the decoder: it enlarges.
Shapes: B batch, f = 2^(levels-1) reduction, C latent channels.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.formats.header import shown
from latentdiff.models.config import (
    MAX_LEVELS,
    MAX_WIDTH,
    check_levels,
    check_range,
    check_types,
    config_from_dict,
    load_network,
    save_network,
)
from latentdiff.models.layers import Downsample, ResnetBlock, SpatialAttention, Upsample

EPS = 1e-6  # of every GroupNorm, as in LDM
POINT = -30.0
"""Log-variance of a latent that is known exactly: LDM's least. Its deviation, 3e-7, is float32's
rounding of a latent, and far below that of a cache in float16."""


@dataclass(frozen=True)
class VAEConfig:
    """What an `AutoencoderKL` configuration says; the defaults are those of SD 1.x and 2.x."""

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
    """A last 1×1 convolution of the encoder "kl"; the other has none."""
    use_post_quant_conv: bool = True
    force_upcast: bool = True
    """Tells diffusers' half-precision users to decode in float32; our own code ignores it."""
    encoder: Literal["kl", "downsample"] = "kl"
    """kl is learned, and gives a Gaussian; downsample makes the image small, by area averages: as
    many latent_channels as in_channels, and only the decoder, which enlarges, is learned."""

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
        learned = ("use_quant_conv",) if self.encoder == "kl" else ()
        for name in (*learned, "use_post_quant_conv"):
            if not getattr(self, name):
                raise ValueError(f"{name}=False must be true: latents are made standard in it")

    def to_dict(self) -> dict[str, Any]:
        """The configuration in diffusers' words, every key that `AutoencoderKL` needs.

        The key `encoder`, which diffusers does not have, is there with "downsample" alone.
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
                f"block_out_channels={shown(channels)} must be a list of 1 to {MAX_LEVELS} numbers"
            )
        encoder = "downsample" if values.get("encoder") == "downsample" else "kl"
        fixed = _fixed(encoder, len(channels))
        return config_from_dict(cls, values, fixed=fixed, absent=ABSENT)


# Keys of AutoencoderKL that have one supported value, and what an absent key means to diffusers.
FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}
ABSENT: dict[str, Any] = {"block_out_channels": (64,), "layers_per_block": 1, "sample_size": 32}
# By encoder, the class and its blocks on the way down. Those of "downsample" diffusers does not
# know, so that it refuses the folder, and does not add an encoder of random weights.
_CLASSES = {"kl": ("AutoencoderKL", "DownEncoderBlock2D"), "downsample": ("VAE", "AreaAverage")}


def _fixed(encoder: Literal["kl", "downsample"], levels: int) -> dict[str, Any]:
    """Keys that the others leave one value."""
    class_name, down = _CLASSES[encoder]
    return {
        "_class_name": class_name,
        **FIXED,
        "down_block_types": [down] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


# The attention's layers had other names before diffusers 0.17: the files of SD 1.5 and 2.1 do.
_FORMER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _todays_name(name: str) -> str:
    return re.sub(
        r"(?<=\.mid_block\.attentions\.0\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)",
        lambda match: _FORMER[match[1]],
        name,
    )


@dataclass(frozen=True)
class Posterior:
    """The diagonal Gaussian q(z | x): mean and logvar, each (B, C, H, W)."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> Self:
        """Split (B, 2C, H, W) as the encoder writes it; logvar is kept in [-30, 20], as in LDM."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    def scaled(self, factor: float) -> "Posterior":
        """The distribution of factor · z."""
        return Posterior(self.mean * factor, self.logvar + 2 * math.log(factor))

    def sample(self, noise: Tensor) -> Tensor:
        """Reparameterisation (Kingma & Welling 2014, eq. 10): mean + std · noise."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """KL(q(z | x) ‖ N(0, I)) in nats, one per example, (B,) (Kingma & Welling 2014, app. B)."""
        kl = 0.5 * (self.mean**2 + self.logvar.exp() - 1.0 - self.logvar)
        return kl.sum(dim=(1, 2, 3))

    def entropy(self) -> Tensor:
        """-E[log q(z | x)] in nats, one per example, (B,); negative where q is narrow."""
        return 0.5 * (self.logvar + math.log(2 * math.pi * math.e)).sum(dim=(1, 2, 3))


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at the smallest size: (B, C, H, W) -> same."""

    def __init__(self, channels: int, config: VAEConfig) -> None:
        super().__init__()
        groups = config.norm_num_groups
        self.resnets = nn.ModuleList(
            ResnetBlock(channels, channels, groups=groups, eps=EPS) for _ in range(2)
        )
        self.attentions = nn.ModuleList(
            [SpatialAttention(channels, groups=groups, eps=EPS)]
            if config.mid_block_add_attention
            else []
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class DownBlock(nn.Module):
    """Residual blocks, then half the size (not in the last block)."""

    def __init__(self, in_ch: int, out_ch: int, config: VAEConfig, *, downsample: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(out_ch if i else in_ch, out_ch, groups=config.norm_num_groups, eps=EPS)
            for i in range(config.layers_per_block)
        )
        self.downsamplers = nn.ModuleList(
            [Downsample(out_ch, asymmetric=True)] if downsample else []
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """One residual block more than on the way down, then twice the size (not in the last block)."""

    def __init__(self, in_ch: int, out_ch: int, config: VAEConfig, *, upsample: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(out_ch if i else in_ch, out_ch, groups=config.norm_num_groups, eps=EPS)
            for i in range(config.layers_per_block + 1)
        )
        self.upsamplers = nn.ModuleList([Upsample(out_ch)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """Images (B, 3, fH, fW) -> moments before `quant_conv` (B, 2C, H, W)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(channels[max(i - 1, 0)], ch, config, downsample=i < len(channels) - 1)
            for i, ch in enumerate(channels)
        )
        self.mid_block = MidBlock(channels[-1], config)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[-1], eps=EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for block in self.down_blocks:
            h = block(h)
        h = self.mid_block(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class SmallImage(nn.Module):
    """Images (B, 3, fH, fW) -> moments (B, 2·3, H, W) of a point: areas' means, standardised.

    `mean` and `std`, (3,) each, are subtracted from the small image and divide it: statistics of
    the data, not parameters.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.factor = config.factor
        self.register_buffer("mean", torch.zeros(config.in_channels))
        self.register_buffer("std", torch.ones(config.in_channels))

    def forward(self, x: Tensor) -> Tensor:
        small = F.avg_pool2d(x, self.factor)
        c = (slice(None), None, None)
        z = (small - self.mean[c]) / self.std[c]
        return torch.cat([z, torch.full_like(z, POINT)], dim=1)


class Decoder(nn.Module):
    """Latents after `post_quant_conv` (B, C, H, W) -> images (B, 3, fH, fW)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels = tuple(reversed(config.block_out_channels))
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], config)
        self.up_blocks = nn.ModuleList(
            UpBlock(channels[max(i - 1, 0)], ch, config, upsample=i < len(channels) - 1)
            for i, ch in enumerate(channels)
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[-1], eps=EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            h = block(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))


class VAE(nn.Module):
    """Images in [-1, 1] <-> latents of unit variance; it alone knows the scaling factor."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        C = config.latent_channels
        learned = config.encoder == "kl"
        self.encoder = Encoder(config) if learned else SmallImage(config)
        self.decoder = Decoder(config)
        quantised = learned and config.use_quant_conv
        self.quant_conv = nn.Conv2d(2 * C, 2 * C, 1) if quantised else nn.Identity()
        self.post_quant_conv = nn.Conv2d(C, C, 1) if config.use_post_quant_conv else nn.Identity()

    def posterior(self, images: Tensor) -> Posterior:
        """q(z | x) before scaling, the one whose KL the VAE is trained on: (B, 3, fH, fW).

        With the encoder "downsample" it is a point, to float32's rounding, and its KL says nothing.
        """
        f = self.config.factor
        if images.shape[-2] % f or images.shape[-1] % f:
            raise ValueError(f"image size {tuple(images.shape[-2:])} must be divisible by {f}")
        return Posterior.from_moments(self.quant_conv(self.encoder(images)))

    def encode(self, images: Tensor) -> Posterior:
        """Images (B, 3, fH, fW) in [-1, 1] -> the distribution of latents (B, C, H, W).

        Raises ValueError when the size is not divisible by f.
        """
        return self.posterior(images).scaled(self.config.scaling_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) of unit variance -> images (B, 3, fH, fW), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents / self.config.scaling_factor))

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Posterior]:
        """Reconstruction and q(z | x), all that a training step needs; noise is (B, C, H, W)."""
        posterior = self.posterior(images)
        return self.decode(posterior.sample(noise) * self.config.scaling_factor), posterior

    @torch.no_grad()
    def fold_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Make latents of mean `mean` and standard deviation `std`, each (C,), standard ones.

        `mean` and `std` were measured on `encode(...)`. The affine map goes into `quant_conv`, or
        into the encoder "downsample", and its inverse into `post_quant_conv`, so reconstructions
        stay what they were and `scaling_factor` stays right for the tools that hard-code it.
        Raises ValueError for a VAE without those convolutions.
        """
        self.config.check_folds()
        out_weight, out_bias = self.post_quant_conv.weight, self.post_quant_conv.bias
        assert isinstance(out_weight, Tensor)
        assert isinstance(out_bias, Tensor)
        raw_mean, std = mean.to(out_weight) / self.config.scaling_factor, std.to(out_weight)
        # Encoder: z' = (z - raw_mean) / std; the log-variance loses 2 log std, that of a point not.
        if isinstance(self.encoder, SmallImage):
            self.encoder.mean += self.encoder.std * raw_mean
            self.encoder.std *= std
        else:
            C = self.config.latent_channels
            weight, bias = self.quant_conv.weight, self.quant_conv.bias
            assert isinstance(weight, Tensor)
            assert isinstance(bias, Tensor)
            weight[:C] /= std[:, None, None, None]
            bias[:C] = (bias[:C] - raw_mean) / std
            bias[C:] -= 2 * std.log()
        # Decoder: z = std z' + raw_mean, before the 1×1 convolution.
        out_bias += out_weight[:, :, 0, 0] @ raw_mean
        out_weight *= std[None, :, None, None]

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        variant: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Read `config.json` and the weights beside it; ValueError if they do not fit.

        `variant` chooses other weights than the plain ones, such as "fp16"; `dtype` is what the
        weights become.
        """
        return load_network(
            cls, VAEConfig, Path(folder), variant=variant, dtype=dtype, rename=_todays_name
        )

    def save_pretrained(self, folder: Path | str, *, dtype: torch.dtype | None = None) -> None:
        """Write the two files that `from_pretrained` and diffusers read."""
        save_network(self, self.config.to_dict(), Path(folder), dtype=dtype)
