"""The server: the API and the page in one FastAPI app behind the guard."""

import os
from collections.abc import Sequence
from pathlib import Path

# Before gradio is imported, which asks for both then: nothing is sent to or fetched from elsewhere.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_RUN_HISTORY"] = "False"

import gradio as gr
from fastapi import FastAPI
from gradio.themes import Base

from latentdiff.web.api import routes
from latentdiff.web.drawings import Drawings
from latentdiff.web.guard import MOST_UPLOAD, Guard
from latentdiff.web.page import CSS, FONTS, build_page


def create_app(
    drawings: Drawings,
    folder: Path,
    *,
    runs: Path | None = None,
    token: str = "",
    listen: bool = False,
    names: Sequence[str] = (),
) -> FastAPI:
    """The app of a server that draws with `drawings`.

    folder: holds uploaded and finished images, and is the caller's to delete.
    runs: the folder whose trainings are shown.
    token: asked of everybody, if not empty. listen, names: see `Guard`.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "gradio")
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # the docs' scripts are a CDN's
    app.include_router(routes(drawings))
    app.add_middleware(Guard, token=token, listen=listen, names=names)
    images = folder / "images"
    images.mkdir()
    return gr.mount_gradio_app(
        app,
        build_page(drawings, images, runs),
        path="/",
        theme=Base(**FONTS),
        css=CSS,
        footer_links=[],
        run_history=False,
        allowed_paths=[str(images)],
        max_file_size=MOST_UPLOAD,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
    )
