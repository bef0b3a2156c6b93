"""The results of objectives.py as a Markdown table and a figure: mean and standard deviation.

python benchmarks/objectives_table.py runs/objectives --figure docs/images/objectives.png
"""

import argparse
import json
from collections import defaultdict
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

MEASURES = {"rate": "bits per latent number", "kid": "KID"}
PREDICTIONS = ("epsilon", "sample", "v_prediction", "score", "flow_prediction")
COLOURS = {"none": "C0", "min_snr": "C1", "p2": "C2", "uncertainty": "C3"}
MARKS = {"uniform": "o", "logit_normal": "^", "stratified": "s"}

Objective = tuple[str, str, str]  # prediction, weighting, distribution


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--figure", required=True, type=Path)
    asked = parser.parse_args()
    found: dict[Objective, list[dict[str, float]]] = defaultdict(list)
    for path in sorted(asked.runs.glob("*.json")):
        prediction, weighting, distribution, _ = path.stem.split("-")
        found[prediction, weighting, distribution].append(json.loads(path.read_text()))
    distributions = [
        distribution for distribution in MARKS if any(key[2] == distribution for key in found)
    ]
    heads = [
        f"{short}, {distribution}" for short in ("bits", "KID") for distribution in distributions
    ]
    print(f"| prediction | weighting | {' | '.join(heads)} |")
    print(f"|---|---|{'---:|' * len(heads)}")
    for prediction, weighting in product(PREDICTIONS, COLOURS):
        cells = []
        for name, distribution in product(MEASURES, distributions):
            runs = found.get((prediction, weighting, distribution))
            cells.append("" if runs is None else "{:.2f} ± {:.2f}".format(*summary(runs, name)))
        print(f"| {prediction} | {weighting} | {' | '.join(cells)} |")
    seconds = [run["seconds"] for runs in found.values() for run in runs]
    print(
        f"\n{len(seconds)} runs of {np.mean(seconds):.0f} seconds, {sum(seconds) / 3600:.1f} hours"
    )
    draw(found, asked.figure)


def summary(runs: list[dict[str, float]], name: str) -> tuple[float, float]:
    """Mean and standard deviation over the seeds."""
    values = [run[name] for run in runs]
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def draw(found: dict[Objective, list[dict[str, float]]], path: Path) -> None:
    """A panel for each measure; a column for each prediction, in it a mark for each objective."""
    objectives = [
        (weighting, distribution)
        for weighting, distribution in product(COLOURS, MARKS)
        if any(key[1:] == (weighting, distribution) for key in found)
    ]
    figure, axes = plt.subplots(2, 1, figsize=(9, 6.8), sharex=True, layout="constrained")
    for axis, (name, label) in zip(axes, MEASURES.items(), strict=True):
        for number, (weighting, distribution) in enumerate(objectives):
            shift = (number - (len(objectives) - 1) / 2) * 0.8 / len(objectives)
            stats = {
                place + shift: summary(found[prediction, weighting, distribution], name)
                for place, prediction in enumerate(PREDICTIONS)
                if (prediction, weighting, distribution) in found
            }
            axis.errorbar(
                list(stats),
                [mean for mean, _ in stats.values()],
                yerr=[deviation for _, deviation in stats.values()],
                fmt=MARKS[distribution],
                color=COLOURS[weighting],
                label=f"{weighting}, {distribution}",
                markersize=5,
                capsize=2,
            )
        axis.set_ylabel(label)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_yscale("log", base=2)
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[1].set_ylim(bottom=0)
    axes[1].set_xticks(range(len(PREDICTIONS)), PREDICTIONS)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
