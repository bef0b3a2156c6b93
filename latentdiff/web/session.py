"""What the page's events do: each visitor has one drawing, and the images of the last ones."""

import asyncio
import base64
import html
import io
import shutil
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from latentdiff.formats.png import Record, read_png
from latentdiff.web.drawings import Drawing, Drawings, QueueFullError
from latentdiff.web.settings import FIELDS, fill_fields, read_fields, read_image

WAIT = 0.1  # seconds between looks at a drawing
MOST_SHOWN = 24
Outputs = tuple[Any, ...]


@dataclass(frozen=True)
class Shown:
    """A finished image in a visitor's gallery."""

    path: Path
    caption: str
    record: Record

    @staticmethod
    def forget(shown: Sequence["Shown"]) -> None:
        """Delete the files of images that are shown no more."""
        for image in shown:
            shutil.rmtree(image.path.parent, ignore_errors=True)


class Sessions:
    """The events of all visitors; `folder` is where their finished images are."""

    empty = '<div class="empty">What you draw appears here.</div>'

    def __init__(self, drawings: Drawings, folder: Path) -> None:
        self.drawings = drawings
        self.folder = folder
        self.current: dict[str, Drawing] = {}

    async def draw(self, request: gr.Request, *values: Any) -> AsyncIterator[Outputs]:
        """Draw with the fields' values; the outputs are those that page.py names.

        values: the fields, what the image editor holds, its strength, and the images shown so far.
        """
        *of_fields, editor, strength, shown = values
        session = request.session_hash or ""
        self.stop(request)
        try:
            if not str(of_fields[0]).strip():
                raise ValueError('nothing to draw; write a prompt such as "a cat"')
            fields = dict(zip(FIELDS, of_fields, strict=True))
            order = read_fields(fields, editor, strength)
            drawing = self.drawings.submit(order.pop("options"), **order, previews=True)
        except (ValueError, QueueFullError) as error:
            yield (
                gr.skip(),
                _error(str(error)),
                *[gr.skip()] * 3,
                *_buttons(drawing=False),
                gr.skip(),
            )
            return
        self.current[session] = drawing
        try:
            async for view, status in self._progress(drawing):
                busy = _buttons(drawing=True)
                yield (view, status, *[gr.skip()] * 3, *busy, gr.skip())
            yield self._finished(drawing, shown)
        finally:  # the visitor may have left
            self.drawings.stop(drawing)
            if self.current.get(session) is drawing:
                del self.current[session]

    async def _progress(self, drawing: Drawing) -> AsyncIterator[tuple[Any, str]]:
        """View and status whenever they change, until the drawing is done."""
        said, seen = None, None
        while not drawing.done:
            ahead = self.drawings.ahead(drawing)
            preview = drawing.preview
            if (now := (ahead, drawing.step)) != said or preview is not seen:
                view = gr.skip() if preview is seen or not preview else _view(preview, drawing.step)
                yield view, _status(drawing, ahead)
                said, seen = now, preview
            await asyncio.sleep(WAIT)

    def _finished(self, drawing: Drawing, shown: list[Shown]) -> Outputs:
        """The outputs of a drawing that is done, one way or another."""
        idle = _buttons(drawing=False)
        notes = "".join(
            f'<div class="warning">{html.escape(one)}</div>' for one in drawing.warnings
        )
        if drawing.error:
            return (gr.skip(), _error(drawing.error), *[gr.skip()] * 3, *idle, gr.skip())
        if not drawing.images:
            steps = f" of {drawing.steps}" if drawing.steps else ""
            said = f'<span role="status">Stopped at step {drawing.step}{steps}.</span>'
            return (gr.skip(), said + notes, *[gr.skip()] * 3, *idle, gr.skip())
        new = [
            self._keep(png, seed) for png, seed in zip(drawing.images, drawing.seeds, strict=True)
        ]
        images = [Image.open(io.BytesIO(png)) for png in drawing.images]
        seeds = ", ".join(map(str, drawing.seeds))
        plural = "s" if len(new) > 1 else ""
        said = f'<span role="status">Done. Seed{plural} {seeds}.</span>{notes}'
        Shown.forget(shown[MOST_SHOWN - len(new) :])
        shown = [*new, *shown[: MOST_SHOWN - len(new)]]
        gallery = gr.update(value=[(str(one.path), one.caption) for one in shown])
        view = _view(images, None)
        return (view, said, gallery, shown, 0, *idle, gr.update(interactive=True))

    def _keep(self, png: bytes, seed: int) -> Shown:
        """Write a finished image where gradio finds it; its name is what it is downloaded as."""
        path = self.folder / uuid.uuid4().hex / f"{seed}.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(png)
        record = read_png(path).record
        assert record is not None
        return Shown(path, str(seed), record)

    def stop(self, request: gr.Request) -> None:
        """End the visitor's drawing, after the step that is being computed."""
        drawing = self.current.get(request.session_hash or "")
        if drawing is not None:
            self.drawings.stop(drawing)

    def leave(self, request: gr.Request) -> None:
        """The visitor has closed the page."""
        self.stop(request)

    def select(self, event: gr.SelectData) -> int:
        """The image of the gallery that was chosen."""
        return event.index

    def use(self, shown: list[Shown], selected: int) -> Outputs:
        """Fill the fields with the settings of an image of the gallery."""
        record = shown[selected].record
        return self._filled(dict(record["request"]), record, [])

    def read(self, path: str) -> Outputs:
        """Fill the fields with the settings of a PNG file that was uploaded."""
        try:
            return self._filled(*read_image(Path(path)))
        except ValueError as error:
            return (*[gr.skip()] * len(FIELDS), _error(str(error)))

    def _filled(self, options: dict[str, Any], record: Record | None, said: list[str]) -> Outputs:
        choices = self.drawings.choices
        fields, lost = fill_fields(options, record, choices.models())
        offered = choices.loras()
        lost += [
            f"its LoRA {x} is not among those here"
            for x in fields.get("loras", ())
            if x not in offered
        ]
        if "loras" in fields:
            fields["loras"] = [name for name in fields["loras"] if name in offered]
        values = [fields[name] if name in fields else gr.skip() for name in FIELDS]
        notes = "".join(f'<div class="warning">{html.escape(one)}</div>' for one in (*said, *lost))
        return (*values, f'<span role="status">The settings are filled in.</span>{notes}')

    def offer(self) -> Outputs:
        """The models and LoRAs that there are when a page is opened."""
        choices = self.drawings.choices
        return gr.update(choices=list(choices.models())), gr.update(choices=list(choices.loras()))

    def fit_size(self, editor: dict[str, Any]) -> Outputs:
        """Width and height near an uploaded image's, as the model draws them."""
        background = editor["background"]
        if background is None:
            return gr.skip(), gr.skip()
        most, multiple = self.drawings.limits.size, self.drawings.defaults["multiple"]
        scale = min(1, most / max(background.size))
        width, height = (
            max(multiple, int(side * scale) // multiple * multiple) for side in background.size
        )
        return width, height


def _view(images: Sequence[Image.Image], step: int | None) -> str:
    """Images side by side as HTML, which leaves no files behind."""
    described = "The finished image" if step is None else f"Preview at step {step}"
    parts = []
    for image in images:
        file = io.BytesIO()
        image.convert("RGB").save(file, "PNG" if step is None else "JPEG")
        kind = "png" if step is None else "jpeg"
        data = base64.b64encode(file.getvalue()).decode()
        parts.append(f'<img alt="{described}" src="data:image/{kind};base64,{data}">')
    many = ' class="many"' if len(parts) > 1 else ""
    return f"<div{many}>{''.join(parts)}</div>"


def _status(drawing: Drawing, ahead: int) -> str:
    if ahead:
        said = f"Waiting: {ahead} before this one."
    elif drawing.steps:
        said = f"Step {drawing.step} of {drawing.steps}"
    else:
        said = "Reading the model"
    # Not a live region: a screen reader would read every step aloud.
    return f"<span>{said}</span>"


def _error(said: str) -> str:
    return f'<span class="error" role="alert">{html.escape(said)}</span>'


def _buttons(*, drawing: bool) -> tuple[Any, Any]:
    """Draw and Stop."""
    return gr.update(interactive=not drawing), gr.update(interactive=drawing)
