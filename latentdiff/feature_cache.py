"""Feature caching: the UNet's deep layers are evaluated at some timesteps of a run only.

From step to step deep features change little (DeepCache, Ma et al. 2023, arXiv:2312.00858). At the
timesteps between, what the last residual block of the way up reads from below is that of the last
whole evaluation, and only this block, its transformer and the first and the last convolution see
the new latents. Approximate, therefore off unless asked for; docs/speed.md has what it costs.
Shapes: B images, or both halves of guidance for each; C latent channels, H/W latent size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from latentdiff.models.dit import DiT
from latentdiff.models.layers import repeated
from latentdiff.models.unet import UNet


class FeatureCache:
    """A UNet in one sampling run, evaluated whole at every `interval`-th timestep.

    `timesteps`, rising, are those of the run. Raises ValueError for a network whose deep features
    cannot be kept.
    """

    def __init__(self, network: UNet | DiT, timesteps: Sequence[float], interval: int) -> None:
        if isinstance(network, DiT):
            raise ValueError(
                f"cache_interval={interval} is for a UNet, and this model's network is a DiT; "
                "leave it out"
            )
        if "forward" in vars(network):  # which `latentdiff.engines` have replaced
            raise ValueError(
                f"cache_interval={interval} needs a network that torch computes as it stands; "
                "leave it out, or load the pipeline anew with engine=torch and without compiling"
            )
        self._unet = network
        self._last: Any = network.up_blocks[-1]
        self._whole = set(timesteps[::-interval])
        self._deep: Tensor | None = None
        self._rows = 0

    def __call__(
        self,
        x: Tensor,
        times: Sequence[Tensor],
        contexts: Any,
        *,
        timestep: float,
        rows: int,
    ) -> Tensor:
        """As `UNet.forward`, with what it prepared for this timestep and for `rows` contexts."""
        unet, last = self._unet, self._last
        if timestep in self._whole or rows != self._rows:
            kept: list[Tensor] = []
            output = unet(x, times, contexts, kept=kept)
            self._deep, self._rows = kept[-1], rows
            return output
        assert self._deep is not None, "the first evaluation is whole"
        h = torch.cat([self._deep, repeated(unet.conv_in(x), len(self._deep))], dim=1)
        h = last.resnets[-1](h, times[-1])
        for attention in last.attentions[-1:]:
            h = attention(h, contexts[-1])
        return unet.conv_out(unet.conv_norm_out(h))
