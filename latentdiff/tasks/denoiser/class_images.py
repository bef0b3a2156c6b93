"""The class images of prior preservation: drawn by the model before it is trained, and encoded."""

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from latentdiff.data.buckets import Size
from latentdiff.data.cache import LatentCache
from latentdiff.data.cache_captions import OF_IMAGES
from latentdiff.data.cache_writer import write_cache
from latentdiff.data.config import DataConfig
from latentdiff.data.joined import JoinedLatents
from latentdiff.data.opening import open_images
from latentdiff.formats.weights import load_json, replacing, save_json
from latentdiff.loading import Components, components_fingerprint
from latentdiff.models.vae import VAE
from latentdiff.pipeline import Pipeline
from latentdiff.tasks.denoiser.config import TrainUNet
from latentdiff.training.run import Run

FOLDER, CACHE = "class_images", "class_cache"
MADE_OF, METADATA = "made_of.json", "metadata.jsonl"
OF_CAPTIONS = (
    *("caption_columns", "caption_templates", "caption_weights", "allow_empty_caption"),
    "exclude",
)
DRAWING = {"steps": 50, "guidance_scale": 7.5}
"""diffusers' script draws with its pipeline's defaults, which are these."""
AT_ONCE = 4


def join_class_images(
    config: TrainUNet,
    run: Run,
    init: Components | None,
    *,
    cache: LatentCache,
    val: np.ndarray,
    vae: VAE,
) -> JoinedLatents | None:
    """The cache with that of the class images, which are drawn first; None if none are asked for.

    `val` (n,) are the indices of the validation split, which has no class images. Raises ValueError
    for class images that cannot be encoded, or were drawn by another model or for another prompt.
    """
    prior = config.prior
    if not prior.is_on:
        return None
    if "options" not in cache.header:
        raise ValueError(
            f"cache={cache.folder} is of an older version and does not tell how its images were "
            "cropped, as class images must be: run latentdiff.scripts.cache_latents anew"
        )
    folder = prior.class_data
    if folder is None:
        assert init is not None, "class_prompt needs init"
        assert prior.class_prompt is not None
        folder = config.loop.output_dir / FOLDER
        trained_on = np.delete(cache.buckets, val)
        sizes = [
            cache.sizes[trained_on[i % len(trained_on)]] for i in range(prior.num_class_images)
        ]
        draw_class_images(
            folder, init, run, prompt=prior.class_prompt, sizes=sizes, seed=config.loop.seed
        )
    kept = OF_IMAGES if prior.class_prompt else (*OF_IMAGES, *OF_CAPTIONS)
    options: dict[str, Any] = {name: cache.header["options"][name] for name in kept}
    if prior.class_prompt:
        options["instance_prompts"] = (prior.class_prompt,)
    data = DataConfig(data=str(folder), num_workers=config.data.num_workers, **options)
    dataset = run.processes.main_first(lambda: open_images(data))
    said = write_cache(
        config.loop.output_dir / CACHE,
        dataset,
        vae,
        batch_size=64,
        crop_flip=cache.crop_flip,
        rank=run.processes.rank,
        world_size=run.processes.count,
        on_all=run.processes.on_all,
    )
    if said:
        run.accelerator.print(said)
    classes = LatentCache(config.loop.output_dir / CACHE)
    return JoinedLatents(cache, classes, val=val, class_weight=prior.prior_loss_weight)


def draw_class_images(
    folder: Path, init: Components, run: Run, *, prompt: str, sizes: Sequence[Size], seed: int
) -> None:
    """Draw image i of the prompt with size i and seed `seed` + i, unless it is there already.

    Each process draws a share; files that are there are kept. `metadata.jsonl` is written last.
    Raises ValueError where the folder has images of another model, prompt, number, size or seed.
    """
    run.processes.on_main(lambda: _note(folder, init, prompt=prompt, sizes=sizes, seed=seed))
    names = [f"{number:05d}.png" for number in range(len(sizes))]
    groups = list(_groups(sizes))[run.processes.rank :: run.processes.count]
    missing = [one for one in groups if not all((folder / names[i]).is_file() for i in one)]

    def draw() -> None:
        if not missing:
            return
        pipeline = Pipeline(**init._asdict()).to(run.device)
        bar = tqdm(
            missing, desc="drawing class images", unit="batch", disable=run.processes.rank > 0
        )
        for numbers in bar:
            width, height = sizes[numbers[0]]
            seeds = [seed + number for number in numbers]
            canvas: dict[str, Any] = {"width": width, "height": height}
            if pipeline.inpaints:  # it draws where everything is masked
                canvas["image"] = Image.new("RGB", (width, height))
                canvas["mask_image"] = Image.new("L", (width, height), 255)
            with run.accelerator.autocast():
                output = pipeline(
                    [prompt] * len(numbers),
                    seed=seeds,
                    progress=False,
                    **canvas,
                    **DRAWING,
                )
            for number, image in zip(numbers, output.images, strict=True):
                if not (folder / names[number]).is_file():
                    with replacing(folder / names[number]) as temporary:
                        image.save(temporary, "png")

    run.processes.on_all(draw)
    run.processes.on_main(lambda: _finish(folder, names, prompt, seed))


def _note(folder: Path, init: Components, *, prompt: str, sizes: Sequence[Size], seed: int) -> None:
    """Note what the images are drawn of. Raises ValueError if others are there."""
    noted = folder / MADE_OF
    made_of = {
        "model": components_fingerprint(init),
        "prompt": prompt,
        "sizes": [list(size) for size in sizes],
        "seed": seed,
        **DRAWING,
    }
    if not noted.is_file():
        save_json(made_of, noted)
    before = load_json(noted)
    if changed := [name for name in made_of if before.get(name) != made_of[name]]:
        raise ValueError(
            f"{folder} has class images of another {' and '.join(changed)}; delete it, or keep its "
            "images elsewhere and name them as class_data"
        )


def _finish(folder: Path, names: Sequence[str], prompt: str, seed: int) -> None:
    if (folder / METADATA).is_file():  # its time is part of what identifies the data
        return
    rows = [
        {"file_name": name, "text": prompt, "seed": seed + number, **DRAWING}
        for number, name in enumerate(names)
    ]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    with replacing(folder / METADATA) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def _groups(sizes: Sequence[Size]) -> Iterator[list[int]]:
    """The numbers of up to AT_ONCE images of one size each, whichever of them are there: what a
    batch draws on an accelerator depends on all of it, by rounding."""
    order = sorted(range(len(sizes)), key=lambda number: sizes[number])
    for _, group in groupby(order, key=lambda number: sizes[number]):
        numbers = list(group)
        yield from (numbers[i : i + AT_ONCE] for i in range(0, len(numbers), AT_ONCE))
