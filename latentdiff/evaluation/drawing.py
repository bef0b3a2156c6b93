"""Draws prompts for a judge, into an image folder that says what each image should show."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from latentdiff.evaluation.prompts import Prompt
from latentdiff.evaluation.references import References
from latentdiff.images import to_floats, to_pil
from latentdiff.models.vae import VAE
from latentdiff.pipeline import Pipeline

SETTINGS = "drawing.json"  # beside the images: how they were drawn
BATCH_SIZE = 32  # images at once; where a call draws fewer than a hundred, more gain nothing


def draw_prompts(
    pipe: Pipeline,
    prompts: Sequence[Prompt],
    references: References,
    folder: Path,
    *,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
    batch_size: int = BATCH_SIZE,
) -> None:
    """Draw each prompt once and write the images, `metadata.jsonl` and `drawing.json`.

    `options` are those of the pipeline's call; `settings` is what `drawing.json` holds. The rows
    have the prompt as `text`, and `concept`, `style`, `of_split` and `column` as it was chosen.
    Images go through the networks in batches, also on the CPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pipe.batched = True
    lines = []
    with tqdm(total=len(prompts), desc="drawing", unit="image") as bar:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            images = pipe(
                [prompt.text for prompt in batch],
                seed=[prompt.seed for prompt in batch],
                progress=False,
                **options,
            ).images
            for i, (prompt, image) in enumerate(zip(batch, images, strict=True), start):
                image.save(folder / f"{i:05}.png")
                row = {
                    "file_name": f"{i:05}.png",
                    "text": prompt.text,
                    "concept": references.concepts[prompt.wanted],
                    "style": references.styles[prompt.wanted],
                    "of_split": references.splits[prompt.wanted],
                    "column": prompt.column,
                    "seed": prompt.seed,
                }
                lines.append(json.dumps(row, ensure_ascii=False))
            bar.update(len(batch))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = json.dumps(dict(settings), ensure_ascii=False, indent=1)
    (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")


def read_settings(folder: Path) -> dict[str, Any]:
    """Read how the images of a folder were drawn; of other folders nothing is known: {}."""
    path = folder / SETTINGS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def side_of(pipe: Pipeline) -> int:
    """The side in pixels of the images that a model draws."""
    trained = pipe.unet.config.sample_size
    config = pipe.vae.config
    return config.sample_size if trained is None else trained * config.factor


@torch.no_grad()
def through_vae(vae: VAE, references: References, wanted: Sequence[int]) -> Iterator[Image.Image]:
    """Yield reference images as the VAE gives them back: the best that any denoiser could draw."""
    device = next(vae.parameters()).device
    for i in wanted:
        image = to_floats(references.pixels[i : i + 1]).to(device)
        yield to_pil(vae.decode(vae.encode(image).mean)[0])
