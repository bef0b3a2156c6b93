"""The autoencoder between images and latents: a KL-regularised VAE (LDM, Rombach et al. 2022).

Configuration keys and parameter names are those of diffusers' `AutoencoderKL`. With the encoder
"downsample", which diffusers does not have, only the decoder is learned: it upscales.
Shapes: B batch, f = 2^(levels-1) reduction, C latent channels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.models.group_norm import GroupNorm
from latentdiff.models.layers import Downsample, ResnetBlock, SpatialAttention, Upsample
from latentdiff.models.network_folder import load_network, save_network
from latentdiff.models.vae_config import VAEConfig
from latentdiff.models.vae_tiling import check_tile, decode_in_tiles

EPS = 1e-6  # of every GroupNorm, as in LDM
POINT = -30.0
"""Log-variance of a deterministic latent: the least that LDM allows. The standard deviation, 3e-7,
is float32's rounding of a latent, and far below that of a cache in float16."""


@dataclass(frozen=True)
class Posterior:
    """The diagonal Gaussian q(z | x): mean and logvar, each (B, C, H, W)."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> Self:
        """Split the encoder's output (B, 2C, H, W); logvar is clamped to [-30, 20], as in LDM."""
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
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[-1], eps=EPS, silu=True)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for block in self.down_blocks:
            h = block(h)
        h = self.mid_block(h)
        return self.conv_out(self.conv_norm_out(h))


class SmallImage(nn.Module):
    """Images (B, 3, fH, fW) -> moments (B, 2·3, H, W): means of areas, standardised, without noise.

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


class NoEncoder(nn.Module):
    """In the place of an encoder that a file does not hold."""

    def forward(self, x: Tensor) -> Tensor:
        """Raise ValueError: all that asks for an encoder ends here."""
        raise ValueError(
            "this VAE has no encoder, as the file that it is from holds none: it can draw from "
            "text, and image-to-image, inpainting, caches and training need another VAE"
        )


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
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[-1], eps=EPS, silu=True)
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            h = block(h)
        return self.conv_out(self.conv_norm_out(h))


class VAE(nn.Module):
    """Images in [-1, 1] <-> latents of unit variance; it alone knows the scaling factor."""

    config_class = VAEConfig
    from_pretrained = classmethod(load_network)
    save_pretrained = save_network

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        C = config.latent_channels
        if config.encoder == "none":
            self.encoder = NoEncoder()
        else:
            self.encoder = Encoder(config) if config.encoder == "kl" else SmallImage(config)
        self.decoder = Decoder(config)
        quantised = config.encoder != "downsample" and config.use_quant_conv
        self.quant_conv = nn.Conv2d(2 * C, 2 * C, 1) if quantised else nn.Identity()
        self.post_quant_conv = nn.Conv2d(C, C, 1) if config.use_post_quant_conv else nn.Identity()
        self._tiling: int | None = None

    def posterior(self, images: Tensor) -> Posterior:
        """q(z | x) before scaling, whose KL is in the VAE's loss, of images (B, 3, fH, fW).

        With the encoder "downsample" it is deterministic to float32's rounding; its KL has no use.
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
        """Latents (B, C, H, W) of unit variance -> images (B, 3, fH, fW), about [-1, 1].

        An image that is larger than `tiling` is decoded in tiles.
        """
        z = self.post_quant_conv(latents / self.config.scaling_factor)
        if self._tiling is None:
            return self.decoder(z)
        f = self.config.factor
        return decode_in_tiles(self.decoder, z, tile=self._tiling // f, factor=f)

    @property
    def tiling(self) -> int | None:
        """The side in pixels of the tiles that larger images are decoded in; None is off.

        Tiles take less memory and change the image a little: see models/vae_tiling.py. Setting it
        raises ValueError for what is no side of a tile.
        """
        return self._tiling

    @tiling.setter
    def tiling(self, pixels: int | None) -> None:
        if pixels is not None:
            check_tile(pixels, self.config.factor)
        self._tiling = pixels

    def forward(
        self, images: Tensor, noise: Tensor, transform: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Posterior]:
        """Reconstruction and q(z | x), for a training step; noise is (B, C, H, W).

        `transform` changes the latents before they are decoded.
        """
        posterior = self.posterior(images)
        latents = posterior.sample(noise) * self.config.scaling_factor
        if transform is not None:
            latents = transform(latents)
        return self.decode(latents), posterior

    @torch.no_grad()
    def fold_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Standardise latents that have mean `mean` and standard deviation `std`, each (C,).

        `mean` and `std` were measured on `encode(...)`. The affine map goes into `quant_conv`, or
        into the encoder "downsample", and its inverse into `post_quant_conv`, so reconstructions
        do not change and `scaling_factor` stays right for the tools that hard-code it.
        Raises ValueError for a VAE without those convolutions.
        """
        self.config.check_folds()
        out_weight, out_bias = self.post_quant_conv.weight, self.post_quant_conv.bias
        assert isinstance(out_weight, Tensor)
        assert isinstance(out_bias, Tensor)
        raw_mean, std = mean.to(out_weight) / self.config.scaling_factor, std.to(out_weight)
        # Encoder: z' = (z - raw_mean) / std; the log-variance loses 2 log std, if it is not POINT.
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
