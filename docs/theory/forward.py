"""Noise is added: an image on its way, the schedules, and many small steps that are one large."""

from pathlib import Path

import numpy as np
import torch
from plotting import BLUE, COLOURS, GREEN, GREY, RED, image_panel, label, panels, save

from latentdiff.data.shapes import shape_scene
from latentdiff.diffusion import Diffusion
from latentdiff.images import from_pil, to_pil

LINEAR = Diffusion("linear", "epsilon")
SCHEDULES = {
    "linear, T = 1000": LINEAR,
    "linear, T = 2000": Diffusion("linear", "epsilon", num_timesteps=2000),
    "scaled linear": Diffusion("scaled_linear", "epsilon"),
    "cosine": Diffusion("cosine", "epsilon"),
    "linear, zero SNR at T": Diffusion("linear", "v_prediction", rescale_betas_zero_snr=True),
    "flow": Diffusion("flow", "flow_prediction"),
}


def draw(out: Path) -> dict[str, float]:
    """Three figures, and the numbers that the page states."""
    noisy_images(out)
    return schedules(out) | one_step(out)


def noisy_images(out: Path) -> None:
    """The same image and the same noise at six times, on three schedules."""
    times = (0, 100, 250, 500, 750, 1000)
    x0 = from_pil(shape_scene(0, 8, 32).image, (32, 32))[None].repeat(len(times), 1, 1, 1)
    eps = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0)).expand_as(x0)
    names = ("linear, T = 1000", "cosine", "flow")
    figure, axes = panels(len(names), len(times), (7.2, 3.9))
    for row, name in enumerate(names):
        noisy = SCHEDULES[name].add_noise(x0, eps, torch.tensor(times))
        for column, t in enumerate(times):
            panel = axes[row * len(times) + column]
            image_panel(panel)
            panel.imshow(np.asarray(to_pil(noisy[column])), interpolation="nearest")
            if row == 0:
                panel.set_title(f"t = {t}", fontsize=10)
        axes[row * len(times)].set_ylabel(name.removesuffix(", T = 1000"), fontsize=10)
    save(figure, out, "forward_images", colours=64)


def schedules(out: Path) -> dict[str, float]:
    """beta_t, alpha_bar_t and the signal-to-noise ratio of every schedule against t / T."""
    figure, axes = panels(1, 3, (9.6, 3.2))
    for colour, (name, diffusion) in zip(COLOURS, SCHEDULES.items(), strict=True):
        T = diffusion.num_timesteps
        alpha, sigma = diffusion.alpha_sigma(torch.arange(1, T + 1))
        share = np.arange(1, T + 1) / T
        if diffusion.schedule != "flow":
            axes[0].semilogy(share, diffusion.betas, color=colour)
        style = {"color": colour, "linestyle": "--" if "2000" in name else "-"}
        axes[1].plot(share, alpha**2, label=name, **style)
        snr = 20 * (alpha / sigma).log10()
        axes[2].plot(share[snr > -70], snr[snr > -70], **style)
    label(axes[0], r"variance added, $\beta_t$", "t / T", "")
    label(axes[1], r"variance left of the image, $\alpha^2$ ($\bar\alpha_t$)", "t / T", "")
    label(axes[2], r"$\alpha^2 / \sigma^2$ in decibels", "t / T", "")
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=8.5)
    save(figure, out, "schedules")
    ends = {name: diffusion.alphas_cumprod[-1] for name, diffusion in list(SCHEDULES.items())[:4]}
    return {
        "forward.end_1000": float(ends["linear, T = 1000"]),
        "forward.end_2000": float(ends["linear, T = 2000"]),
        "forward.end_scaled": float(ends["scaled linear"]),
        "forward.left_1000": float(ends["linear, T = 1000"].sqrt()),
    }


def one_step(out: Path) -> dict[str, float]:
    """20,000 numbers that begin at -1, 0.3 and 1 go through all T steps, one after the other."""
    starts, count = torch.tensor([-1.0, 0.3, 1.0], dtype=torch.float64), 20_000
    generator = torch.Generator().manual_seed(0)
    x = starts.repeat_interleave(count)[:, None]
    measured, times = [], (1, *range(50, 1001, 50))
    for t in range(1, LINEAR.num_timesteps + 1):
        eps = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        x = LINEAR.forward_step(x, eps, torch.tensor(t))
        if t in times:
            groups = x.reshape(3, count)
            measured.append(torch.stack([groups.mean(1), groups.std(1)]))
    found = torch.stack(measured)  # (times, mean and deviation, starts)
    alpha, sigma = LINEAR.alpha_sigma(torch.tensor(times))
    figure, axes = panels(1, 2, (7.2, 2.8))
    every = torch.arange(1, LINEAR.num_timesteps + 1)
    smooth = LINEAR.alpha_sigma(every)
    for i, colour in enumerate((BLUE, GREEN, RED)):
        axes[0].plot(every, smooth[0] * starts[i], color=colour, linewidth=1)
        axes[0].plot(times, found[:, 0, i], "o", color=colour, markersize=3.5)
        axes[1].plot(times, found[:, 1, i], "o", color=colour, markersize=3.5)
    axes[1].plot(every, smooth[1], color=GREY, linewidth=1)
    label(axes[0], r"mean: $\sqrt{\bar\alpha_t}\,x_0$ (lines), t steps (dots)", "t", "")
    label(axes[1], r"deviation: $\sqrt{1-\bar\alpha_t}$ (line), t steps (dots)", "t", "")
    save(figure, out, "one_step")
    errors = torch.stack([found[:, 0] - alpha[:, None] * starts, found[:, 1] - sigma[:, None]])
    return {"forward.one_step_error": float(errors.abs().max())}
