"""loss.png: the loss curve of a run."""

import json
from pathlib import Path

import numpy as np


def plot_log(log: Path, out: Path) -> None:
    """Plot the losses in `log.jsonl` over the steps, raw and smoothed, as a PNG."""
    from matplotlib.figure import Figure  # here: the import takes half a second

    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    records = [record for record in lines if "loss" in record]
    if not records:
        return
    steps = np.array([record["step"] for record in records])
    loss = np.array([record["loss"] for record in records])
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, loss, color="0.75", linewidth=1, label="mean since the last log")
    window = max(1, len(loss) // 25)
    if window > 1:
        smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
        middle = (window - 1) // 2
        axes.plot(
            steps[middle : middle + len(smooth)], smooth, color="C0", label=f"mean of {window} logs"
        )
    val = [(r["step"], r["val_loss"]) for r in lines if "val_loss" in r]
    if val:
        axes.plot(*zip(*val, strict=True), "o-", color="C1", markersize=3, label="validation")
    if (loss > 0).all():
        axes.set_yscale("log")
        for axis_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis_formatter("{x:g}")  # 0.4, where the default writes 4 × 10⁻¹
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_title(log.parent.name)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(out, dpi=120)
