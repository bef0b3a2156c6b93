"""The Fréchet distance: where it is known, and how many images an estimate of it needs."""

from pathlib import Path

import torch
from plotting import BLUE, GREY, RED, label, panels, save
from torch import Tensor

from latentdiff.evaluation.frechet import Moments, frechet_distance
from latentdiff.evaluation.kernel import kernel_distance

DIM = 64
COUNTS = (70, 100, 200, 500, 1000, 2000)


def draw(out: Path) -> dict[str, float]:
    """One figure, and the numbers that the page states."""
    figure, (known, estimate) = panels(1, 2, (7.2, 2.9))
    zero, unit = torch.zeros(DIM, dtype=torch.float64), torch.eye(DIM, dtype=torch.float64)
    shifts = torch.linspace(0, 2, 21, dtype=torch.float64)
    shifted = [frechet_distance(zero, unit, zero + shift, unit) for shift in shifts]
    widened = [frechet_distance(zero, unit, zero, (1 + shift) ** 2 * unit) for shift in shifts]
    known.plot(shifts, shifted, "o", color=BLUE, markersize=4, label="all means moved by s")
    known.plot(shifts, widened, "x", color=RED, markersize=5, label="all deviations 1 + s")
    known.plot(shifts, DIM * shifts**2, color=GREY, linewidth=1, label=r"$64\,s^2$")
    known.legend(frameon=False, fontsize=8.5)
    label(known, "two Gaussians of 64 dimensions", "s", "Fréchet distance")

    generator = torch.Generator().manual_seed(0)
    found, kernel = [], []
    for count in COUNTS:
        a, b = (torch.randn(count, DIM, generator=generator) for _ in range(2))
        found.append(frechet_distance(*moments(a), *moments(b)))
        kernel.append(kernel_distance(a, b))
    estimate.plot(COUNTS, found, "o-", color=BLUE, markersize=4, label="Fréchet distance")
    estimate.plot(COUNTS, kernel, "x-", color=RED, markersize=5, label="kernel distance")
    estimate.axhline(0, color="black", linewidth=1)
    estimate.set_xscale("log")
    estimate.set_xticks(COUNTS, [str(n) for n in COUNTS])
    estimate.minorticks_off()
    estimate.legend(frameon=False, fontsize=8.5)
    label(estimate, "estimates of a distance that is 0", "samples of each", "")
    save(figure, out, "frechet")
    return {
        "frechet.shift_1": shifted[10],
        "frechet.wide_1": widened[10],
        "frechet.estimate_100": found[COUNTS.index(100)],
        "frechet.estimate_2000": found[-1],
    }


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    counted = Moments()
    counted.add(features)
    return counted.mean, counted.covariance
