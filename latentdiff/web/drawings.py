"""One drawing at a time: orders of the page and of the API wait in one queue for one thread."""

import sys
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from latentdiff.formats.png import FileRecord, LoraRecord, png_bytes
from latentdiff.pipeline import Pipeline
from latentdiff.record import file_record, image_parameters, image_record
from latentdiff.request import Request
from latentdiff.web.choices import Choices, chosen

PREVIEWS = 0.2
"""The share of a drawing's time that its previews may take: a decode can cost more than a step."""
STUDENT = "this model is a student, for {} steps of ddim with guidance 1, and guided already"
BROKEN = "something in the server went wrong; what it prints says more"


class QueueFullError(Exception):
    """As many orders as may wait are waiting."""


@dataclass(frozen=True)
class Limits:
    """What one visitor may ask for, so that the others get their turn."""

    queue: int = 32
    """Orders that wait."""
    steps: int = 150
    size: int = 1024
    """Pixels of a side."""
    images: int = 8
    """Images of one order."""
    prompt: int = 4000
    """Characters of a prompt, which the text encoder reads in chunks."""

    def check(self, request: Request) -> None:
        """Raise ValueError, naming the field, for a request beyond the limits."""
        sides = {"height": request.height, "width": request.width}
        if request.images:
            width, height = request.images[0].size
            sides = {
                name: of_image if given is None else given
                for (name, given), of_image in zip(sides.items(), (height, width), strict=True)
            }
        for name, value in sides.items():
            _at_most(name, value or 0, self.size, "pixels")
        _at_most("steps", request.steps, self.steps)
        _at_most("num_images", len(request.seeds), self.images)
        for name in ("prompt", "negative_prompt"):
            texts = getattr(request, f"{name}s")
            _at_most(f"the length of {name}", max(map(len, texts)), self.prompt, "characters")


def _at_most(name: str, value: int, most: int, unit: str = "") -> None:
    if value > most:
        unit = f" {unit}" if unit else ""
        raise ValueError(
            f"{name}={value} is more than {most}{unit}, the most that this server draws"
        )


@dataclass(eq=False)
class Drawing:
    """An order and what has become of it; the thread that draws writes, the visitors' read."""

    options: dict[str, Any]
    """Those of `Request` that were given."""
    model: str
    """Where it is; see `Choices`."""
    loras: dict[str, float]
    """The scale of each LoRA, by where it is."""
    files: dict[str, FileRecord] = field(default_factory=dict)
    """What `image` and `mask_image` were, for the record."""
    previews: bool = False
    warnings: list[str] = field(default_factory=list)
    step: int = 0
    steps: int = 0
    preview: list[Image.Image] = field(default_factory=list)
    """The estimated images of the newest step that was decoded."""
    images: list[bytes] = field(default_factory=list)
    """The finished images as PNG files."""
    seeds: list[int] = field(default_factory=list)
    error: str = ""
    broken: bool = False
    """Whether `error` is the server's fault."""
    stopped: bool = False
    done: bool = False


class Drawings:
    """The queue, and the thread that has the model and draws.

    `load` makes the pipeline of a model that `choices` offers; the last one stays loaded.
    """

    def __init__(
        self, load: Callable[[str], Pipeline], choices: Choices, limits: Limits | None = None
    ) -> None:
        self.load = load
        self.choices = choices
        self.limits = Limits() if limits is None else limits
        self._waiting = deque[Drawing]()
        self._current: Drawing | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._pipeline: Pipeline | None = None
        self._model = choices.model
        self._loras: list[LoraRecord] = []
        self.defaults = _defaults(self._load(choices.model))
        """Of the first model, for the page's fields."""
        self._thread = threading.Thread(target=self._work, name="drawing", daemon=True)
        self._thread.start()

    def submit(
        self,
        options: Mapping[str, Any],
        *,
        model: str | None = None,
        loras: Mapping[str, float] | None = None,
        files: Mapping[str, FileRecord] | None = None,
        previews: bool = False,
    ) -> Drawing:
        """Put an order into the queue, checked as far as is possible without its model.

        Models and LoRAs are names. Raises ValueError for what cannot be drawn, and QueueFullError.
        """
        given = {name: value for name, value in options.items() if value is not None}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            request = Request(**given)
        self.limits.check(request)
        offered = self.choices.loras()
        drawing = Drawing(
            {**given, "seed": list(request.seeds)},  # the same when the model's defaults are known
            chosen("model", self.choices.first if model is None else model, self.choices.models()),
            {chosen("lora", name, offered): scale for name, scale in (loras or {}).items()},
            dict(files or {}),
            previews,
            [str(warning.message) for warning in caught],
            seeds=list(request.seeds),
        )
        with self._changed:
            if len(self._waiting) >= self.limits.queue:
                raise QueueFullError(
                    f"{len(self._waiting)} orders are waiting, the most that may; try again later"
                )
            self._waiting.append(drawing)
            self._changed.notify()
        return drawing

    def ahead(self, drawing: Drawing) -> int:
        """How many orders are drawn before this one; 0 if it is being drawn or done."""
        with self._changed:
            waiting = list(self._waiting)
            return 0 if drawing not in waiting else 1 + waiting.index(drawing)

    def stop(self, drawing: Drawing) -> None:
        """Take an order out of the queue, or end it after the step that is being computed."""
        with self._changed:
            drawing.stopped = drawing.stopped or not drawing.done
            if drawing in self._waiting:
                self._waiting.remove(drawing)
                drawing.done = True

    def close(self) -> None:
        """Stop all orders, and wait for the thread to end."""
        with self._changed:
            self._closed = True
            for drawing in (*self._waiting, *([self._current] if self._current else [])):
                drawing.stopped = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    return
                drawing = self._current = self._waiting.popleft()
            try:
                with torch.no_grad():
                    self._draw(drawing)
            except Exception as error:  # the thread outlives whatever one order meets
                drawing.error, drawing.broken = _said(error)
            finally:
                drawing.options, drawing.done, self._current = {}, True, None

    def _draw(self, drawing: Drawing) -> None:
        pipeline = self._prepare(drawing)
        request = Request.of(pipeline.diffusion, **drawing.options)
        if pipeline.diffusion.distilled_steps is not None and request.guidance_scale != 1:
            drawing.warnings.append(STUDENT.format(pipeline.diffusion.distilled_steps))
        drawing.steps = request.num_denoising_steps
        start, decoding = time.perf_counter(), 0.0
        latents = None
        for latents in pipeline.sample(request):
            drawing.step += 1
            if drawing.stopped:
                return
            begun = time.perf_counter()
            if drawing.previews and decoding <= PREVIEWS * (begun - start):
                drawing.preview = pipeline.decode(latents, request)
                decoding += time.perf_counter() - begun
        assert latents is not None
        images = pipeline.decode(latents, request)
        drawing.images = [self._png(drawing, request, i, image) for i, image in enumerate(images)]

    def _prepare(self, drawing: Drawing) -> Pipeline:
        """The pipeline with the order's model and LoRAs."""
        if self._pipeline is None or self._model != drawing.model:
            self._pipeline = None  # two models may not fit
            self._load(drawing.model)
        assert self._pipeline is not None
        if {lora["name"]: lora["scale"] for lora in self._loras} != drawing.loras:
            loras = self._pipeline.loras
            if loras.scales:
                loras.unload()
            self._loras = []
            for path, scale in drawing.loras.items():
                loras.load(path, name=path, scale=scale)
                self._loras.append({**file_record(Path(path)), "scale": scale})
        return self._pipeline

    def _load(self, model: str) -> Pipeline:
        self._pipeline, self._model, self._loras = self.load(model), model, []
        self._digest = self._pipeline.fingerprint()
        return self._pipeline

    def _png(self, drawing: Drawing, request: Request, i: int, image: Image.Image) -> bytes:
        assert self._pipeline is not None
        model = drawing.model
        record = image_record(
            self._pipeline,
            request,
            i,
            model=model,
            model_sha256=self._digest,
            files=drawing.files,
            loras=self._loras,
        )
        parameters = image_parameters(self._pipeline, request, i, image.size, model=model)
        return png_bytes(image, parameters=parameters, record=record)


def _defaults(pipeline: Pipeline) -> dict[str, Any]:
    request = Request.of(pipeline.diffusion, "")
    names = ("steps", "guidance_scale", "sampler")
    multiple = pipeline.vae.config.factor * pipeline.unet.multiple
    return {n: getattr(request, n) for n in names} | {"side": pipeline.side, "multiple": multiple}


def _said(error: Exception) -> tuple[str, bool]:
    """The sentence for a visitor, and whether the server is to blame, which prints the rest."""
    if isinstance(error, ModuleNotFoundError):
        return f"the server lacks the package {error.name}: pip install 'latentdiff[lora]'", True
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "memory" in str(error)
    ):
        return "not enough memory; fewer or smaller images need less", False
    if isinstance(error, ValueError):
        return str(error), False
    traceback.print_exception(error, file=sys.stderr)
    return BROKEN, True
