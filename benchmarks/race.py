"""Which recipe draws best after the same time? Each is trained as long on the same machine.

A recipe is `BASE` at a batch of 64 with other options. For each recipe and seed

- a short run measures its images/s, from which follow the steps that fit into `--seconds`: all
  recipes' first, while nothing else may run on the machine;
- `train_unet.py` trains so many steps, the last 40 % of them with a falling learning rate;
- `latentdiff eval judge` draws the same prompts, 25 steps each, and `latentdiff eval distance`
  compares these drawings with the true images, in features that no recipe was trained with.

Every run stays in OUT, and the same command goes on. `race.json` has the figures; they are printed
as a table. On a machine of two cores, two races of one thread each are as good as one of two:

    python benchmarks/race.py --data data/drawings --out runs/race --seconds 600
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
BASE = ROOT / "configs/drawings/unet.yaml"
# BASE is for a GPU. Compiled blocks cost 7 % on the processor that this was measured on.
SMALL = {"batch_size": 64, "muon_learning_rate": 6e-3, "warmup_steps": 100, "compile": False}
RECIPES: dict[str, dict[str, Any]] = {
    "base": {},
    "adamw": {"optimizer": "adamw", "learning_rate": 1e-3},
    "muon 1.2e-2": {"muon_learning_rate": 1.2e-2},
    "uniform times": {"timestep_distribution": "uniform"},
    "no pooled text": {"unet": {"addition_embed_type": None, "addition_embed_type_num_heads": 64}},
    "min-SNR": {"weighting": "min_snr"},
    "learned weights": {"weighting": "uncertainty"},
    "batch 128": {"batch_size": 128},
    "batch 32": {"batch_size": 32},
    "wider": {"unet": {"block_out_channels": [160, 320], "attention_head_dim": [2, 5]}},
    "deeper": {
        "unet": {
            "block_out_channels": [96, 192, 256],
            "attention_head_dim": [2, 3, 4],
            "down_block_types": ["CrossAttnDownBlock2D"] * 3,
            "up_block_types": ["CrossAttnUpBlock2D"] * 3,
        }
    },
    "DiT": {
        "dit": {
            "patch_size": 1,
            "num_layers": 8,
            "num_attention_heads": 5,
            "attention_head_dim": 64,
        }
    },
}
RATE_STEPS, COOLDOWN = 60, 0.4
SIZE = ("--image_size", "64")
PROMPTS = (("{text}, {in_style}", 150), ("{text_zh}，{in_style_zh}", 50))


def main() -> None:
    arguments = parse()
    names = arguments.recipes or list(RECIPES)
    figures: dict[str, Any] = {}
    for name in names:
        measured_rate(RECIPES[name], folder_of(arguments.out, name, seed=0))
    for name in names:
        for seed in range(arguments.seeds):
            folder = folder_of(arguments.out, name, seed)
            if not (folder / "figures.json").exists():
                rate = measured_rate(RECIPES[name], folder_of(arguments.out, name, seed=0))
                race(arguments, RECIPES[name], folder, rate=rate, seed=seed)
            figures[f"{name}, seed {seed}"] = json.loads((folder / "figures.json").read_text())
            (arguments.out / "race.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(table(figures))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="the image folder of the drawings")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600, help="of training, for each recipe")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, metavar="NAME")
    parser.add_argument("--guidance_scale", type=float, default=4.0)
    return parser.parse_args()


def folder_of(out: Path, name: str, seed: int) -> Path:
    """Where a recipe's runs with a seed are."""
    return out / f"{name.replace(' ', '-')}-{seed}"


def options_of(recipe: dict[str, Any]) -> dict[str, Any]:
    """What `train_unet.py` is configured by."""
    options = merged(yaml.safe_load(BASE.read_text()) | SMALL, recipe)
    return options | {"validate_every": 10**9, "preview_every": 10**9, "checkpoint_every": 10**9}


def measured_rate(recipe: dict[str, Any], folder: Path) -> float:
    """Images/s of a short run, which is made once."""
    log = folder / "rate/log.jsonl"
    if not log.exists() or records(log)[-1]["step"] < RATE_STEPS:
        train(options_of(recipe) | {"max_steps": RATE_STEPS, "cooldown_steps": 0}, folder / "rate")
    return records(log)[-1]["samples_per_second"]


def race(
    arguments: argparse.Namespace, recipe: dict[str, Any], folder: Path, *, rate: float, seed: int
) -> None:
    """Train a recipe for the time, judge it and write `figures.json`."""
    options = options_of(recipe) | {"seed": seed}
    steps = round(arguments.seconds * rate / options["batch_size"])
    start = time.perf_counter()
    if not (folder / "wall").exists():  # of a run in one piece; one that was stopped is begun anew
        shutil.rmtree(folder / "run", ignore_errors=True)
        cooldown = round(COOLDOWN * steps)
        train(options | {"max_steps": steps, "cooldown_steps": cooldown}, folder / "run")
        (folder / "wall").write_text(str(time.perf_counter() - start))
    drawings, distances = folder / "judge", folder / "distance.json"
    prompts = [word for template, count in PROMPTS for word in ("--prompts", template, str(count))]
    references = ("--reference_features", arguments.out / "references.safetensors")
    drawing = ("--steps", "25", "--guidance_scale", arguments.guidance_scale, "--seed", "0")
    drawing += ("--dtype", "bfloat16")
    model = folder / "run/model"
    shutil.rmtree(drawings, ignore_errors=True)
    latentdiff(
        "eval", "judge", model, arguments.data, "--out", drawings, *references, *prompts, *drawing
    )
    true = arguments.out / "true"
    if not true.exists():
        copy_true(drawings / "images", arguments.data, true)
    latentdiff("eval", "distance", drawings / "images", true, *SIZE, "--out", distances)
    results = [json.loads(path.read_text()) for path in (drawings / "result.json", distances)]
    figures = {"steps": steps, "images_per_second": rate}
    figures["wall"] = float((folder / "wall").read_text())
    figures["figures"] = results[0]["figures"] | results[1]["figures"]
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


def copy_true(drawings: Path, data: Path, out: Path) -> None:
    """Copy the true image of each drawing, which are the same for every recipe."""
    rows = {
        (row["concept"], row["style"]): split / row["file_name"]
        for split in (data / "train", data / "test")
        for row in records(split / "metadata.jsonl")
    }
    staging = out.with_suffix(".part")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for i, row in enumerate(records(drawings / "metadata.jsonl")):
        shutil.copy(rows[row["concept"], row["style"]], staging / f"{i:05}.png")
    staging.rename(out)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, which may change single keys of an inner mapping.

    A DiT stands in the UNet's place.
    """
    if "dit" in changes:
        base = {name: value for name, value in base.items() if name != "unet"}
    result = dict(base)
    for name, value in changes.items():
        inner = result.get(name)
        if isinstance(value, dict) and isinstance(inner, dict):
            value = merged(inner, value)
        result[name] = value
    return result


def train(options: dict[str, Any], folder: Path) -> None:
    """Train a UNet, going on from what is in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(options | {"output_dir": str(folder)}, allow_unicode=True))
    subprocess.run([sys.executable, ROOT / "train/train_unet.py", "--config", config], check=True)


def latentdiff(*arguments: Any) -> None:
    """Run the command with these arguments."""
    subprocess.run([sys.executable, "-m", "latentdiff.cli", *map(str, arguments)], check=True)


def records(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of one JSON object a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(figures: dict[str, Any]) -> str:
    """A Markdown table of the recipes, the best first."""
    columns = ("concept, train", "concept, test", "style", "kernel", "recall")
    lines = ["| recipe | images/s | steps | " + " | ".join(columns) + " |",
             "|---|---:|---:|" + "---:|" * len(columns)]  # fmt: skip
    ordered = sorted(figures.items(), key=lambda item: item[1]["figures"]["kernel"]["value"])
    for name, one in ordered:
        cells = [
            f"{f['value']:.3f} ({f['low']:.3f} to {f['high']:.3f})"
            for f in (one["figures"][column] for column in columns)
        ]
        row = [name, f"{one['images_per_second']:.0f}", str(one["steps"]), *cells]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
