"""Why noise is added again: Algorithm 2 with z and without, where the denoiser is perfect.

The data are two clusters of numbers, of which everything is known: no network, no training, so
nothing to blame but the sampler. Then fewer steps, a wrong start, and the embedded model.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from mixture import Mixture
from plotting import BLUE, COLOURS, GREEN, GREY, RED, image_panel, label, panels, save
from torch import Tensor

from latentdiff import Pipeline
from latentdiff.diffusion import Diffusion
from latentdiff.guidance import guided_denoiser
from latentdiff.images import to_pil
from latentdiff.levels import Denoise, NoiseLevel, NoiseLevels
from latentdiff.noise import ImageNoise
from latentdiff.samplers import ddim, ddpm

DATA = Mixture(weights=(0.65, 0.35), means=(-0.8, 0.9), stds=(0.25, 0.12))
CHAIN = Diffusion("linear", "epsilon")
COUNT = 10_000
Sampler = Callable[[Denoise, Tensor, NoiseLevels, Callable[[], Tensor]], Iterator[Tensor]]


def with_z(
    denoise: Denoise, x: Tensor, levels: NoiseLevels, z: Callable[[], Tensor]
) -> Iterator[Tensor]:
    return ddpm(denoise, x, levels, noise=z)  # sigma_t^2 = beta_tilde_t


def with_more_z(
    denoise: Denoise, x: Tensor, levels: NoiseLevels, z: Callable[[], Tensor]
) -> Iterator[Tensor]:
    return ddpm(denoise, x, levels, variance="large", noise=z)  # sigma_t^2 = beta_t


def without_z(
    denoise: Denoise, x: Tensor, levels: NoiseLevels, z: Callable[[], Tensor]
) -> Iterator[Tensor]:
    return ddpm(denoise, x, levels, noise=lambda: torch.zeros_like(x))  # the mean alone


def without_z_but_right(
    denoise: Denoise, x: Tensor, levels: NoiseLevels, z: Callable[[], Tensor]
) -> Iterator[Tensor]:
    return ddim(denoise, x, levels)


SAMPLERS: dict[str, tuple[str, Sampler]] = {
    "small": (r"with z, $\sigma^2=\tilde\beta$", with_z),
    "large": (r"with z, $\sigma^2=\beta$", with_more_z),
    "none": ("without z (z = 0)", without_z),
    "ddim": (r"DDIM, $\eta$ = 0: no z either", without_z_but_right),
}


def draw(out: Path) -> dict[str, float]:
    """Four figures, and the numbers that the page states."""
    return (
        posterior_sigmas(out) | with_and_without(out) | steps_and_starts(out) | embedded_model(out)
    )


def sample(sampler: Sampler, steps: int, *, start: float = 1.0) -> Tensor:
    """COUNT samples on their way from noise of deviation `start`, (steps + 1, COUNT, 1)."""
    generator = torch.Generator().manual_seed(1)

    def z() -> Tensor:
        return torch.randn(COUNT, 1, generator=generator, dtype=torch.float64)

    path = []

    def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
        path.append(x)
        return DATA.denoise(x, level)

    *_, x = sampler(denoise, start * z(), CHAIN.levels(steps), z)
    return torch.stack([*path, x])


def divergence(samples: Tensor) -> float:
    """KL(samples || data) in nats, from counts in bins of 0.1."""
    edges = torch.arange(-30, 31, dtype=torch.float64) / 10
    share = torch.histogram(samples[:, 0], edges).hist / len(samples)
    inside = (torch.arange(20, dtype=torch.float64) + 0.5) / 200
    density = DATA.log_density((edges[:-1, None] + inside).reshape(-1, 1)).exp()
    true = 0.1 * density.reshape(-1, 20).mean(1)
    return float(torch.special.xlogy(share, share / true).sum())


def with_and_without(out: Path) -> dict[str, float]:
    """Paths from noise to data, and where 10,000 of them end."""
    figure, axes = panels(2, 4, (9.6, 4.2), height_ratios=(3, 2))
    x = torch.linspace(-2, 2, 200, dtype=torch.float64)[:, None]
    levels = CHAIN.levels(CHAIN.num_timesteps)
    shown = range(0, 1001, 20)
    image = torch.stack(
        [DATA.log_density(x, levels.alpha[i], levels.sigma[i]).exp() for i in shown], dim=1
    )
    numbers = {}
    for i, (key, (title, sampler)) in enumerate(SAMPLERS.items()):
        paths = sample(sampler, 1000)
        samples = paths[-1]
        above, below = axes[i], axes[4 + i]
        above.imshow(
            (image / image.amax(0)).numpy(),
            extent=(1000, 0, -2, 2),
            origin="lower",
            aspect="auto",
            cmap="Greys",
            vmax=2.2,
        )
        some = paths[::10, :12, 0]
        above.plot(range(1000, -1, -10), some, color=COLOURS[i], linewidth=0.7)
        above.set_ylim(-2, 2)
        above.grid(False)
        label(above, title, "t", "x" if i == 0 else "")
        below.hist(
            samples[:, 0].numpy(), bins=np.arange(-2, 2.01, 0.05), density=True, color=COLOURS[i]
        )
        below.plot(x[:, 0], DATA.log_density(x).exp(), color="black", linewidth=1)
        below.set_ylim(0, 2.2)
        label(below, "", "x, samples and data (line)", "density" if i == 0 else "")
        numbers |= {
            f"why_noise.{key}.std": float(samples.std()),
            f"why_noise.{key}.share": float((samples < 0).double().mean()),
            f"why_noise.{key}.kl": divergence(samples),
        }
        if key == "none":
            numbers["why_noise.none.value"] = float(samples.mean())
            continue
        numbers |= {
            f"why_noise.{key}.left": float(samples[samples < 0].std()),
            f"why_noise.{key}.right": float(samples[samples > 0].std()),
        }
    save(figure, out, "why_noise", colours=40)
    exact = DATA.sample(COUNT, torch.Generator().manual_seed(2))
    return numbers | {
        "why_noise.exact.kl": divergence(exact),
        "why_noise.exact.std": float(exact.std()),
    }


def posterior_sigmas(out: Path) -> dict[str, float]:
    """The two deviations of Algorithm 2, and the factor that the notes have in their place."""
    figure, (panel, ratio) = panels(1, 2, (7.2, 2.8))
    t = torch.arange(1, CHAIN.num_timesteps + 1)
    bars = CHAIN.alphas_cumprod
    notes = (1 - bars[:-1]) / (1 - bars[1:])
    panel.semilogy(t, CHAIN.betas.sqrt(), color=BLUE, label=r"$\sqrt{\beta_t}$")
    panel.semilogy(
        t[1:],
        CHAIN.posterior_sigmas[1:],
        color=GREEN,
        linestyle="--",
        label=r"$\sqrt{\tilde\beta_t}$",
    )
    panel.semilogy(t[1:], notes, color=RED, label="the notes' factor")
    panel.legend(frameon=False, fontsize=9, loc="center right")
    label(panel, r"what multiplies z, $\sigma_t$", "t", "")
    ratio.semilogx(t[1:], CHAIN.posterior_sigmas[1:] / CHAIN.betas[1:].sqrt(), color=GREY)
    label(ratio, r"$\sqrt{\tilde\beta_t\,/\,\beta_t}$", "t", "")
    save(figure, out, "posterior_sigmas")
    return {
        "why_noise.sigma_1000": float(CHAIN.posterior_sigmas[-1]),
        "why_noise.notes_1000": float(notes[-1]),
    }


def steps_and_starts(out: Path) -> dict[str, float]:
    """KL(samples || data) with fewer steps, and from a start that is not N(0, 1)."""
    figure, (few, wrong) = panels(1, 2, (7.2, 3.0))
    numbers = {}
    steps, starts = (5, 10, 20, 50, 100, 250), (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    for i, (key, (title, sampler)) in enumerate(SAMPLERS.items()):
        if key == "none":
            continue
        by_steps = [divergence(sample(sampler, n)[-1]) for n in steps]
        few.loglog(steps, by_steps, "o-", color=COLOURS[i], markersize=3.5, label=title)
        by_start = [divergence(sample(sampler, 100, start=start)[-1]) for start in starts]
        wrong.semilogy(starts, by_start, "o-", color=COLOURS[i], markersize=3.5)
        numbers |= {
            f"why_noise.{key}.kl_10": by_steps[steps.index(10)],
            f"why_noise.{key}.kl_250": by_steps[steps.index(250)],
            f"why_noise.{key}.kl_half": by_start[starts.index(0.5)],
        }
    few.set_xticks(steps, [str(n) for n in steps])
    few.minorticks_off()
    few.legend(frameon=False, fontsize=8.5)
    label(few, "fewer steps", "steps", "KL(samples || data), nats")
    label(wrong, "a wrong start, 100 steps", r"deviation of $x_T$ (right: 1)", "")
    save(figure, out, "why_noise_steps")
    return numbers


def embedded_model(out: Path) -> dict[str, float]:
    """The same with a trained network: one prompt, four seeds, 20 steps."""
    seeds = range(4)
    pipe = Pipeline.from_pretrained("emoji", device="cpu")
    side = pipe.vae.config.sample_size // pipe.vae.config.factor
    size = (pipe.vae.config.latent_channels, side, side)
    figure = Figure(figsize=(9.6, 1.2), layout="constrained")
    numbers = {}
    with torch.no_grad():
        context = pipe.encode(["grinning face, flat style"]).repeat(len(seeds), 1, 1)
        null_context = pipe.encode([""])
        shown = ("small", "none", "ddim")
        for part, key in zip(figure.subfigures(1, len(shown)), shown, strict=True):
            title, sampler = SAMPLERS[key]
            noise = ImageNoise(seeds, size, device=pipe.device, dtype=torch.float32)
            denoise = guided_denoiser(pipe.diffusion, pipe.unet, context, null_context, 3.0)
            *_, latents = sampler(denoise, noise(), pipe.diffusion.levels(20), noise)
            # How far the seeds' latents lie apart, as a share of what they have in all.
            apart = latents.var(0).mean() / latents.square().mean()
            numbers[f"why_noise.emoji.{key}"] = float(apart)
            part.suptitle(title, fontsize=10)
            for panel, image in zip(part.subplots(1, 4), pipe.vae.decode(latents), strict=True):
                image_panel(panel)
                panel.imshow(np.asarray(to_pil(image)), interpolation="nearest")
    save(figure, out, "why_noise_emoji", colours=96)
    return numbers
