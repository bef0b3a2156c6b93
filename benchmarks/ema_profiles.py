"""How near does a synthesis come to an average that was kept during training?

Takes a run that kept averages of more lengths than two, such as one of

    train/train_unet.py --ema_lengths '[0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25]' --snapshot_every 20

makes each of the other lengths at the run's end from snapshots of 0.05 and 0.1 alone, 5 and more
steps of them, and compares. Writes `ema_profiles.json` and `ema_profiles.png`.

    python benchmarks/ema_profiles.py RUN/ema/unet --out DIR
"""

import argparse
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from latentdiff.formats.weights import load_safetensors
from latentdiff.training.ema import power_exponent
from latentdiff.training.ema_synthesis import Snapshot, find_snapshots, synthesize

KEPT = (0.05, 0.1)
COUNTS = (5, 10, 20, 40)
SHOWN = 0.15


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("snapshots", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", "the average of length")  # that is what is measured
    found = find_snapshots(arguments.snapshots)
    last = max(snapshot.step for snapshot in found)
    kept = [snapshot for snapshot in found if snapshot.length in KEPT]
    true = {s.length: load(s.path) for s in found if s.step == last}
    rows = []
    for length in sorted(true.keys() - set(KEPT)):
        nearest = min(distance(true[stored], true[length]) for stored in KEPT)
        for count in COUNTS:
            some = thinned(kept, count)
            if len(some) < count * len(KEPT):
                continue
            made = synthesize(some, length=length)
            tensors = dict(made.tensors(list(true[length])))
            row = {
                "length": length,
                "steps": count,
                "profile": made.error,
                "weights": distance(tensors, true[length]),
                "nearest_kept": nearest,
                "norm": float(np.linalg.norm(made.weights)),
            }
            rows.append(row)
            print(" ".join(f"{key} {value:.3g}" for key, value in row.items()))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "ema_profiles.json").write_text(json.dumps(rows, indent=2) + "\n")
    plot(kept, rows, arguments.out / "ema_profiles.png")


def thinned(snapshots: Sequence[Snapshot], count: int) -> list[Snapshot]:
    """Those of `count` steps, as far apart as they can be, the last one among them."""
    last = max(snapshot.step for snapshot in snapshots)
    wanted = {round(last * part / count) for part in range(1, count + 1)}
    return [snapshot for snapshot in snapshots if snapshot.step in wanted]


def load(path: Path) -> dict[str, Tensor]:
    return load_safetensors(path, dtype=torch.float32)


def distance(found: dict[str, Tensor], true: dict[str, Tensor]) -> float:
    """Of all weights together, relative to the size of all."""
    apart = sum(float((found[name] - true[name]).square().sum()) for name in true)
    return (apart / sum(float(tensor.square().sum()) for tensor in true.values())) ** 0.5


def plot(kept: Sequence[Snapshot], rows: list[dict[str, float]], path: Path) -> None:
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    profiles(left, thinned(kept, 10))
    for length in dict.fromkeys(row["length"] for row in rows):
        points = [(row["steps"], row["weights"]) for row in rows if row["length"] == length]
        right.loglog(*zip(*points, strict=True), marker="o", markersize=4, label=f"{length:g}")
    counts = sorted({int(row["steps"]) for row in rows})
    right.set_xticks(counts, [str(count) for count in counts])
    right.minorticks_off()
    right.set_xlabel("steps with snapshots of 0.05 and 0.1")
    right.set_ylabel("distance of the weights, relative")
    right.set_title("Synthesised against kept averages")
    right.grid(True, color="0.93")
    right.legend(frameon=False, title="length")
    figure.savefig(path, dpi=85)


def profiles(axes: Axes, kept: Sequence[Snapshot]) -> None:
    last = max(snapshot.step for snapshot in kept)
    times = np.linspace(0, 1, 1501)[1:]

    def profile(length: float, end: float) -> np.ndarray:
        gamma = power_exponent(length)
        return np.where(times <= end, (gamma + 1) / end * (times / end) ** gamma, 0)

    made = synthesize(kept, length=SHOWN)
    for snapshot in kept:
        colour = "tab:green" if snapshot.length == KEPT[0] else "tab:blue"
        axes.plot(times, profile(snapshot.length, snapshot.step / last), colour, lw=0.6, alpha=0.5)
    axes.plot([], [], "tab:green", lw=0.8, label=f"snapshots of {KEPT[0]:g}")
    axes.plot([], [], "tab:blue", lw=0.8, label=f"snapshots of {KEPT[1]:g}")
    axes.plot(times, profile(SHOWN, 1), "black", lw=2.5, alpha=0.35, label=f"{SHOWN:g}")
    parts = zip(made.snapshots, made.weights, strict=True)
    total = sum(weight * profile(s.length, s.step / last) for s, weight in parts)
    axes.plot(times, total, "tab:red", lw=1, label=f"{SHOWN:g}, synthesised")
    axes.set_ylim(-0.5, 20)
    axes.set_xlabel("training time, as a share")
    axes.set_ylabel("weight in the average")
    axes.set_title(f"Profiles; snapshots at {len(kept) // len(KEPT)} steps")
    axes.legend(frameon=False, loc="upper left", fontsize="small")


if __name__ == "__main__":
    main()
