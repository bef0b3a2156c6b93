"""The bound on -log p(x): of a VAE, of a diffusion model term by term, and how tight they are."""

import math
from pathlib import Path

import torch
from mixture import Mixture
from plotting import BLUE, GREEN, ORANGE, RED, label, panels, save
from torch import Tensor

from latentdiff.diffusion import Diffusion
from latentdiff.gaussians import Variance, posterior_coefficients, reverse_variances
from latentdiff.levels import Denoise, NoiseLevel, NoiseLevels
from latentdiff.likelihood import bound_terms
from latentdiff.models.vae import Posterior

STD = 0.5  # of the data, N(0, STD^2)
DATA = Mixture(weights=(1.0,), means=(0.0,), stds=(STD,))
VARIANCES: dict[Variance, str] = {
    "small": r"$\tilde\beta_t$",
    "large": r"$\beta_t$",
    "learned": "the true one",
}


def draw(out: Path) -> dict[str, float]:
    """Two figures, and the numbers that the page states."""
    return vae(out) | diffusion_terms(out)


def vae(out: Path) -> dict[str, float]:
    """A VAE that can be solved: z ~ N(0, 1), x = z + 0.5 eps, and some q(z | x) at x = 1."""
    x, noise_variance = 1.0, 0.25
    exact = -0.5 * (x**2 / (1 + noise_variance) + math.log(2 * math.pi * (1 + noise_variance)))
    best_mean, best_variance = x / (1 + noise_variance), noise_variance / (1 + noise_variance)
    figure, (elbo, kl) = panels(1, 2, (7.2, 2.9))
    means = torch.linspace(-0.2, 1.8, 101)

    def bound(mean: Tensor, variance: float) -> Tensor:
        """E log p(x | z) - KL(q || p(z)), both in closed form."""
        log_variance = torch.full_like(mean, math.log(variance))
        q = Posterior(mean.reshape(-1, 1, 1, 1), log_variance.reshape(-1, 1, 1, 1))
        square = (x - mean) ** 2 + variance  # E (x - z)^2
        likelihood = -0.5 * (square / noise_variance + math.log(2 * math.pi * noise_variance))
        return likelihood - q.kl()

    elbo.axhline(exact, color="black", linewidth=1)
    elbo.text(-0.2, exact + 0.12, "log p(x)", fontsize=9)
    for variance, colour in ((best_variance, GREEN), (0.6, ORANGE), (0.03, BLUE)):
        name = f"q's variance {variance:.2f}"
        elbo.plot(means, bound(means, variance), color=colour, label=name)
    elbo.set_ylim(-6, -0.6)
    elbo.legend(frameon=False, fontsize=8.5, loc="lower center")
    label(elbo, "the VAE's bound touches where q = p(z | x)", "mean of q(z | x)", "nats")

    q = Posterior(torch.full((1, 1, 1, 1), 0.8), torch.full((1, 1, 1, 1), math.log(0.2)))
    z = q.sample(torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0)))
    log_q = -0.5 * ((z - q.mean) ** 2 / q.logvar.exp() + q.logvar)
    ratio = (log_q + 0.5 * z**2).flatten()
    count = torch.arange(1, len(ratio) + 1)
    average = ratio.cumsum(0) / count
    error = ratio.std() / count.sqrt()
    shown = count >= 20
    kl.fill_between(
        count[shown],
        (q.kl() - 2 * error)[shown],
        (q.kl() + 2 * error)[shown],
        color="0.9",
        linewidth=0,
    )
    kl.semilogx(count[shown], average[shown], color=RED, linewidth=1)
    kl.axhline(float(q.kl()), color="black", linewidth=1)
    label(kl, "KL: closed form (black), mean of log q / p", "samples", "nats")
    save(figure, out, "vae_bound")
    return {
        "bound.vae.exact": exact,
        "bound.vae.best": float(bound(torch.tensor([best_mean]), best_variance)),
        "bound.vae.kl": float(q.kl()),
        "bound.vae.monte_carlo": float(average[-1]),
    }


def diffusion_terms(out: Path) -> dict[str, float]:
    """Each term of DDPM's bound, and the whole against the exact value with more and more steps."""
    figure, (terms, gaps) = panels(1, 2, (7.2, 3.1))
    colours = dict(zip(VARIANCES, (BLUE, RED, GREEN), strict=True))
    numbers = {}
    counts = (5, 10, 20, 50, 100)
    x0 = DATA.sample(40_000, torch.Generator().manual_seed(0))
    exact = float(-DATA.log_density(x0).mean())
    whole = {name: [] for name in VARIANCES}
    for steps in counts:
        for name in VARIANCES:
            parts = bound(steps, name, x0)
            each = parts["prior"] + parts["denoising"].sum(1) + parts["reconstruction"]
            whole[name].append(float(each.mean()) - exact)
            if steps == 100:
                denoising, last = parts["denoising"].mean(0), parts["reconstruction"].mean()
                terms.semilogy(
                    range(steps, 1, -1), denoising, color=colours[name], label=VARIANCES[name]
                )
                terms.semilogy([1], last.abs(), "o", color=colours[name], markersize=4)
                error = (each + DATA.log_density(x0)).std() / math.sqrt(len(x0))
                numbers |= {
                    "bound.prior": float(parts["prior"].mean()),
                    f"bound.{name}.whole": float(each.mean()),
                    f"bound.{name}.error": float(error),
                }
    for name, found in whole.items():
        gaps.plot(counts, found, "o-", color=colours[name], markersize=3.5)
        numbers[f"bound.{name}.gap_5"], numbers[f"bound.{name}.gap_100"] = found[0], found[-1]
    gaps.set_xscale("log")
    gaps.set_yscale("symlog", linthresh=0.02)
    gaps.set_ylim(-0.03, 6)
    terms.legend(frameon=False, fontsize=8.5, title=r"$\sigma_t^2$")
    label(terms, r"$L_{t-1}$ (lines), $|L_0|$ (dots), T = 100", "t", "nats")
    gaps.set_xticks(counts, [str(n) for n in counts])
    gaps.minorticks_off()
    gaps.axhline(0, color="black", linewidth=1)
    label(gaps, "bound minus exact value", "steps T", "nats")
    save(figure, out, "bound")
    return numbers | {"bound.exact": exact}


def bound(steps: int, variance: Variance, x0: Tensor) -> dict[str, Tensor]:
    """The terms of the bound on -log p(x0), one draw of noise each."""
    # The same noise at the end whatever the number of steps, as `linear` has it for 1,000.
    ends = {"beta_start": 0.1 / steps, "beta_end": min(20 / steps, 0.999)}
    levels = Diffusion("linear", "epsilon", num_timesteps=steps, **ends).levels(steps)
    return bound_terms(
        with_true_variance(levels) if variance == "learned" else DATA.denoise,
        x0,
        levels,
        variance=variance,
        generator=torch.Generator().manual_seed(1),
    )


def with_true_variance(levels: NoiseLevels) -> Denoise:
    """The denoiser that learned everything: after x0 the v of Var(x_s | x_t)."""
    s, t = levels.ends()
    from_x0, _, posterior = posterior_coefficients(s, t)
    of_x0 = STD**2 * t.sigma**2 / (t.alpha**2 * STD**2 + t.sigma**2)  # Var(x0 | x_t)
    small, large = reverse_variances(s, t)
    small = torch.cat([small[:-1], small[-2:-1]])  # as `bound_terms` has it in the last step
    v = ((posterior + from_x0**2 * of_x0) / small).log() / (large / small).log()

    def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
        at_level = v[levels.sigma[:-1] == level.sigma]
        return torch.cat([DATA.denoise(x, level), at_level.expand(x.shape)], dim=1)

    return denoise
