"""GroupNorm, with SiLU where it follows, for both memory formats, contiguous and channels_last."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GroupNorm(nn.GroupNorm):
    """GroupNorm (Wu & He 2018), followed by SiLU if `silu`: (B, C, H, W) -> (B, C, H, W).

    The output has the input's memory format. torch's kernels are fast in contiguous memory alone,
    while convolutions are faster in channels_last (docs/decisions/0010).
    """

    def __init__(self, groups: int, channels: int, *, eps: float, silu: bool = False) -> None:
        super().__init__(groups, channels, eps=eps)
        self.silu = silu

    def forward(self, input: Tensor) -> Tensor:
        if input.is_contiguous() or not input.is_contiguous(memory_format=torch.channels_last):
            y = super().forward(input)
            return F.silu(y) if self.silu else y
        with torch.autocast(input.device.type, enabled=False):
            return self._channels_last(input)

    def _channels_last(self, x: Tensor) -> Tensor:
        """GroupNorm in plain operations, which a compiler makes three passes over the pixels of.

        The statistics, in float32 at least, are means over the pixels of each channel. A matrix
        product averages them over a group's channels: a sum over the channels themselves would not
        become vector instructions.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        averaging = averaging_matrix(
            self.num_channels, self.num_groups, dtype=dtype, device=x.device
        )
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2).to(dtype)  # (B, HW, C)
        mean = pixels.mean(1) @ averaging  # (B, C)
        centred = pixels - mean[:, None]
        variance = centred.square().mean(1) @ averaging
        y = centred * (self.weight * (variance + self.eps).rsqrt())[:, None] + self.bias
        y = (F.silu(y) if self.silu else y).to(x.dtype)
        return y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def averaging_matrix(
    channels: int, groups: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """(C, C): what multiplies a vector of channels to replace each by the mean of its group."""
    group = torch.arange(channels, device=device) // (channels // groups)
    return (group[:, None] == group).to(dtype) * (groups / channels)
