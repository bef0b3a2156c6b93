"""GroupNorm, with SiLU where it follows, fast in both memory formats, contiguous and channels_last.

torch's kernels are fast in contiguous memory alone: on two cores, channels_last took ten times as
long forward and backward together (`docs/decisions/0010`). Convolutions like channels_last best.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GroupNorm(nn.GroupNorm):
    """GroupNorm (Wu & He 2018), followed by SiLU if `silu`: (B, C, H, W) -> (B, C, H, W).

    The output has the input's memory format. In channels_last the statistics are sums over the
    pixels of each channel, averaged over a group's channels by a matrix product: plain loops over
    channels, which a compiler turns into vector instructions.
    """

    def __init__(self, groups: int, channels: int, *, eps: float, silu: bool = False) -> None:
        super().__init__(groups, channels, eps=eps)
        self.silu = silu

    def forward(self, input: Tensor) -> Tensor:
        if input.is_contiguous() or not input.is_contiguous(memory_format=torch.channels_last):
            y = super().forward(input)
            return F.silu(y) if self.silu else y
        averaging = averaging_matrix(
            self.num_channels,
            self.num_groups,
            dtype=torch.promote_types(input.dtype, torch.float32),
            device=input.device,
        )
        return ChannelsLastGroupNorm.apply(
            input, self.weight, self.bias, averaging, self.eps, self.silu
        )


def averaging_matrix(
    channels: int, groups: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """(C, C): what multiplies a vector of channels to replace each by the mean of its group."""
    group = torch.arange(channels, device=device) // (channels // groups)
    return (group[:, None] == group).to(dtype) * (groups / channels)


class ChannelsLastGroupNorm(torch.autograd.Function):
    """GroupNorm and SiLU of (B, C, H, W) in channels_last; statistics in float32 at least.

    Saved for the backward pass are the input and vectors of (B, C) alone.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, averaging: Tensor, eps: float, silu: bool
    ) -> Tensor:
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, HW, C)
        with torch.autocast(x.device.type, enabled=False):
            exact = pixels.to(averaging.dtype)
            mean = exact.mean(1) @ averaging  # (B, C)
            square = exact.square().mean(1) @ averaging
            rstd = ((square - mean.square()).clamp(min=0) + eps).rsqrt()
            scale = weight * rstd
            shift = bias - mean * scale
            y = pixels * scale[:, None] + shift[:, None]
            y = (F.silu(y) if silu else y).to(x.dtype)
        ctx.save_for_backward(x, weight, averaging, mean, rstd, scale, shift)
        ctx.silu = silu
        return y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, averaging, mean, rstd, scale, shift = ctx.saved_tensors
        pixels, dy = (y.permute(0, 2, 3, 1).flatten(1, 2) for y in (x, grads[0]))  # (B, HW, C)
        with torch.autocast(x.device.type, enabled=False):
            if ctx.silu:
                y = pixels * scale[:, None] + shift[:, None]
                gate = y.sigmoid()
                dy = dy * (gate * (1 + y * (1 - gate)))
            dy = dy.to(averaging.dtype)
            d_bias = dy.sum(1)  # (B, C), of each image
            d_weight = ((dy * pixels).sum(1) - mean * d_bias) * rstd
            # dx = rstd (w dy - mean of w dy - x̂ mean of w dy x̂), the means over the group.
            per_pixel = weight / pixels.shape[1]
            slope = -(rstd.square()) * ((d_weight * per_pixel) @ averaging)
            offset = -rstd * ((d_bias * per_pixel) @ averaging) - mean * slope
            dx = dy * scale[:, None] + pixels * slope[:, None] + offset[:, None]
        dx = dx.to(x.dtype).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return dx, d_weight.sum(0).to(weight), d_bias.sum(0).to(weight), None, None, None
