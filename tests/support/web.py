"""The server of `latentdiff web` with a tiny pipeline, in this process or at a port of its own."""

import asyncio
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from latentdiff.pipeline import Pipeline
from latentdiff.web.choices import Choices
from latentdiff.web.drawings import Drawings, Limits

with warnings.catch_warnings(action="ignore"):  # of gradio's own imports
    from latentdiff.web.app import create_app

HOST = "http://127.0.0.1"
LIMITS = Limits(queue=24, steps=40, size=64, images=4)


@contextmanager
def drawings_of(pipeline: Pipeline, choices: Choices | None = None, **limits: Any) -> Iterator[Any]:
    """A queue that draws with one pipeline, whatever the model's name."""
    chosen = Choices("models/tiny") if choices is None else choices
    drawings = Drawings(lambda _: pipeline, chosen, Limits(**(vars(LIMITS) | limits)))
    try:
        yield drawings
    finally:
        drawings.close()


def made_app(drawings: Drawings, folder: Path, **options: Any) -> Any:
    """The app, made within a loop: without one gradio makes some, and closes none of them."""

    async def make() -> Any:
        with warnings.catch_warnings(action="ignore"):
            return create_app(drawings, folder, **options)

    return asyncio.run(make())


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The address of an app that listens in a thread."""
    config = uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1, ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        yield f"{HOST}:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def slowed(pipeline: Pipeline, seconds: float) -> Pipeline:
    """The pipeline, each of whose steps takes longer, so that there is a middle to stop in."""
    forward = pipeline.unet.forward

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return forward(*arguments, **options)

    pipeline.unet.forward = slow
    return pipeline


def make_run(folder: Path) -> None:
    """A run's folder, whose last line is half written."""
    folder.mkdir(parents=True)
    lines = [f'{{"step": {step}, "loss": {1 / step}}}\n' for step in (10, 20, 30)]
    (folder / "log.jsonl").write_text("".join(lines) + '{"step": 4', encoding="utf-8")
