"""The random numbers of a sampling run: a generator an image, drawn on the CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor


class ImageNoise:
    """Fresh N(0, I) of shape (B, C, H, W) at each call, a generator an image, drawn on the CPU."""

    def __init__(
        self,
        seeds: Sequence[int],
        size: tuple[int, int, int],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.size = size
        self.device = device
        self.dtype = dtype

    def __call__(self) -> Tensor:
        """The next noise of every image, (B, C, H, W)."""
        noise = torch.cat([torch.randn((1, *self.size), generator=g) for g in self.generators])
        return noise.to(device=self.device, dtype=self.dtype)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Noise on the great circle from a to b, image by image, (B, C, H, W); `share` is 0 … 1.

    A straight mean of two noises is too weak, by sqrt(1/2) in the middle, and draws grey images;
    on the circle the length is kept (Shoemake 1985, "Animating rotation with quaternion curves").
    """
    lengths = [x.flatten(1).norm(dim=1) for x in (a, b)]
    cosine = (a * b).flatten(1).sum(1) / (lengths[0] * lengths[1])
    angle = cosine.clamp(-1, 1).arccos()
    # Two noises of one seed have no circle between them, and any share of them is the same noise.
    sine = torch.where(angle.sin() > 1e-6, angle.sin(), 1)
    of_a = torch.where(angle.sin() > 1e-6, ((1 - share) * angle).sin() / sine, 1 - share)
    of_b = torch.where(angle.sin() > 1e-6, (share * angle).sin() / sine, share)
    return of_a.reshape(-1, 1, 1, 1) * a + of_b.reshape(-1, 1, 1, 1) * b
