"""report.html: a run folder as one page that opens offline, without a script or a second file."""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from latentdiff.formats.weights import replacing

PREVIEWS = 6  # of all that a run leaves, evenly spaced and with the newest; each weighs its bytes

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin-top: 2.5rem }
.muted { color: #666 } figure { margin: 0 0 1.5rem } figcaption { color: #666 }
img, svg { max-width: 100%; height: auto } .grids { display: grid; gap: 1rem;
       grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)) }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: left }
td:nth-child(n+2), th:nth-child(n+2) { text-align: right; font-variant-numeric: tabular-nums }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 13px }
"""


def write_report(folder: Path) -> None:
    """Write `report.html` of a run folder: curves, preview grids and configuration.

    From log.jsonl, previews/ and config.yaml; what is not there is left out. The page replaces an
    earlier one as a whole.
    """
    log = folder / "log.jsonl"
    text = log.read_text(encoding="utf-8") if log.is_file() else ""
    records = [json.loads(line) for line in text.splitlines()]
    parts = [f"<h1>{html.escape(folder.resolve().name)}</h1>", _subtitle(records)]
    if records:
        parts += ["<h2>Curves</h2>", f"<figure>{_curves(records)}</figure>", _table(records)]
    if grids := _grids(folder / "previews"):
        parts += ["<h2>Previews</h2>", f'<div class="grids">{"".join(grids)}</div>']
    config = folder / "config.yaml"
    if config.is_file():
        content = html.escape(config.read_text(encoding="utf-8"))
        parts += ["<h2>Configuration</h2>", f"<pre>{content}</pre>"]
    title = html.escape(folder.resolve().name)
    page = (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style>\n'
        + "\n".join(parts)
        + "\n</html>\n"
    )
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def _subtitle(records: Sequence[Mapping[str, Any]]) -> str:
    made = f"torch {torch.__version__}"
    step = f"step {records[-1]['step']:,}, " if records else "nothing logged yet, "
    return f'<p class="muted">{step}{html.escape(made)}</p>'


def _curves(records: Sequence[Mapping[str, Any]]) -> str:
    """Every logged number over the steps, as one SVG."""
    from matplotlib.figure import Figure  # here: it takes half a second that a resume can spare

    names = _names(records)
    rows = (len(names) + 1) // 2
    figure = Figure(figsize=(9, 2.4 * rows), layout="constrained")
    for axes, name in zip(figure.subplots(rows, 2, squeeze=False).flat, names, strict=False):
        points = [(r["step"], r[name]) for r in records if isinstance(r.get(name), int | float)]
        axes.plot(*zip(*points, strict=True), linewidth=1)
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
    for axes in figure.axes[len(names) :]:
        axes.remove()
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def _table(records: Sequence[Mapping[str, Any]]) -> str:
    """First, best (least) and last value of every number."""
    rows = []
    for name in _names(records):
        values = [r[name] for r in records if isinstance(r.get(name), int | float)]
        cells = "".join(f"<td>{value:.4g}</td>" for value in (values[0], min(values), values[-1]))
        rows.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
    head = "<tr><th></th><th>first</th><th>least</th><th>last</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    found = dict.fromkeys(name for record in records for name in record)
    return [
        name
        for name in found
        if name != "step" and any(isinstance(r.get(name), int | float) for r in records)
    ]


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
