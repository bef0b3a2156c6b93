"""report.html: a run folder as one page that opens offline, without a script or a second file."""

import base64
import contextlib
import html
import importlib.metadata
import io
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.formats.weights import load_json, replacing

PREVIEWS = 6  # of all that a run leaves, evenly spaced and with the newest; each weighs its bytes
DATA = "data.json"
FEW = 30  # points that a curve shows one by one
VAL_LOSS = "val_loss"
FROM_ZERO = ("samples_per_second", "data_wait", "memory", "skipped")  # else chance looks like much
GIB = 2**30
LIBRARIES = ("torch", "accelerate", "transformers", "datasets", "safetensors", "numpy", "pillow")

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin-top: 2.5rem }
.muted { color: #666 } figure { margin: 0 0 1.5rem } figcaption { color: #666 }
img, svg { max-width: 100%; height: auto } .grids { display: grid; gap: 1rem;
       grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)) }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: left }
.numbers td:nth-child(n+2), .numbers th:nth-child(n+2) { text-align: right;
       font-variant-numeric: tabular-nums }
.rows td, li { vertical-align: top; overflow-wrap: anywhere } .rows td:first-child { color: #666;
       white-space: nowrap; min-width: 8rem }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem } ul { margin: 0 }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 13px }
"""


def write_data(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write data.json, what the report says of the data: numbers by name, in their order."""
    with replacing(folder / DATA) as temporary:
        text = json.dumps(summary, indent=2, ensure_ascii=False)
        temporary.write_text(f"{text}\n", encoding="utf-8")


def write_report(folder: Path) -> None:
    """Write `report.html` of a run folder: curves, preview grids, data, configuration, versions.

    From log.jsonl, previews/, data.json (what `fit` was told of the data) and config.yaml; what is
    not there is left out. The page replaces an earlier one as a whole.
    """
    log = folder / "log.jsonl"
    text = log.read_text(encoding="utf-8") if log.is_file() else ""
    records = [json.loads(line) for line in text.splitlines()]
    title = html.escape(folder.resolve().name)
    parts = [f"<h1>{title}</h1>", _subtitle(records)]
    if records:
        parts += ["<h2>Curves</h2>", f"<figure>{_curves(records)}</figure>"]
    if any(VAL_LOSS in record for record in records):
        parts += ["<h2>Validation loss by t</h2>", f"<figure>{_val_loss(records)}</figure>"]
    if records:
        parts += ["<h2>Numbers</h2>", _table(records)]
    if grids := _grids(folder / "previews"):
        parts += ["<h2>Previews</h2>", f'<div class="grids">{"".join(grids)}</div>']
    if (folder / DATA).is_file():
        parts += ["<h2>Data</h2>", *_data(load_json(folder / DATA))]
    config = folder / "config.yaml"
    if config.is_file():
        content = html.escape(config.read_text(encoding="utf-8"))
        parts += ["<h2>Configuration</h2>", f"<pre>{content}</pre>"]
    parts += ["<h2>Versions</h2>", _rows(_versions())]
    page = (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style>\n'
        + "\n".join(parts)
        + "\n</html>\n"
    )
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def _subtitle(records: Sequence[Mapping[str, Any]]) -> str:
    step = f"step {records[-1]['step']:,}" if records else "nothing logged yet"
    return f'<p class="muted">{step}</p>'


def _curves(records: Sequence[Mapping[str, Any]]) -> str:
    """Every logged number over the steps but the validation loss, as one SVG."""
    from matplotlib.figure import Figure  # here: it takes half a second that a resume can spare

    names = [name for name in _names(records) if not name.startswith(VAL_LOSS)]
    rows = (len(names) + 1) // 2
    figure = Figure(figsize=(9, 2.4 * rows), layout="constrained")
    for axes, name in zip(figure.subplots(rows, 2, squeeze=False).flat, names, strict=False):
        _draw(axes, *_series(records, name))
        axes.set_title(_title(name), fontsize=10)
        if name in FROM_ZERO:
            axes.set_ylim(0, 1.1 * max(*_series(records, name)[1], 1e-9))
    for axes in figure.axes[len(names) :]:
        axes.remove()
    return _svg(figure)


def _val_loss(records: Sequence[Mapping[str, Any]]) -> str:
    """The validation loss of all bins of t in one SVG: little noise is dark, much is light."""
    import matplotlib
    from matplotlib.figure import Figure

    bins = [name for name in _names(records) if name.startswith(f"{VAL_LOSS}_")]
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(bins)))
    for number, (name, colour) in enumerate(zip(bins, colours, strict=True)):
        label = f"{number / len(bins):g} to {(number + 1) / len(bins):g}"
        _draw(axes, *_series(records, name), color=colour, label=label)
    _draw(axes, *_series(records, VAL_LOSS), color="black", linestyle="--", label="mean")
    if all(value > 0 for name in bins for value in _series(records, name)[1]):
        axes.set_yscale("log")
        for format_axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            format_axis("{x:g}")  # 0.4, where the default writes 4 × 10⁻¹
    axes.set_xlabel("step", fontsize=9)
    figure.legend(loc="outside right upper", title="t / T", fontsize=8, title_fontsize=9)
    return _svg(figure)


def _draw(axes: Any, steps: list[float], values: list[float], **style: Any) -> None:
    few = {"marker": "o", "markersize": 3} if len(steps) <= FEW else {}
    axes.plot(steps, values, linewidth=1, **few, **style)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)


def _svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def _table(records: Sequence[Mapping[str, Any]]) -> str:
    """First, least and last value of every number."""
    rows = []
    for name in _names(records):
        _, values = _series(records, name)
        cells = "".join(f"<td>{value:.4g}</td>" for value in (values[0], min(values), values[-1]))
        rows.append(f"<tr><td>{html.escape(_title(name))}</td>{cells}</tr>")
    head = "<tr><th></th><th>first</th><th>least</th><th>last</th></tr>"
    return f'<table class="numbers">{head}{"".join(rows)}</table>'


def _names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    found = dict.fromkeys(name for record in records for name in record)
    return [name for name in found if name != "step" and _series(records, name)[0]]


def _series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of a number, in the unit that its title names."""
    unit = GIB if name == "memory" else 1
    pairs = [(r["step"], r[name] / unit) for r in records if isinstance(r.get(name), int | float)]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _title(name: str) -> str:
    return "memory (GiB)" if name == "memory" else name


def _data(summary: Mapping[str, Any]) -> list[str]:
    """What a run is trained on: a table and, last, captions."""
    plain = {name: value for name, value in summary.items() if name not in ("captions", "check")}
    parts = [_rows(plain)]
    if summary.get("check"):
        parts += ["<h3>As <code>latentdiff data check</code> found it</h3>"]
        parts += [_rows(summary["check"])]
    if summary.get("captions"):
        items = "".join(f"<li>{html.escape(text)}</li>" for text in summary["captions"])
        parts += ["<h3>Some captions</h3>", f"<ul>{items}</ul>"]
    return parts


def _rows(values: Mapping[str, Any]) -> str:
    """A table of names and what is not empty of them."""
    rows = []
    for name, value in values.items():
        if value not in (None, "", {}, []):
            cells = (html.escape(name.replace("_", " ")), html.escape(_said(value)))
            rows.append(f"<tr><td>{cells[0]}</td><td>{cells[1]}</td></tr>")
    return f'<table class="rows">{"".join(rows)}</table>'


def _said(value: Any) -> str:
    """A value of a summary in words."""
    if isinstance(value, Mapping):
        if {"min", "median", "max"} <= value.keys():
            return f"{value['min']:g} to {value['max']:g}, median {value['median']:g}"
        return "; ".join(f"{name}: {_said(part)}" for name, part in value.items() if part)
    if isinstance(value, list):
        return ", ".join(map(_said, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _versions() -> dict[str, str]:
    # Not imported by name: the package's own module leads to the floors above this one.
    ours = {
        "latentdiff": sys.modules["latentdiff"].__version__,
        "python": platform.python_version(),
    }
    theirs = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            theirs[name] = importlib.metadata.version(name)
    return ours | theirs


def _grids(folder: Path) -> list[str]:
    paths = sorted(folder.glob("*.png"))
    count = min(len(paths), PREVIEWS)
    shown = [paths[len(paths) - 1 - i * len(paths) // count] for i in reversed(range(count))]
    return [
        f'<figure><img alt="previews of {html.escape(path.stem)}" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        f"<figcaption>{html.escape(path.stem)}</figcaption></figure>"
        for path in shown
    ]
