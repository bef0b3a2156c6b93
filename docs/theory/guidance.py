"""Guidance: what a scale above 1 does to samples of which everything is known."""

from pathlib import Path

import torch
from mixture import Mixture
from plotting import COLOURS, label, panels, save
from torch import Tensor

from latentdiff.diffusion import Diffusion
from latentdiff.guidance import guided_denoiser
from latentdiff.levels import NoiseLevel
from latentdiff.samplers import ddim

WIDTHS = (0.5, 0.4)
# Two captions, and what is drawn where there is none: both.
CAPTIONS = [Mixture((1.0,), (mean,), (std,)) for mean, std in zip((-0.7, 0.8), WIDTHS, strict=True)]
EMPTY = Mixture((0.5, 0.5), (-0.7, 0.8), WIDTHS)
DIFFUSION = Diffusion("cosine", "epsilon")
SCALES = (0.0, 1.0, 3.0, 7.5)


def network(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
    """The perfect noise predictor; a context (B, 1, 1) is the caption's number, -1 for none."""
    alpha, sigma = (a[0] for a in DIFFUSION.alpha_sigma(timestep.round().long() + 1))
    level = NoiseLevel(timestep, alpha, sigma)
    given = torch.stack([data.denoise(x, level) for data in (*CAPTIONS, EMPTY)])
    x0 = given[context.flatten().long(), torch.arange(len(x))]
    return (x - alpha * x0) / sigma


def draw(out: Path) -> dict[str, float]:
    """One figure, and the numbers that the page states."""
    figure, (panel,) = panels(1, 1, (5.8, 2.9))
    noise = torch.randn(5_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.linspace(-2.2, 3, 400, dtype=torch.float64)[:, None]
    panel.plot(x, CAPTIONS[1].log_density(x).exp(), color="black", linewidth=1, label="the caption")
    panel.plot(x, EMPTY.log_density(x).exp(), color="0.6", linewidth=1, label="no caption")
    numbers = {}
    for colour, scale in zip(COLOURS, SCALES, strict=False):
        context = torch.full((len(noise), 1, 1), 1.0)
        denoise = guided_denoiser(DIFFUSION, network, context, torch.full((1, 1, 1), -1.0), scale)
        *_, samples = ddim(denoise, noise, DIFFUSION.levels(100))
        panel.hist(
            samples[:, 0].numpy(),
            bins=80,
            range=(-2.2, 3),
            density=True,
            histtype="step",
            color=colour,
            label=f"scale {scale:g}",
        )
        numbers |= {
            f"guidance.{scale:g}.mean": float(samples.mean()),
            f"guidance.{scale:g}.std": float(samples.std()),
        }
    panel.legend(frameon=False, fontsize=8.5)
    label(panel, "samples at four guidance scales", "x", "density")
    save(figure, out, "guidance")
    return numbers
