"""Decoding in tiles: what it leaves alone, what it changes, and the memory that it saves."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import randomise
from torch import Tensor
from torch.nn import functional as F

from latentdiff.models.vae import VAE, VAEConfig
from latentdiff.models.vae_tiling import SMALLEST, decode_in_tiles, windows
from latentdiff.pipeline import Pipeline

FACTOR = 4


def tiny_vae() -> VAE:
    torch.manual_seed(0)
    config = VAEConfig(
        block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, scaling_factor=0.5
    )
    vae = VAE(config).eval().requires_grad_(False)
    randomise(vae)
    assert config.factor == FACTOR
    return vae


def latents(height: int, width: int) -> Tensor:
    """Smooth, as those of images are."""
    generator = torch.Generator().manual_seed(height * width)
    coarse = torch.randn((1, 4, height // 4 + 1, width // 4 + 1), generator=generator)
    return F.interpolate(coarse, (height, width), mode="bilinear")


@given(st.integers(1, 300), st.integers(SMALLEST, 80), st.sampled_from([1, 2, 8]))
def test_tiles_are_no_larger_than_asked_and_weigh_one_at_each_pixel(
    size: int, tile: int, factor: int
) -> None:
    total = torch.zeros(size * factor)
    found = windows(size, tile, factor)
    for start, weights in found:
        assert len(weights) <= tile * factor
        assert (weights >= 0).all()
        total[start * factor : start * factor + len(weights)] += weights
    torch.testing.assert_close(total, torch.ones(size * factor))
    assert len({len(weights) for _, weights in found}) == 1  # one size to compile
    for (start, weights), (following, _) in itertools.pairwise(found):
        shared = start + len(weights) // factor - following
        assert 1 <= shared <= tile // 2 + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoder_that_sees_single_latents_gives_the_same_image(dtype: torch.dtype) -> None:
    z = latents(37, 50).to(dtype)

    def decode(z: Tensor) -> Tensor:
        return F.interpolate(z[:, :3].sin(), scale_factor=FACTOR, mode="nearest")

    found = decode_in_tiles(decode, z, tile=16, factor=FACTOR)
    assert found.dtype == dtype
    torch.testing.assert_close(found, decode(z))


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (9, 16), (1, 3)])
def test_an_image_within_one_tile_has_the_same_bits(size: tuple[int, int]) -> None:
    vae, z = tiny_vae(), latents(*size)
    whole = vae.decode(z)
    vae.tiling = 16 * FACTOR
    assert vae.decode(z).equal(whole)


@torch.no_grad()
def test_tiles_leave_no_edge_where_they_meet() -> None:
    """What they change, by norms and attention that see a tile alone, has no step at their borders.

    That is measured beside what neighbouring pixels differ by in the image itself. Tiles side by
    side, not blended, show that it sees edges.
    """
    vae = Pipeline.from_pretrained("emoji").vae
    f, generator = vae.config.factor, torch.Generator().manual_seed(0)
    blurred = torch.rand((1, 3, 20, 20), generator=generator) * 2 - 1
    z = vae.encode(F.interpolate(blurred, (40 * f, 40 * f), mode="bicubic")).mean
    whole = vae.decode(z)
    vae.tiling = 16 * f
    tiled = vae.decode(z)
    vae.tiling = None
    rows = [torch.cat([vae.decode(c) for c in r.split(10, 3)], dim=3) for r in z.split(10, 2)]
    side_by_side = torch.cat(rows, dim=2)

    def steps(image: Tensor) -> Tensor:  # between columns, the mean of each
        return image.diff(dim=3).abs().mean((0, 1, 2))

    assert 0 < (tiled - whole).square().mean().sqrt() < 0.12 * whole.std()
    assert steps(tiled - whole).max() < steps(whole).mean()
    assert steps(side_by_side - whole).max() > 5 * steps(whole).mean()


@pytest.mark.parametrize("tile", [0, SMALLEST * FACTOR - 1, -64, 64.0, True, "64"])
def test_what_is_no_side_of_a_tile_is_refused(tile: object) -> None:
    vae = tiny_vae()
    with pytest.raises(ValueError, match=r"vae_tiling=.* must be .* at least 32 for this VAE"):
        vae.tiling = tile  # pyright: ignore[reportAttributeAccessIssue] - which it refuses
    assert vae.tiling is None


SCRIPT = """
import json, sys, torch
from latentdiff.pipeline import Pipeline
from support.peak_memory import status
from pathlib import Path
torch.set_num_threads(1)
torch.set_grad_enabled(False)
vae = Pipeline.from_pretrained("emoji").vae
side, vae.tiling = 1024 // vae.config.factor, json.loads(sys.argv[1])
z = torch.randn((1, vae.config.latent_channels, side, side))
vae.decode(z[..., :8, :8])
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
vae.decode(z)
print(status("VmHWM") - before)
"""


@pytest.mark.processes
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts peaks there")
def test_a_large_image_takes_less_memory_in_tiles() -> None:
    def peak(tile: int | None) -> int:
        path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        return int(
            subprocess.run(
                [sys.executable, "-c", SCRIPT, json.dumps(tile)],
                env=os.environ | {"PYTHONPATH": path},
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )

    whole, tiled = peak(None), peak(256)
    assert tiled < whole / 4
