"""The work of `latentdiff generate`: draw prompts, or an earlier image again, into a folder."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from latentdiff import loading
from latentdiff.cli.loras import file_and_scale
from latentdiff.cli.reading import say_reading
from latentdiff.data.decode import Decoding, decode
from latentdiff.device import find_device
from latentdiff.engines.choice import check_engine
from latentdiff.formats.diffusers import EMBEDDED_MODELS, find_model
from latentdiff.formats.png import LoraRecord, Record, save_png
from latentdiff.images import MASK_WITH_TRANSPARENCY, image_grid
from latentdiff.models.precision import SLOW_BF16, computes_bf16
from latentdiff.pipeline import Pipeline
from latentdiff.record import (
    file_record,
    image_parameters,
    image_record,
    read_record,
    same_file,
    warn_of_changes,
)
from latentdiff.request import Request
from latentdiff.tiles import TILE, likely_exact

AT_ONCE = 16  # images that an accelerator draws together


def draw(arguments: argparse.Namespace) -> None:
    """Draw, and write the images with how they were drawn; see `latentdiff generate --help`."""
    _make_folder(arguments.out)  # first, as it may fail
    user_options = vars(arguments)
    again, record = (
        ({}, None) if arguments.again is None else read_record(arguments.again, user_options)
    )
    model = user_options.get("model") or _recorded_model(record, arguments.again)
    dtype = user_options.get("dtype", record["dtype"] if record else "float32")
    engine = user_options.get("engine", (record or {}).get("engine", "torch"))
    device = find_device(arguments.device, engine)
    loras = _loras(user_options.get("lora"), record)
    images = _images(user_options, record)
    # Checked and read before a model is loaded: what is drawn must not be lost to a file that is
    # deleted meanwhile.
    options = _options(user_options, again, images)
    request = Request(**options)
    files = {name: file_record(path) for name, path in images.items()}

    if arguments.again is not None:
        say_reading(model, dtype)
    pipeline = load_pipeline(
        model,
        tokenizer=arguments.tokenizer,
        dtype=dtype,
        device=device,
        variant=arguments.variant,
        revision=arguments.revision,
        engine=engine,
    )
    pipeline.batched = arguments.batched
    pipeline.vae.tiling = user_options.get("vae_tiling", (record or {}).get("vae_tiling"))
    records = record is not None or not arguments.no_metadata
    digest = pipeline.fingerprint() if records else ""
    if record is not None:
        warn_of_changes(record, pipeline, digest)
    for lora in loras:  # peft's files are all named adapter_model
        pipeline.loras.load(lora["name"], name=lora["name"], scale=lora["scale"])
    if pipeline.diffusion.distilled_steps is not None:  # which has defaults of its own
        request = Request.of(pipeline.diffusion, **options)
    if arguments.compile:
        _compile(pipeline, options)
    paths = _free_paths(arguments.out, request.seeds)
    drawn: list[Image.Image] = []
    for i, image in enumerate(_drawn(pipeline, request, arguments.batch_size)):
        drawn.append(image)
        path = paths[i]
        if arguments.no_metadata:
            save_png(image, path)
        else:
            parameters = image_parameters(pipeline, request, i, image.size, model=model)
            full_record = image_record(
                pipeline, request, i, model=model, model_sha256=digest, files=files, loras=loras
            )
            save_png(image, path, parameters=parameters, record=full_record)
        print(f"{path}  {request.prompts[i]}", flush=True)
    if arguments.grid or (arguments.grid is None and len(paths) > 1):
        _save_grid(drawn, request.prompts, paths, arguments.out)


def _save_grid(
    images: Sequence[Image.Image], prompts: Sequence[str], paths: Sequence[Path], folder: Path
) -> None:
    """Write all images with their prompts to grid.png, or beside the grid of earlier images."""
    path = folder / "grid.png"
    if path.exists():
        path = folder / f"grid-{paths[0].name.split('-')[0]}.png"
    image_grid(images, prompts, plain=[path.name for path in paths]).save(path)
    print(path)


def _compile(pipeline: Pipeline, options: dict[str, Any]) -> None:
    """Compile for images of this size; what else the prompts ask for is, when they are drawn."""
    names = ("height", "width", "guidance_scale", "image", "mask_image")
    first = {name: options[name] for name in names if name in options}
    if "image" in first:
        first["strength"] = 1.0  # of the one step that is drawn
    said = "compiling, a minute or more, or half of that where it was compiled before"
    print(f"latentdiff: {said}", file=sys.stderr, flush=True)
    pipeline.compile(**first)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: {folder} cannot be a folder: {error.strerror}") from error


def _drawn(pipeline: Pipeline, request: Request, batch_size: int | None) -> Iterator[Image.Image]:
    """Yield the images as they are drawn, so that an interrupted call keeps those that are.

    `batch_size` of them are drawn together. Without one, a CPU gets a tile where it computes tiles
    together, and an accelerator AT_ONCE, or, where its memory is too small, half as many and so on.
    """
    count = len(request.seeds)
    at_once = batch_size or _at_once(pipeline, request)
    start = 0
    while start < count:
        part = request if count <= at_once else request.part(start, start + at_once)
        try:
            images = pipeline.draw(part).images
        except torch.OutOfMemoryError:
            if batch_size is not None or at_once == 1:
                raise
            at_once = min(at_once, count) // 2 or 1
            print(f"latentdiff: too little memory; drawing {at_once} at once", file=sys.stderr)
            continue
        except KeyboardInterrupt as interrupt:
            kept = f"; the first {start} of {count} images are kept" if start else ""
            raise KeyboardInterrupt(f"nothing else is written{kept}") from interrupt
        yield from images
        start += len(images)


def _at_once(pipeline: Pipeline, request: Request) -> int:
    """The number of images that are drawn together if nobody says how many."""
    if pipeline.batching == "all":
        return AT_ONCE
    exact = pipeline.batching == "exact" and likely_exact(pipeline.dtype, request.guidance_scale)
    return TILE if exact else 1


def _recorded_model(record: Record | None, again: Path | None) -> str:
    """The model of the drawing to repeat, if it is on this machine; else the embedded one.

    An image may come from anybody, and must not cause a download from the Hub. One without a record
    of ours was hardly drawn with the embedded model.
    """
    if record is None:
        if again is not None:
            raise ValueError(
                f"{again} does not say which file its model is: name the one to draw it with as "
                "--model"
            )
        return "emoji"
    model = record["model"]
    if model not in EMBEDDED_MODELS and not Path(model).exists():
        raise ValueError(
            f"the image was drawn with model {model!r}, which is not a file or folder here; "
            "name the one to draw with as --model"
        )
    return model


def _options(
    user_options: dict[str, Any], again: dict[str, Any], images: dict[str, Path]
) -> dict[str, Any]:
    """The options of the request that are given: the user's, and those of the drawing to repeat."""
    names = [field.name for field in fields(Request) if field.init]
    options = again | {name: value for name, value in user_options.items() if name in names}
    if not user_options.get("prompt"):
        options["prompt"] = again.get("prompt", "")
    if not options["prompt"] and not again:
        raise ValueError('nothing to draw; give a PROMPT such as "a cat", or --from an image')
    return options | {name: _opened(name, path) for name, path in images.items()}


def _images(user_options: dict[str, Any], record: Record | None) -> dict[str, Path]:
    """The init image and its mask: the user's, or those of the drawing to repeat."""
    images = {name: user_options[name] for name in ("image", "mask_image") if name in user_options}
    for name in ("image", "mask_image"):
        recorded = None if record is None else record.get(name)
        if recorded is not None and name not in images:
            images[name] = same_file(recorded, f"--{name}")
    return images


def _opened(option: str, path: Path) -> Image.Image:
    """An image as training would read it."""
    if not path.is_file():
        raise ValueError(f"--{option}: {path} is not a file")
    data = path.read_bytes()
    try:
        image = decode(data, Decoding()).image
        if option == "mask_image" and decode(data, Decoding(background="black")).image != image:
            raise ValueError(MASK_WITH_TRANSPARENCY)
    except ValueError as error:
        raise ValueError(f"--{option}: {path}: {error}") from error
    return image


def _loras(arguments: Sequence[str] | None, record: Record | None) -> list[LoraRecord]:
    """The user's LoRAs, each FILE or FILE:SCALE, or those of the drawing to repeat."""
    if arguments is None:
        loras = record["loras"] if record else []
        for lora in loras:
            same_file(lora, "--lora")
        return loras
    loras = []
    for text in arguments:
        path, scale = file_and_scale(text)
        loras.append({**file_record(path), "scale": scale})
    return loras


def load_pipeline(
    model: str,
    *,
    dtype: str,
    device: torch.device,
    variant: str | None = None,
    revision: str | None = None,
    engine: str = "torch",
    tokenizer: str | None = None,
) -> Pipeline:
    """Load a model by its name, folder, file or hub id, without transformers' bars and advice."""
    precision = "auto" if dtype == "auto" else getattr(torch, dtype)
    check_engine(engine, dtype=precision, device=device)  # before anything is fetched
    source = Path(model)
    if not source.is_file():
        source = find_model(model, variant=variant, revision=revision)  # shows a download's bar
        revision = None  # the folder has it
    _quiet_transformers()
    if precision == torch.bfloat16 and engine == "torch" and not computes_bf16(device):
        print(
            f"latentdiff: {SLOW_BF16.format(f'--dtype {dtype}', '--dtype float32')}",
            file=sys.stderr,
        )
    if tokenizer is not None:
        if not source.is_file():
            raise ValueError(f"--tokenizer is for a single file; {model} has a tokenizer")
        loading.check_single_file(model, revision=revision, variant=variant)
        return Pipeline.from_single_file(
            source, tokenizer=tokenizer, dtype=precision, device=device, engine=engine
        )
    return Pipeline.from_pretrained(
        source,
        revision=revision,
        variant=variant,
        dtype=precision,
        device=device,
        engine=engine,
    )


def _quiet_transformers() -> None:
    """Hide transformers' progress bars and advice; must run before it reads weights."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _free_paths(folder: Path, seeds: Sequence[int]) -> list[Path]:
    """<index>-<seed>.png, counted on from the images that the folder holds already.

    The prompt is no part of a name: it may hold any character, and too many of them.
    """
    taken = [path.name.split("-")[0] for path in folder.glob("*-*.png")]
    first = 1 + max((int(index) for index in taken if index.isdecimal()), default=-1)
    return [folder / f"{first + i:04d}-{seed}.png" for i, seed in enumerate(seeds)]
