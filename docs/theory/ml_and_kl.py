"""Maximum likelihood is the least KL(data || model): fitted in both ways, and in the reverse."""

from collections.abc import Callable
from pathlib import Path

import torch
from mixture import Mixture
from plotting import BLUE, GREEN, GREY, RED, label, panels, save
from torch import Tensor

DATA = Mixture(weights=(0.7, 0.3), means=(-1.0, 1.6), stds=(0.45, 0.55))
GRID = torch.linspace(-8, 8, 8001, dtype=torch.float64)[:, None]
STEP = 16 / 8000


def draw(out: Path) -> dict[str, float]:
    """One figure, and the numbers that the page states."""
    figure, (fits, curve, samples) = panels(1, 3, (9.6, 3.0))
    log_data = DATA.log_density(GRID)
    data = log_data.exp()

    def forward(log_model: Tensor) -> Tensor:
        return (data * (log_data - log_model)).sum() * STEP

    def reverse(log_model: Tensor) -> Tensor:
        model = log_model.exp()
        return (model * (log_model - log_data)).sum() * STEP

    drawn = DATA.sample(20_000, torch.Generator().manual_seed(0))
    by_likelihood = fit(lambda log_model: -log_model.mean(), drawn)
    by_kl, by_reverse = fit(forward, GRID), fit(reverse, GRID)
    axis = GRID[2000:6001:10, 0]
    fits.fill_between(axis, DATA.log_density(axis[:, None]).exp(), color="0.88", linewidth=0)
    for (mean, std), colour, style, name in (
        (by_likelihood, BLUE, "-", "maximum likelihood"),
        (by_kl, RED, "--", "least KL(data || model)"),
        (by_reverse, GREEN, "-", "least KL(model || data)"),
    ):
        density = log_normal(axis, mean, std).exp()
        fits.plot(axis, density, color=colour, linestyle=style, label=name, linewidth=1.6)
    fits.set_ylim(0, 1.35)
    fits.legend(frameon=False, fontsize=8, loc="upper right")
    label(fits, "a Gaussian fitted to data (grey)", "x", "density")

    stds = torch.linspace(0.7, 3, 47)
    cost = torch.stack([-log_normal(drawn, by_kl[0], std).mean() for std in stds])
    divergence = torch.stack([forward(log_normal(GRID, by_kl[0], std)[:, 0]) for std in stds])
    curve.plot(stds, cost, color=BLUE, label="mean of -log p(x) over samples")
    curve.plot(stds, divergence, color=RED, label="KL(data || model)")
    curve.axvline(float(by_kl[1]), color=GREY, linewidth=1)
    curve.set_ylim(0, 4)
    curve.legend(frameon=False, fontsize=8)
    label(curve, "one curve, moved by the data's entropy", "deviation of the model", "nats")

    counts = (10, 30, 100, 300, 1000, 3000, 10_000)
    excess = [
        torch.stack([forward(log_normal(GRID, x.mean(), x.std())[:, 0]) for x in parts]).mean()
        - forward(log_normal(GRID, *by_kl)[:, 0])
        for parts in (
            DATA.sample(40 * n, torch.Generator().manual_seed(n)).reshape(40, n) for n in counts
        )
    ]
    samples.loglog(counts, excess, "o-", color=BLUE, markersize=3.5)
    label(samples, "KL of the fit above the least KL", "samples m", "nats")
    save(figure, out, "ml_and_kl")
    entropy = float(-(data * log_data).sum() * STEP)
    return {
        "ml.likelihood.mean": float(by_likelihood[0]),
        "ml.likelihood.std": float(by_likelihood[1]),
        "ml.kl.mean": float(by_kl[0]),
        "ml.kl.std": float(by_kl[1]),
        "ml.reverse.mean": float(by_reverse[0]),
        "ml.reverse.std": float(by_reverse[1]),
        "ml.entropy": entropy,
        "ml.cost": float(-log_normal(drawn, *by_kl).mean()),
        "ml.least_kl": float(forward(log_normal(GRID, *by_kl)[:, 0])),
    }


def log_normal(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return torch.distributions.Normal(mean, std).log_prob(x)


def fit(cost: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the Gaussian whose log density at x has the least cost."""
    place = torch.tensor([-0.5, 0.0], dtype=torch.float64, requires_grad=True)  # mean, log std
    optimizer = torch.optim.LBFGS([place], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cost(log_normal(x[:, 0], place[0], place[1].exp()))
        loss.backward()
        return loss

    optimizer.step(closure)
    mean, log_std = place.detach()
    return mean, log_std.exp()
