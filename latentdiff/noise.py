"""The noise of a sampling run: each image has a generator of its own, on the CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor


class ImageNoise:
    """Draws N(0, I), (B, C, H, W) at each call, from one generator per image, with its seed."""

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

    def first(self, variation_seeds: Sequence[int], strength: float) -> Tensor:
        """The next noise, interpolated by `slerp` with `strength` towards the variation seeds'."""
        eps = self()
        if not strength:
            return eps
        other = ImageNoise(variation_seeds, self.size, device=self.device, dtype=self.dtype)
        return slerp(eps, other(), strength)


def slerp(a: Tensor, b: Tensor, fraction: float) -> Tensor:
    """Spherical linear interpolation of noise from a to b by a fraction, 0 … 1, image by image.

    Both are (B, C, H, W). The mean of two noises has a norm smaller by sqrt(1/2) and gives grey
    images; the great circle keeps the norm (Shoemake 1985, "Animating rotation with quaternion
    curves").
    """
    lengths = [x.flatten(1).norm(dim=1) for x in (a, b)]
    cosine = (a * b).flatten(1).sum(1) / (lengths[0] * lengths[1])
    angle = cosine.clamp(-1, 1).arccos()
    # Equal noises have no great circle between them; for them the interpolation is linear.
    sine = torch.where(angle.sin() > 1e-6, angle.sin(), 1)
    of_a = torch.where(angle.sin() > 1e-6, ((1 - fraction) * angle).sin() / sine, 1 - fraction)
    of_b = torch.where(angle.sin() > 1e-6, (fraction * angle).sin() / sine, fraction)
    return of_a.reshape(-1, 1, 1, 1) * a + of_b.reshape(-1, 1, 1, 1) * b
