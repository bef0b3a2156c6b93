"""report.html: a run folder as one page that opens offline, without scripts or other files."""

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

MAX_PREVIEWS = 6  # evenly spaced, the newest among them: the page contains their bytes
DATA = "data.json"
MAX_MARKERS = 30  # a curve with more points is drawn without markers
VAL_LOSS = "val_loss"
# Their axes start at 0, for on a tight axis noise looks like a change.
ZERO_BASED = ("samples_per_second", "data_wait", "memory", "skipped")
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
    """Write data.json: the summary of the data that the report shows."""
    with replacing(folder / DATA) as temporary:
        text = json.dumps(summary, indent=2, ensure_ascii=False)
        temporary.write_text(f"{text}\n", encoding="utf-8")


def write_report(folder: Path) -> None:
    """Write `report.html` of a run folder: curves, preview grids, data, configuration, versions.

    It reads log.jsonl, previews/, data.json (the task's `data_summary`) and config.yaml, and leaves
    out what is not there. The page replaces an earlier one atomically.
    """
    log = folder / "log.jsonl"
    text = log.read_text(encoding="utf-8") if log.is_file() else ""
    records = [json.loads(line) for line in text.splitlines()]
    title = html.escape(folder.resolve().name)
    sections = [f"<h1>{title}</h1>", _subtitle(records)]
    if records:
        sections += ["<h2>Curves</h2>", f"<figure>{_curves(records)}</figure>"]
    if any(VAL_LOSS in record for record in records):
        sections += ["<h2>Validation loss by t</h2>", f"<figure>{_val_loss(records)}</figure>"]
    if records:
        sections += ["<h2>Numbers</h2>", _table(records)]
    if grids := _grids(folder / "previews"):
        sections += ["<h2>Previews</h2>", f'<div class="grids">{"".join(grids)}</div>']
    if (folder / DATA).is_file():
        sections += ["<h2>Data</h2>", *_data(load_json(folder / DATA))]
    config = folder / "config.yaml"
    if config.is_file():
        content = html.escape(config.read_text(encoding="utf-8"))
        sections += ["<h2>Configuration</h2>", f"<pre>{content}</pre>"]
    sections += ["<h2>Versions</h2>", _rows(_versions())]
    page = (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style>\n'
        + "\n".join(sections)
        + "\n</html>\n"
    )
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def _subtitle(records: Sequence[Mapping[str, Any]]) -> str:
    step = f"step {records[-1]['step']:,}" if records else "nothing logged yet"
    return f'<p class="muted">{step}</p>'


def _curves(records: Sequence[Mapping[str, Any]]) -> str:
    """One SVG with a curve of every logged number but the validation loss."""
    from matplotlib.figure import Figure  # here: the import takes half a second

    names = [name for name in _names(records) if not name.startswith(VAL_LOSS)]
    rows = (len(names) + 1) // 2
    figure = Figure(figsize=(9, 2.4 * rows), layout="constrained")
    for axes, name in zip(figure.subplots(rows, 2, squeeze=False).flat, names, strict=False):
        _draw(axes, *_series(records, name))
        axes.set_title(_title(name), fontsize=10)
        if name in ZERO_BASED:
            axes.set_ylim(0, 1.1 * max(*_series(records, name)[1], 1e-9))
    for axes in figure.axes[len(names) :]:
        axes.remove()
    return _svg(figure)


def _val_loss(records: Sequence[Mapping[str, Any]]) -> str:
    """One SVG with the validation loss of each bin of t, dark at low noise and light at high."""
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
    markers = {"marker": "o", "markersize": 3} if len(steps) <= MAX_MARKERS else {}
    axes.plot(steps, values, linewidth=1, **markers, **style)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=8)


def _svg(figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def _table(records: Sequence[Mapping[str, Any]]) -> str:
    """A table of the first, least and last value of every logged number."""
    rows = []
    for name in _names(records):
        _, values = _series(records, name)
        cells = "".join(f"<td>{value:.4g}</td>" for value in (values[0], min(values), values[-1]))
        rows.append(f"<tr><td>{html.escape(_title(name))}</td>{cells}</tr>")
    head = "<tr><th></th><th>first</th><th>least</th><th>last</th></tr>"
    return f'<table class="numbers">{head}{"".join(rows)}</table>'


def _names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for record in records for name in record)
    return [name for name in names if name != "step" and _series(records, name)[0]]


def _series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of a logged number, in the unit of its title."""
    unit = GIB if name == "memory" else 1
    pairs = [(r["step"], r[name] / unit) for r in records if isinstance(r.get(name), int | float)]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _title(name: str) -> str:
    return "memory (GiB)" if name == "memory" else name


def _data(summary: Mapping[str, Any]) -> list[str]:
    """The summary of the data in HTML: tables, then some captions."""
    plain = {name: value for name, value in summary.items() if name not in ("captions", "check")}
    sections = [_rows(plain)]
    if summary.get("check"):
        sections += ["<h3>As <code>latentdiff data check</code> found it</h3>"]
        sections += [_rows(summary["check"])]
    if summary.get("captions"):
        items = "".join(f"<li>{html.escape(text)}</li>" for text in summary["captions"])
        sections += ["<h3>Some captions</h3>", f"<ul>{items}</ul>"]
    return sections


def _rows(values: Mapping[str, Any]) -> str:
    """A table of names and values, without those that are empty."""
    rows = []
    for name, value in values.items():
        if value not in (None, "", {}, []):
            cells = (html.escape(name.replace("_", " ")), html.escape(_as_text(value)))
            rows.append(f"<tr><td>{cells[0]}</td><td>{cells[1]}</td></tr>")
    return f'<table class="rows">{"".join(rows)}</table>'


def _as_text(value: Any) -> str:
    """A value of a summary as text."""
    if isinstance(value, Mapping):
        if {"min", "median", "max"} <= value.keys():
            return f"{value['min']:g} to {value['max']:g}, median {value['median']:g}"
        return "; ".join(f"{name}: {_as_text(item)}" for name, item in value.items() if item)
    if isinstance(value, list):
        return ", ".join(map(_as_text, value))
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
    count = min(len(paths), MAX_PREVIEWS)
    shown = [paths[len(paths) - 1 - i * len(paths) // count] for i in reversed(range(count))]
    return [
        f'<figure><img alt="previews of {html.escape(path.stem)}" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        f"<figcaption>{html.escape(path.stem)}</figcaption></figure>"
        for path in shown
    ]
