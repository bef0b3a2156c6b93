"""A latent is noised and denoised: the embedded model's three modules, one after the other."""

import math
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from matplotlib.axes import Axes
from plotting import image_panel, panels, save
from torch import Tensor

from latentdiff import Pipeline
from latentdiff.guidance import guided_denoiser
from latentdiff.images import from_pil, to_pil
from latentdiff.samplers import ddim

DRAWN, PROMPT = "a cat, 3D style", "a cat"
STEPS = 20
SHOWN = (20, 14, 8, 4, 0)  # steps that are left: 20 is pure noise


@torch.no_grad()
def draw(out: Path) -> dict[str, float]:
    """One figure, and the numbers that the page states."""
    pipe = Pipeline.from_pretrained("emoji", device="cpu")
    (drawn,) = pipe(DRAWN, seed=0, progress=False).images
    images = from_pil(drawn, drawn.size)[None]
    generator = torch.Generator().manual_seed(0)
    posterior = pipe.vae.encode(images)
    latents = posterior.sample(torch.randn(posterior.mean.shape, generator=generator))
    eps = torch.randn(latents.shape, generator=generator)
    levels = pipe.diffusion.levels(STEPS)
    denoise = guided_denoiser(
        pipe.diffusion, pipe.unet, pipe.encode([PROMPT]), pipe.encode([""]), 4.0
    )
    figure, axes = panels(4, len(SHOWN), (6.6, 5.4))
    rows = [axes[i : i + len(SHOWN)] for i in range(0, len(axes), len(SHOWN))]
    for column, left in enumerate(SHOWN):
        level = levels[STEPS - left]
        noisy = level.alpha * latents + level.sigma * eps
        show(rows[0][column], level.alpha * images + level.sigma * image_noise(images))
        show_latent(rows[1][column], noisy)
        show(rows[2][column], pipe.vae.decode(noisy))
        if left:
            *_, noisy = ddim(denoise, noisy, levels.last(left))
        show(rows[3][column], pipe.vae.decode(noisy))
        rows[0][column].set_title(f"t = {1000 * float(level.sigma):.0f}", fontsize=10)
    names = (
        "noise on the\nimage itself",
        "noise on the\nlatent",
        "that, decoded",
        "denoised by\nthe UNet",
    )
    for row, name in zip(rows, names, strict=True):
        row[0].set_ylabel(name, fontsize=9)
    save(figure, out, "latent", colours=80)
    return {
        "latent.numbers": latents[0].numel(),
        "latent.pixels": images[0].numel(),
        "latent.error": float((pipe.vae.decode(latents) - images).abs().mean()),
    }


def image_noise(images: Tensor) -> Tensor:
    return torch.randn(images.shape, generator=torch.Generator().manual_seed(1))


def show(panel: Axes, images: Tensor) -> None:
    image_panel(panel)
    panel.imshow(np.asarray(to_pil(images[0])), interpolation="nearest")


def show_latent(panel: Axes, latents: Tensor) -> None:
    """The channels, of which there are a square number, as small grey images."""
    image_panel(panel)
    tiles = rearrange(latents[0], "(r c) h w -> (r h) (c w)", r=math.isqrt(latents.shape[1]))
    panel.imshow(tiles.numpy(), cmap="gray", vmin=-3, vmax=3, interpolation="nearest")
