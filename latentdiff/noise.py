"""The noise of a sampling run: each image has a generator of its own, on the CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor


class ImageNoise:
    """Draws N(0, I), (B, C, H, W) at each call, from one generator per image, with its seed.

    Generators in place of the seeds are drawn from as diffusers does: in the dtype `theirs`, on
    their own devices, and one for all images at once.
    """

    def __init__(
        self,
        seeds: Sequence[int | torch.Generator],
        size: tuple[int, int, int],
        *,
        device: torch.device,
        dtype: torch.dtype,
        theirs: torch.dtype = torch.float32,
    ) -> None:
        given = [seed for seed in seeds if isinstance(seed, torch.Generator)]
        self.count = len(seeds) if len({id(g) for g in given}) == 1 else 1
        """Images that are drawn together."""
        ours = [torch.Generator().manual_seed(s) for s in seeds if isinstance(s, int)]
        self.generators = ours or given[:: self.count]
        self.drawn_in = theirs if given else torch.float32
        self.size = size
        self.device = device
        self.dtype = dtype

    def __call__(self) -> Tensor:
        """The next noise of every image, (B, C, H, W)."""
        shape, dtype = (self.count, *self.size), self.drawn_in
        each = [
            torch.randn(shape, generator=g, device=g.device, dtype=dtype) for g in self.generators
        ]
        return torch.cat(each).to(device=self.device, dtype=self.dtype)

    def first(self, variation_seeds: Sequence[int], strength: float) -> Tensor:
        """The next noise, interpolated by `slerp` with `strength` towards the variation seeds'."""
        eps = self()
        if not strength:
            return eps
        other = ImageNoise(variation_seeds, self.size, device=self.device, dtype=self.dtype)
        return slerp(eps, other(), strength)


def each_generator(
    given: torch.Generator | Sequence[torch.Generator], count: int
) -> tuple[torch.Generator, ...]:
    """The generator of each image; ValueError for other than one, or one for each."""
    listed = (
        [given] * count
        if isinstance(given, torch.Generator)
        else [*given]
        if isinstance(given, Sequence)
        else [given]
    )
    for one in listed:
        if not isinstance(one, torch.Generator):
            raise ValueError(
                f"generator holds {one!r:.60}; it must be a torch.Generator or a list of "
                "them; a number is a seed"
            )
    if len(listed) != count:
        raise ValueError(
            f"generator lists {len(listed)} for {count} images; give one for all, or one for each"
        )
    return tuple(listed)


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
