"""The page: fields, preview, gallery and monitor, with gradio. It has no path and no URL fields."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import gradio as gr

from latentdiff.formats.a1111 import SAMPLERS as TITLES
from latentdiff.levels import LevelSpacing
from latentdiff.samplers import SAMPLERS
from latentdiff.web.drawings import Drawings
from latentdiff.web.monitor import as_html, runs
from latentdiff.web.session import Sessions, Shown

REFRESH = 10  # seconds between looks at a run
NO_RUN = "<p>No run is chosen.</p>"
CSS = """
.gradio-container { max-width: 76rem !important; margin: 0 auto !important;
  min-width: 0 !important }
.gradio-container, .gradio-container > .main { width: 100% !important; box-sizing: border-box }
#title h1 { font-size: 1.3rem; margin: .2rem 0 }
#view { min-height: 15rem; text-align: center }
#view img { width: min(100%, 32rem); border-radius: 6px; display: inline-block }
#view .empty { color: var(--body-text-color-subdued); padding: 5rem 1rem;
  border: 1px dashed var(--border-color-primary); border-radius: 6px }
#gallery .grid-wrap { min-height: 0; height: auto; max-height: 24rem }
#gallery, #gallery .gallery-container { height: auto !important }
#drawing, #gallery { contain: inline-size } /* a wide canvas or gallery must not widen the page */
#status { min-height: 1.6rem; overflow-wrap: anywhere }
#status .error { color: var(--error-text-color); font-weight: 600 }
#status .warning { color: var(--body-text-color-subdued) }
#run img { max-width: 100%; height: auto }
#run table { border-collapse: collapse } #run th { text-align: left; font-weight: normal;
  padding-right: 1.5rem } #run td { text-align: right; font-variant-numeric: tabular-nums }
#run .previews { display: grid; gap: .7rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 16rem), 1fr)) }
@media (max-width: 760px) { /* the image right below the buttons, the other fields after it */
  #drawing { flex-direction: column } #order { display: contents }
  #drawn { order: 1 } #fields { order: 2 } #view, #drawn, #fields { min-width: 0; width: 100% }
  #view { min-height: 0 } #view .empty { padding: 1.5rem } }
:focus-visible { outline: 2px solid var(--color-accent) !important; outline-offset: 2px }
"""
FONTS: dict[str, Any] = {  # of the visitor's machine: the themes' own are fetched
    "font": ["system-ui", "sans-serif"],
    "font_mono": ["ui-monospace", "monospace"],
}


@dataclass
class Fields:
    """The controls of the drawing tab that events read or write."""

    options: dict[str, Any]
    """By the names of `settings.FIELDS`, in their order."""
    editor: Any
    strength: Any


def build_page(drawings: Drawings, folder: Path, runs_folder: Path | None = None) -> gr.Blocks:
    """The page; finished images are kept in `folder`, the monitor reads below `runs_folder`."""
    sessions = Sessions(drawings, folder)
    page = gr.Blocks(
        title="latentdiff", analytics_enabled=False, delete_cache=(3600, 86400), fill_width=True
    )
    with page:
        gr.Markdown("# latentdiff", elem_id="title")
        with gr.Tab("Draw"):
            _draw_tab(page, drawings, sessions)
        if runs_folder is not None:
            with gr.Tab("Training"):
                _training_tab(page, runs_folder)
    waiting = drawings.limits.queue
    page.queue(max_size=4 * waiting, default_concurrency_limit=2 * waiting, api_open=False)
    return page


def _draw_tab(page: gr.Blocks, drawings: Drawings, sessions: Sessions) -> None:
    with gr.Row(equal_height=False, elem_id="drawing"):
        with gr.Column(scale=1, min_width=300, elem_id="order"):
            prompt, negative = _prompts(drawings)
            with gr.Row(elem_id="buttons"):
                draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=120)
                stop = gr.Button(
                    "Stop", variant="stop", elem_id="stop", min_width=120, interactive=False
                )
            with gr.Column(elem_id="fields"):
                fields = _fields(drawings, prompt, negative)
        with gr.Column(scale=1, min_width=300, elem_id="drawn"):
            view = gr.HTML(sessions.empty, elem_id="view")
            status = gr.HTML("", elem_id="status")
            gallery = gr.Gallery(
                label="Images",
                columns=4,
                fit_columns=False,
                height="auto",
                object_fit="contain",
                format="png",
                interactive=False,
                buttons=["download", "fullscreen"],
                elem_id="gallery",
            )
            with gr.Row():
                use = gr.Button("Use these settings", min_width=120, interactive=False)
                read = gr.UploadButton(
                    "Settings from a PNG", file_types=[".png"], variant="secondary", min_width=120
                )
    shown = gr.State([], time_to_live=86400, delete_callback=Shown.forget)
    selected = gr.State(0)
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    inputs = [*fields.options.values(), fields.editor, fields.strength, shown]
    gr.on(
        [draw.click, prompt.submit, negative.submit],
        sessions.draw,
        inputs,
        [view, status, gallery, shown, selected, draw, stop, use],
        **private,
    )
    stop.click(sessions.stop, None, None, **private)
    page.unload(sessions.leave)
    gallery.select(sessions.select, None, selected, **private)
    outputs = [*fields.options.values(), status]
    use.click(sessions.use, [shown, selected], outputs, **private)
    read.upload(sessions.read, read, outputs, **private)
    page.load(sessions.offer, None, [fields.options["model"], fields.options["loras"]], **private)
    fields.editor.upload(
        sessions.fit_size,
        fields.editor,
        [fields.options["width"], fields.options["height"]],
        **private,
    )


def _prompts(drawings: Drawings) -> tuple[gr.Textbox, gr.Textbox]:
    most = drawings.limits.prompt
    prompt = gr.Textbox(
        label="Prompt", lines=1, max_lines=6, max_length=most, placeholder="a cat", autofocus=True
    )
    negative = gr.Textbox(
        label="Negative prompt",
        lines=1,
        max_lines=4,
        max_length=most,
        info="What to stay away from",
    )
    return prompt, negative


def _fields(drawings: Drawings, prompt: gr.Textbox, negative: gr.Textbox) -> Fields:
    """All other controls."""
    limits, defaults = drawings.limits, drawings.defaults
    options: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative}
    number: dict[str, Any] = {"precision": 0, "min_width": 130}
    with gr.Row():
        options["steps"] = gr.Slider(
            1,
            limits.steps,
            min(defaults["steps"], limits.steps),
            step=1,
            label="Steps",
            min_width=200,
        )
        options["guidance_scale"] = gr.Slider(
            1, 20, defaults["guidance_scale"], step=0.1, label="Guidance", min_width=200
        )
    with gr.Row():
        options["sampler"] = gr.Dropdown(
            [(TITLES[name], name) for name in SAMPLERS], value=defaults["sampler"], label="Sampler",
            min_width=130, filterable=False,
        )  # fmt: skip
        spacings = [("the model's", ""), *((name, name) for name in get_args(LevelSpacing))]
        options["level_spacing"] = gr.Dropdown(
            spacings, value="", label="Noise levels", min_width=130, filterable=False
        )
    with gr.Row():
        options["seed"] = gr.Textbox(
            "", label="Seed (empty or -1: random)", max_length=20, min_width=130
        )
        options["num_images"] = gr.Number(
            1, label="Images", minimum=1, maximum=limits.images, **number
        )
    with gr.Row():
        for name in ("width", "height"):
            options[name] = gr.Number(
                defaults["side"], label=name.capitalize(), minimum=8, maximum=limits.size, **number
            )
    offered = drawings.choices
    with gr.Accordion("Model and LoRAs", open=False):
        first, models = offered.first, list(offered.models())
        more: dict[str, Any] = {
            "prompt_weighting": gr.Checkbox(False, label='Let "(word:1.2)" weigh a word'),
            "model": gr.Dropdown(models, value=first, label="Model", filterable=False),
            "loras": gr.Dropdown(list(offered.loras()), value=[], label="LoRAs", multiselect=True),
            "lora_scale": gr.Slider(-2, 2, 1, step=0.05, label="Strength of the LoRAs"),
        }
    return Fields(options | more, *_editor())


def _editor() -> tuple[gr.ImageEditor, gr.Slider]:
    """What is drawn over, and how much of it is given up."""
    with gr.Accordion("Start from an image", open=False):
        gr.Markdown(
            "Upload or paste an image to draw over. What you paint over is drawn anew, the rest "
            "is kept; without paint all of it is drawn over."
        )
        editor = gr.ImageEditor(
            label="Image and mask", type="pil", sources=["upload", "clipboard"], layers=False,
            brush=gr.Brush(default_size=24, colors=["#e2127a"], color_mode="fixed"),
            transforms=(), format="png", height=360, buttons=[], elem_id="editor",
        )  # fmt: skip
        strength = gr.Slider(
            0.05, 1, 0.8, step=0.05, label="How much of the image to give up", elem_id="strength"
        )
    return editor, strength


def _training_tab(page: gr.Blocks, folder: Path) -> None:
    names = list(runs(folder))
    with gr.Row():
        run = gr.Dropdown(names, value=names[0] if names else None, label="Run", filterable=False)
        refresh = gr.Button("Refresh", min_width=100, scale=0)
    content = gr.HTML(NO_RUN, elem_id="run")

    def choices(name: str | None) -> tuple[Any, str]:
        found = list(runs(folder))
        name = name if name in found else next(iter(found), None)
        return gr.update(choices=found, value=name), show(name)

    def show(name: str | None) -> str:
        found = runs(folder)
        return as_html(found[name]) if name in found else NO_RUN

    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    run.input(show, run, content, **private)
    refresh.click(choices, run, [run, content], **private)
    gr.Timer(REFRESH).tick(show, run, content, **private)
    page.load(choices, run, [run, content], **private)
