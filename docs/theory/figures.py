"""Build the figures of docs/theory, and put what they measured into the pages of both languages.

python docs/theory/figures.py                  everything: about a minute on one core
python docs/theory/figures.py bound frechet    two of the experiments
python docs/theory/figures.py --links          none: the lines of the links, after code moved
"""

import argparse
import importlib
import json
from pathlib import Path

import torch
from pages import pages, refreshed
from plotting import IMAGES

# Each is a module with draw(folder) -> numbers.
EXPERIMENTS = (
    "forward",
    "training",
    "why_noise",
    "guidance",
    "ml_and_kl",
    "bound",
    "latent",
    "denoisers",
    "frechet",
)
NUMBERS = Path(__file__).parent / "numbers.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("experiments", nargs="*", metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--links", action="store_true", help="refresh the pages alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the same sums in the same order on every machine
    whole = not (arguments.links or arguments.experiments)
    numbers = {} if whole else measured()
    for name in EXPERIMENTS if whole else arguments.experiments:
        if name not in EXPERIMENTS:
            parser.error(f"{name} is none of {', '.join(EXPERIMENTS)}")
        print(f"{name} ...", flush=True)
        numbers |= importlib.import_module(name).draw(IMAGES)
    if not arguments.links:
        NUMBERS.write_text(json.dumps(dict(sorted(numbers.items())), indent=2) + "\n")
    for page in pages():
        text = refreshed(page, numbers)
        if text != page.read_text(encoding="utf-8"):
            page.write_text(text, encoding="utf-8")
            print(f"wrote {page.name} in {page.parent.relative_to(Path(__file__).parents[1])}")


def measured() -> dict[str, float]:
    """What the last build measured."""
    return json.loads(NUMBERS.read_text()) if NUMBERS.exists() else {}


if __name__ == "__main__":
    main()
