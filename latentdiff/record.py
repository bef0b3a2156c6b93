"""The record of how an image was drawn: what `generate` and `web` write into PNGs and read."""

import hashlib
import warnings
from collections.abc import Container, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import latentdiff
from latentdiff.formats.a1111 import (
    format_parameters,
    is_ours,
    parse_parameters,
    pipeline_options,
    without,
)
from latentdiff.formats.png import FileRecord, LoraRecord, Record, read_png
from latentdiff.models.webui_prompts import from_webui
from latentdiff.pipeline import Pipeline
from latentdiff.request import Request

PACKAGES = ("torch", "transformers")  # a release of which may change an image


def file_record(path: Path) -> FileRecord:
    """A file's path, as the user wrote it, and its SHA-256."""
    with path.open("rb") as file:
        return {"name": str(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def image_record(
    pipeline: Pipeline,
    request: Request,
    i: int,
    *,
    model: str,
    model_sha256: str,
    files: dict[str, FileRecord],
    loras: Sequence[LoraRecord],
) -> Record:
    """Everything that decides the pixels of image i; `files` are `image` and `mask_image`."""
    record: dict[str, Any] = {
        "request": request.record(i),
        "model": model,
        "model_sha256": model_sha256,
        "dtype": str(pipeline.precision).removeprefix("torch."),
        "device": pipeline.device.type,
        "engine": pipeline.engine,
        "compiled": pipeline.compiled is not None,
        "packages": _packages(pipeline.engine),
        "loras": list(loras),
    }
    if pipeline.batched and pipeline.device.type == "cpu" and len(request.seeds) > 1:
        record["batched"] = True
    if pipeline.vae.tiling is not None:
        record["vae_tiling"] = pipeline.vae.tiling
    return {**record, **files}  # pyright: ignore[reportReturnType]


def image_parameters(
    pipeline: Pipeline, request: Request, i: int, size: tuple[int, int], *, model: str
) -> str:
    """AUTOMATIC1111's line for image i, which other programs read; `size` is (width, height)."""
    varied = request.variation_strength > 0
    spacing = request.level_spacing
    if spacing is None and pipeline.diffusion.schedule != "flow":  # there each sampler has its own
        spacing = pipeline.diffusion.timestep_spacing
    return format_parameters(
        prompt=request.prompts[i],
        negative_prompt=request.negative_prompts[i],
        steps=request.steps,
        sampler=request.sampler,
        level_spacing=spacing,
        guidance_scale=request.guidance_scale,
        seed=request.seeds[i],
        width=size[0],
        height=size[1],
        version=latentdiff.__version__,
        model=Path(model).name.removesuffix(".safetensors"),
        strength=request.strength if request.images else None,
        variation_seed=request.variation_seeds[i] if varied else None,
        variation_strength=request.variation_strength,
    )


def read_record(path: Path, given: Container[str]) -> tuple[dict[str, Any], Record | None]:
    """Read the options of the image at `path`, and the full record if we drew it.

    Settings of another program that have no counterpart here are named in a warning; those that
    the options `given` replace are not read. Raises ValueError for a file without metadata, or
    with none that can be read.
    """
    png = read_png(path)
    if png.record is not None:
        return dict(png.record["request"]), png.record
    assert png.parameters is not None
    settings = without(parse_parameters(png.parameters), given)
    options, unused = pipeline_options(settings)
    if not is_ours(settings):
        for name in ("prompt", "negative_prompt"):
            options[name], lost = from_webui(options[name])
            unused += lost
    if "strength" in options and "image" not in given:
        strength = options.pop("strength")
        unused.append(f"Denoising strength: {strength:g} (of an image to start from: give --image)")
    if unused:
        warnings.warn(f"{path}: without a meaning here: {', '.join(unused)}", stacklevel=2)
    return options, None


def same_file(record: FileRecord, option: str) -> Path:
    """The file that a record names; ValueError if it is missing or has changed."""
    path = Path(record["name"])
    if not path.is_file():
        raise ValueError(f"{option}: {path}, which the image was drawn from, is not there")
    if file_record(path)["sha256"] != record["sha256"]:
        raise ValueError(f"{option}: {path} is not the file that the image was drawn from")
    return path


def warn_of_changes(record: Record, pipeline: Pipeline, model_sha256: str) -> None:
    """Warn, in one sentence, if this is not what the record's image was drawn with."""
    dtype = str(pipeline.precision).removeprefix("torch.")
    engine = record.get("engine", "torch")
    current: dict[str, Any] = {"dtype": dtype, "device": pipeline.device.type}
    recorded: dict[str, Any] = {"dtype": record["dtype"], "device": record["device"]}
    same = engine if engine == pipeline.engine else "torch"
    current |= {"engine": pipeline.engine, **_packages(same)}
    recorded |= {"engine": engine, **record["packages"]}
    if record.get("compiled", False) != (pipeline.compiled is not None):
        current["compiled"] = pipeline.compiled is not None
        recorded["compiled"] = not current["compiled"]
    if record.get("batched"):
        current["batched"], recorded["batched"] = False, True  # whatever was beside it
    if dtype == record["dtype"]:  # in another the weights are others too, by their rounding
        current["model"], recorded["model"] = model_sha256, record["model_sha256"]
    changed = [
        f"{name} {recorded.get(name)} (here {value})"
        for name, value in current.items()
        if recorded.get(name) != value
    ]
    if changed:
        warnings.warn(
            f"the image may come out differently: it was drawn with {', '.join(changed)}",
            stacklevel=2,
        )


def _packages(engine: str) -> dict[str, str]:
    names = (*PACKAGES, *(["openvino"] if engine == "openvino" else []))
    versions = {name: metadata.version(name) for name in names}
    return {"latentdiff": latentdiff.__version__, **versions}
