"""What the denoiser is trained on: how each prediction type weighs the noise levels."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from mixture import Mixture
from plotting import COLOURS, GREY, label, panels, save
from torch import Tensor

from latentdiff.diffusion import Diffusion, Prediction
from latentdiff.levels import NoiseLevel
from latentdiff.tasks.denoiser.loss import LossConfig

TYPES: dict[Prediction, str] = {
    "epsilon": r"$\epsilon$",
    "sample": r"$x_0$",
    "v_prediction": "v",
    "flow_prediction": r"$\epsilon - x_0$",
    "score": r"score (times $\sigma$)",
}
DATA = Mixture(weights=(0.5, 0.5), means=(-1.0, 1.0), stds=(0.2, 0.2))


def draw(out: Path) -> dict[str, float]:
    """Two figures, and the numbers that the page states."""
    weights(out)
    return losses(out)


def in_errors_of_noise(diffusion: Diffusion, t: Tensor) -> Tensor:
    """What the loss makes of a squared error of eps at t: 1 for `epsilon`, (B,)."""
    plain = LossConfig(weighting="p2", p2_gamma=0.0)  # the error of the noise, weight 1
    return 1 / plain.weight(diffusion, t)


def weights(out: Path) -> None:
    """Weight of the noise's error against the signal-to-noise ratio; densities of the times."""
    figure, (plain, weighted, densities) = panels(1, 3, (9.6, 3.2))
    t = torch.arange(5, 996)
    for colour, (prediction, name) in zip(COLOURS, TYPES.items(), strict=False):
        diffusion = Diffusion("cosine", prediction)
        style = {"linestyle": "--", "linewidth": 2.2} if prediction == "score" else {}
        found = in_errors_of_noise(diffusion, t)
        plain.semilogy(decibels(diffusion, t), found, color=colour, label=name, **style)
    plain.legend(frameon=False, fontsize=8.5)
    label(plain, "plain loss of each type", "SNR, dB", r"weight of $|\epsilon-\epsilon_\theta|^2$")
    diffusion = Diffusion("cosine", "epsilon")
    objectives = {
        r"$\epsilon$, none": LossConfig(),
        r"min-SNR, $\gamma$ = 5": LossConfig(weighting="min_snr"),
        r"P2, $\gamma$ = 1": LossConfig(weighting="p2"),
    }
    for colour, (name, objective) in zip((GREY, *COLOURS[:2]), objectives.items(), strict=True):
        found = objective.weight(diffusion, t)
        weighted.semilogy(decibels(diffusion, t), found, color=colour, label=name)
    weighted.legend(frameon=False, fontsize=8.5)
    label(weighted, "weightings, the same for all types", "SNR, dB", "")
    drawn = {
        "uniform": LossConfig(),
        "logit-normal (0, 1)": LossConfig(timestep_distribution="logit_normal"),
        "uniform, shift 3": LossConfig(timestep_shift=3.0),
    }
    flow = Diffusion("flow", "flow_prediction")
    for colour, (name, objective) in zip(COLOURS, drawn.items(), strict=False):
        generator = torch.Generator().manual_seed(0)
        times = objective.sample_t(flow, 200_000, generator=generator) / flow.num_timesteps
        height, edges = np.histogram(times, bins=40, range=(0, 1), density=True)
        densities.stairs(height, edges, color=colour, label=name, linewidth=1.4)
    densities.legend(frameon=False, fontsize=8.5)
    densities.set_ylim(0, 3.2)
    label(densities, "where it is trained (flow)", "t / T", "density")
    save(figure, out, "weights")


def decibels(diffusion: Diffusion, t: Tensor) -> Tensor:
    alpha, sigma = diffusion.alpha_sigma(t)
    return 20 * (alpha / sigma).log10()


def perfect(diffusion: Diffusion) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A network that gives what the best one gives, whatever it is to predict."""

    def network(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        alpha, sigma = (a[0] for a in diffusion.alpha_sigma(timestep + 1))
        x0 = DATA.denoise(x, NoiseLevel(timestep, alpha, sigma))
        return diffusion.target(x0, (x - alpha * x0) / sigma, alpha, sigma)

    return network


def losses(out: Path) -> dict[str, float]:
    """The loss that is left at each t when the network is perfect: `Diffusion.loss` itself."""
    figure, (panel,) = panels(1, 1, (5.2, 3.0))
    generator = torch.Generator().manual_seed(0)
    x0 = DATA.sample(4_000, generator)
    noise = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    times = (1, 10, *range(25, 1000, 25), 990, 1000)
    numbers = {}
    for colour, (prediction, name) in zip(COLOURS, TYPES.items(), strict=False):
        diffusion = Diffusion("cosine", prediction)
        network = perfect(diffusion)
        found = []
        for t in times:
            at = torch.full((len(x0),), t)
            found.append(float(diffusion.loss(network, x0, x0, noise=noise, t=at).mean()))
        style = {"linestyle": "--", "linewidth": 2.2} if prediction == "score" else {}
        panel.plot(times, found, color=colour, label=name, **style)
        numbers[f"training.{prediction}.first"] = found[0]
        numbers[f"training.{prediction}.last"] = found[-1]
    panel.legend(frameon=False, fontsize=8.5)
    label(panel, "loss of a perfect network", "t", "")
    save(figure, out, "loss_by_t")
    return numbers
