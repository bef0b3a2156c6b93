"""README.md of a trained model: its card, with the front matter that the Hugging Face Hub reads.

What stands in it comes from the run folder; paths of this machine do not.
"""

import json
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from latentdiff.formats.diffusers import LORA
from latentdiff.formats.model_card import PREVIEW, front_matter, public_name, usage
from latentdiff.formats.weights import load_json, replacing
from latentdiff.formats.yaml_text import parse_yaml
from latentdiff.training.logging.report import DATA

LARGEST_PREVIEW = 500_000  # bytes


def write_card(folder: Path) -> None:
    """Write `model/README.md` of a run folder, and the newest preview beside it, if it is small."""
    model, log = folder / "model", folder / "log.jsonl"
    if not model.is_dir():
        return
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    records = [json.loads(line) for line in lines]
    settings = parse_yaml((folder / "config.yaml").read_text(encoding="utf-8"))
    data = load_json(folder / DATA) if (folder / DATA).is_file() else {}
    previews = sorted((folder / "previews").glob("step-*.png"))
    shown = bool(previews) and previews[-1].stat().st_size <= LARGEST_PREVIEW
    if shown:
        with replacing(model / PREVIEW) as temporary:
            shutil.copyfile(previews[-1], temporary)
    with replacing(model / "README.md") as temporary:
        text = _card(folder.resolve().name, model, settings, data, records, shown=shown)
        temporary.write_text(text, encoding="utf-8")


def _card(
    name: str,
    model: Path,
    settings: Mapping[str, Any],
    data: Mapping[str, Any],
    records: list[dict[str, Any]],
    *,
    shown: bool,
) -> str:
    kind = _kind(model, settings)
    base = public_name(settings.get("init") or settings.get("teacher"))
    matter = front_matter(kind, license=settings.get("license", "unknown"), base_model=base)
    preview = f"![what it made in training]({PREVIEW})\n\n" if shown else ""
    rows = "".join(f"| {what} | {value} |\n" for what, value in _facts(settings, data, records))
    return (
        f"{matter}# {name}\n\n{_WHAT[kind]}, trained with latentdiff and "
        f"saved on {datetime.now(UTC):%Y-%m-%d}.\n\n{preview}## Training\n\n| | |\n|---|---|\n"
        f"{rows}\nNothing was measured but these losses: look at what it makes before you use it. "
        "It knows what its training data shows, and its licence must suit theirs.\n\n"
        f"## Use\n\n{usage(kind, base if kind.endswith('lora') else None)}"
    )


_WHAT = {
    "pipeline": "A text-to-image latent diffusion model",
    "student": "A text-to-image latent diffusion model that draws in few steps",
    "lora": "A LoRA of a text-to-image model",
    "student_lora": "A LoRA with which a text-to-image model draws in few steps",
    "clip": "A CLIP: text and image tower and tokenizer",
    "vae": "The autoencoder of a latent diffusion model",
}


def _kind(model: Path, settings: Mapping[str, Any]) -> str:
    if (model / "model_index.json").is_file():
        return "student" if "teacher" in settings else "pipeline"
    if (model / LORA).is_file():
        return "student_lora" if "teacher" in settings else "lora"
    return "clip" if (model / "clip").is_dir() else "vae"


def _facts(
    settings: Mapping[str, Any], data: Mapping[str, Any], records: list[dict[str, Any]]
) -> list[tuple[str, str]]:
    """What the run folder says, as rows of a table; what it does not say is left out."""
    steps = records[-1]["step"] if records else 0
    batch = settings.get("batch_size", 0)
    facts = list[tuple[str, str]]()
    if "samples" in data:
        held = data.get("num_val", 0)
        facts.append(("images", f"{data['samples']:,}" + (f", {held} held out" if held else "")))
    if name := public_name(settings.get("data")):
        facts.append(("data", name))
    if sizes := data.get("sizes"):
        facts.append(("sizes", ", ".join(sizes)))
    facts += [
        ("steps", f"{steps:,} of {batch} images"),
        ("images seen", f"{steps * batch:,}"),
        ("optimizer", str(settings.get("optimizer"))),
        ("learning rate", str(settings.get("learning_rate"))),
        ("seed", str(settings.get("seed"))),
    ]
    if drawn_in := settings.get("distilled_steps"):
        facts.append(("draws in", f"{drawn_in} steps, guided by {settings['guidance_scale']:g}"))
    objective = settings.get("diffusion")
    if isinstance(objective, Mapping):
        facts.append(("objective", f"{objective['schedule']}, {objective['prediction']}"))
    for name, what in (("loss", "loss, last logged"), ("val_loss", "loss on held-out images")):
        if values := [record[name] for record in records if name in record]:
            facts.append((what, f"{values[-1]:.4g}"))
    return facts
