"""`POST /v1/images/generations` and `GET /v1/models`, as OpenAI's clients call them.

https://platform.openai.com/docs/api-reference/images/create; `seed`, `negative_prompt` and others
of the pipeline's options are extras. An option without an effect here is refused.
"""

import asyncio
import base64
import json
import re
import time
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from latentdiff.formats.header import short_repr
from latentdiff.web.drawings import Drawing, Drawings, QueueFullError
from latentdiff.web.guard import error_of

WAIT = 0.05  # seconds between looks at a drawing and at the client
SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
Types = type | tuple[type, ...]
# What is passed on to the pipeline, under its name there.
OPTIONS: dict[str, tuple[str, Types, str]] = {
    "prompt": ("prompt", str, "a text"),
    "n": ("num_images", int, "a whole number"),
    "seed": ("seed", int, "a whole number"),
    "negative_prompt": ("negative_prompt", str, "a text"),
    "steps": ("steps", int, "a whole number"),
    "guidance_scale": ("guidance_scale", (int, float), "a number"),
    "sampler": ("sampler", str, "a text"),
    "level_spacing": ("level_spacing", str, "a text"),
    "cache_interval": ("cache_interval", int, "a whole number"),
    "prompt_weighting": ("prompt_weighting", bool, "true or false"),
}
# OpenAI's own, with the only values that are true of what is answered.
FIXED: dict[str, tuple[Any, ...]] = {
    "response_format": ("b64_json",),
    "output_format": ("png",),
    "background": ("auto", "opaque"),
    "quality": ("auto", "standard"),
    "stream": (False,),
}
OTHERS = ("model", "size", "user")


class RefusedError(Exception):
    """A request that is answered with an error."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.answer = JSONResponse(error_of(status, message, param=param, code=code), status)


def routes(drawings: Drawings) -> APIRouter:
    """The routes below /v1/."""
    router = APIRouter(prefix="/v1")

    @router.get("/models")
    def models() -> dict[str, Any]:
        names = drawings.choices.models()
        entry = {"object": "model", "created": 0, "owned_by": "latentdiff"}
        return {"object": "list", "data": [{"id": name, **entry} for name in names]}

    @router.get("/models/{name:path}")
    def model(name: str) -> Any:
        found = [one for one in models()["data"] if one["id"] == name]
        return found[0] if found else _no_model(name, drawings).answer

    @router.post("/images/generations")
    async def generations(request: Request) -> Response:
        try:
            drawing = _submit(drawings, await request.body())
            return await _answer(drawings, drawing, request)
        except RefusedError as error:
            return error.answer

    @router.api_route("/{rest:path}", methods=["GET", "POST", "PUT", "DELETE"])
    def nothing(rest: str) -> Response:
        message = f"there is no {rest!r}; there are POST images/generations and GET models"
        return RefusedError(message, status=404).answer

    return router


def _no_model(name: Any, drawings: Drawings) -> RefusedError:
    known = ", ".join(drawings.choices.models())
    message = f"model={short_repr(name)} is unknown; known are {known}"
    return RefusedError(message, status=404, param="model", code="model_not_found")


def _submit(drawings: Drawings, body: bytes) -> Drawing:
    """Put the order of a request's body into the queue; raises RefusedError."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise RefusedError('the body must be a JSON object, such as {"prompt": "a cat"}')
    given = {name: value for name, value in content.items() if value is not None}
    options = pipeline_options(given)
    try:
        model = given.get("model")
        if model is not None and model not in drawings.choices.models():
            raise _no_model(model, drawings)
        return drawings.submit(options, model=model)
    except QueueFullError as error:
        refused = RefusedError(str(error), status=429, code="rate_limit_exceeded")
        refused.answer.headers["Retry-After"] = "10"
        raise refused from error
    except ValueError as error:
        raise _in_their_words(str(error)) from error


def _in_their_words(message: str) -> RefusedError:
    """The refusal of an option by the name that the request has for it."""
    ours = message.partition("=")[0]
    theirs = {one[0]: name for name, one in OPTIONS.items()}
    if ours in ("width", "height"):
        return RefusedError(message, param="size")
    if ours not in theirs:
        return RefusedError(message)
    return RefusedError(message.replace(ours, theirs[ours], 1), param=theirs[ours])


def pipeline_options(given: dict[str, Any]) -> dict[str, Any]:
    """The pipeline's options of a request's, checked by type; raises RefusedError."""
    if "prompt" not in given:
        raise RefusedError("prompt is missing", param="prompt")
    options: dict[str, Any] = {}
    for name, value in given.items():
        if name in OPTIONS:
            ours, kind, what = OPTIONS[name]
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                message = f"{name}={short_repr(value)} must be {what}"
                raise RefusedError(message, param=name)
            options[ours] = value
        elif name in FIXED:
            if value not in FIXED[name]:
                known = " or ".join(json.dumps(one) for one in FIXED[name])
                message = f"{name}={short_repr(value)} is not known here, only {known}"
                raise RefusedError(message, param=name)
        elif name not in OTHERS:
            known = ", ".join((*OPTIONS, *FIXED, *OTHERS))
            raise RefusedError(f"{short_repr(name)} is unknown; known are {known}", param=name)
        elif name != "size" and not isinstance(value, str):
            raise RefusedError(f"{name}={short_repr(value)} must be a text", param=name)
    if given.get("size", "auto") != "auto":
        size = SIZE.fullmatch(given["size"]) if isinstance(given["size"], str) else None
        if size is None:
            message = f'size={short_repr(given["size"])} must be "auto" or as "512x512"'
            raise RefusedError(message, param="size")
        options |= {"width": int(size[1]), "height": int(size[2])}
    return options


async def _answer(drawings: Drawings, drawing: Drawing, request: Request) -> Response:
    """Wait for the images; a client that leaves takes its order along. Raises RefusedError."""
    try:
        while not drawing.done:
            if await request.is_disconnected():
                return Response(status_code=499)  # which nobody reads
            await asyncio.sleep(WAIT)
    finally:
        drawings.stop(drawing)
    if drawing.error and drawing.broken:
        raise RefusedError(drawing.error, status=500)
    if drawing.error:
        raise _in_their_words(drawing.error)
    if drawing.stopped:
        raise RefusedError("the server is closing", status=503)
    images = zip(drawing.images, drawing.seeds, strict=True)
    data = [{"b64_json": base64.b64encode(png).decode(), "seed": seed} for png, seed in images]
    said = {"warnings": drawing.warnings} if drawing.warnings else {}
    return JSONResponse({"created": int(time.time()), "data": data, **said})
