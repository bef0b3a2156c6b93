"""The figure of an explanation: steps, words, guidance, schedule, from top to bottom."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from latentdiff.explaining.record import Explanation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
FONTS = ("DejaVu Sans", "WenQuanYi Micro Hei", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei")
"""Those that are installed are used, since prompts are in Chinese too."""
MAX_WORDS = 16
CELL = 1.35  # inches of an image's side
LABEL_WIDTH = 12  # letters of a line of a row's label


def draw_figure(explanation: Explanation) -> "Figure":
    """One figure of all that was recorded; a notebook shows it, `savefig` writes it.

    Needs matplotlib (`pip install latentdiff[train]`).
    """
    from matplotlib.figure import Figure  # here: the import takes half a second

    rows = _rows(explanation)
    columns = len(explanation.shown)
    maps = explanation.words[:MAX_WORDS]
    map_rows = math.ceil((len(maps) + 1) / max(columns, 4))
    width = CELL * max(columns, 4) + 1.3
    heights = [CELL * 1.2 * len(rows), (CELL * 1.3) * map_rows + 0.3, 2.6]
    with _fonts():
        figure = Figure(figsize=(width, sum(heights) + 0.6), layout="constrained")
        title = explanation.request.prompts[0]
        request = explanation.request
        figure.suptitle(
            f'"{title}"\n{request.sampler}, {len(explanation.levels)} steps, '
            f"guidance {request.guidance_scale:g}, seed {request.seeds[0]}",
            fontsize=10,
        )
        parts: Any = figure.subfigures(3, 1, height_ratios=heights)  # three in an array
        steps, words, curves = parts
        _draw_rows(steps, explanation, rows)
        _draw_words(words, explanation, maps, rows=map_rows, columns=max(columns, 4))
        left, right = curves.subplots(1, 2)
        _draw_guidance(left, explanation)
        _draw_schedule(right, explanation)
        figure.canvas.draw()  # while the fonts are chosen
    return figure


def save_figure(explanation: Explanation, path: Path) -> None:
    """Write the figure as a PNG, SVG or PDF. Raises ValueError for another ending."""
    check_path(path)
    figure = draw_figure(explanation)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _fonts():
        figure.savefig(path, dpi=120)


def check_path(path: Path) -> None:
    """Raise ValueError for a file that cannot be a figure."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"out={path} must end in one of {', '.join(SUFFIXES)}")


@contextmanager
def _fonts() -> Iterator[None]:
    from matplotlib import font_manager, rc_context

    installed = set(font_manager.get_font_names())
    families = [name for name in FONTS if name in installed]
    with rc_context({"font.family": families, "svg.fonttype": "path", "svg.hashsalt": ""}):
        yield


def _rows(explanation: Explanation) -> list[tuple[str, Sequence[Image.Image]]]:
    rows = [("noisy, x_t", explanation.noisy)]
    if not explanation.unconditional:
        return [*rows, ("predicted x_0", explanation.predicted)]
    return [
        *rows,
        ("predicted x_0, guided", explanation.predicted),
        ("x_0 with the prompt alone", explanation.conditional),
        ("x_0 without the prompt", explanation.unconditional),
    ]


def _draw_rows(
    figure: Any, explanation: Explanation, rows: Sequence[tuple[str, Sequence[Image.Image]]]
) -> None:
    grid = figure.subplots(len(rows), len(explanation.shown), squeeze=False)
    for (label, images), axes_row in zip(rows, grid, strict=True):
        for axes in axes_row:
            axes.set(xticks=[], yticks=[])
        # Where an interval guides some steps alone, the row without the prompt is shorter.
        for image, axes in zip(images, axes_row, strict=False):
            axes.imshow(image)
        for axes in axes_row[len(images) :]:
            axes.axis("off")
        axes_row[0].set_ylabel("\n".join(_wrapped(label)), rotation=0, ha="right", va="center")
    for step, axes in zip(explanation.shown, grid[0], strict=True):
        timestep = float(explanation.levels.timestep[step])
        axes.set_title(f"step {step + 1}\nt = {timestep:.0f}", fontsize=9)


def _wrapped(label: str) -> list[str]:
    import textwrap

    return textwrap.wrap(label, LABEL_WIDTH)


def _draw_words(
    figure: Any, explanation: Explanation, maps: Sequence[Any], *, rows: int, columns: int
) -> None:
    """The image, then each word's attention over it in grey; the brightest place is 1."""
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    grid[0].imshow(explanation.image)
    grid[0].set_title("the image", fontsize=9)
    grey = np.asarray(explanation.image.convert("L").convert("RGB"))
    extent = (0, explanation.image.width, explanation.image.height, 0)
    for axes, (word, attention) in zip(grid[1:], maps, strict=False):
        axes.imshow(grey, extent=extent)
        axes.imshow(
            attention.numpy(),
            cmap="inferno",
            alpha=0.65,
            extent=extent,
            interpolation="bilinear",
            vmin=0,
        )
        axes.set_title(f"{word}\n{float(attention.mean()):.1%}", fontsize=9)
    left_out = len(explanation.words) - len(maps)
    more = f"; {left_out} more words are not shown" if left_out else ""
    figure.suptitle(
        "What each place looks at: the mean over layers, heads and steps, each map from 0 to its "
        f"largest.\nStart, end and padding: {explanation.rest:.1%}{more}",
        fontsize=9,
    )


def _draw_guidance(axes: Any, explanation: Explanation) -> None:
    steps = np.arange(1, len(explanation.levels) + 1)
    axes.set(xlabel="step", title="what the prompt changes of x_0")
    axes.title.set_fontsize(10)
    if not explanation.unconditional:
        axes.text(0.5, 0.5, "guidance is off", ha="center", transform=axes.transAxes)
        return
    scale = explanation.request.guidance_scale
    difference = explanation.guidance.numpy()
    axes.plot(steps, difference, ".-", label="with − without the prompt")
    axes.plot(steps, abs(scale - 1) * difference, ".-", label="what guidance adds")
    axes.set_ylabel("root mean square")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _draw_schedule(axes: Any, explanation: Explanation) -> None:
    """alpha, sigma and log-SNR = 2 log(alpha / sigma) by t, with the steps of this run."""
    diffusion, levels = explanation.diffusion, explanation.levels
    times = torch.arange(1, diffusion.num_timesteps)
    t, (alpha, sigma) = times.numpy(), (x.numpy() for x in diffusion.alpha_sigma(times))
    axes.plot(t, alpha, color="C0", label="alpha, of the image")
    axes.plot(t, sigma, color="C1", label="sigma, of the noise")
    # The network is told t - 1 by the beta schedules, and t by a flow.
    at = levels.timestep[:-1].numpy() + (0 if diffusion.schedule == "flow" else 1)
    axes.plot(at, levels.alpha[:-1].numpy(), "o", color="C0", markersize=3)
    axes.plot(at, levels.sigma[:-1].numpy(), "o", color="C1", markersize=3)
    axes.set(xlabel="t", ylim=(0, 1.05), title="schedule; a dot for each step")
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3)
    snr = axes.twinx()
    snr.plot(t, 2 * np.log(alpha / sigma), "--", color="0.4", label="log-SNR (right)")
    snr.set_ylabel("2 log(alpha / sigma)")
    lines = [*axes.get_lines()[:2], *snr.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], fontsize=8, loc="upper center")
