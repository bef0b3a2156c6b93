"""How a denoiser is told the time: sinusoids, and how alike those of two times are."""

from pathlib import Path

import torch
from plotting import COLOURS, label, panels, save

from latentdiff.models.layers import timestep_embedding

DIM = 64


def draw(out: Path) -> dict[str, float]:
    """One figure."""
    embedding = timestep_embedding(torch.arange(1000), DIM)
    figure, (whole, alike) = panels(1, 2, (7.2, 2.9), width_ratios=(3, 2))
    whole.grid(False)
    whole.imshow(embedding.T.numpy(), aspect="auto", cmap="RdBu", vmin=-1, vmax=1, origin="lower")
    label(whole, f"time embedding, {DIM} numbers (cos, then sin)", "timestep", "number")
    for colour, timestep in zip(COLOURS, (10, 300, 700), strict=False):
        cosine = embedding @ embedding[timestep] / embedding[timestep].square().sum()
        alike.plot(cosine, color=colour, label=f"to {timestep}")
    alike.legend(frameon=False, fontsize=8.5)
    label(alike, "cosine of two times' embeddings", "timestep", "")
    save(figure, out, "time_embedding", colours=32)
    return {}
