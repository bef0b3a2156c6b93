"""Runs that are trained on this machine, as the page shows them; nothing in them is changed."""

import base64
import functools
import html
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from latentdiff.formats.yaml_text import parse_yaml
from latentdiff.training.logging.plots import plot_log

LOG = "log.jsonl"
DEPTHS = (f"*/{LOG}", f"*/*/{LOG}", f"*/*/*/{LOG}")  # runs/LOG itself is the folder "."
MOST_PREVIEWS = 4
GIB = 2**30


def runs(folder: Path) -> dict[str, Path]:
    """The runs below a folder by name, such as "emoji/unet", the one that logged last first."""
    logs = [path for depth in (LOG, *DEPTHS) for path in folder.glob(depth)]
    logs.sort(key=lambda log: log.stat().st_mtime, reverse=True)
    return {log.parent.relative_to(folder).as_posix(): log.parent for log in logs}


def as_html(run: Path) -> str:
    """Newest step, loss plot, newest previews and numbers of a run."""
    status = (run / LOG).stat()
    step, rest = _content(run, status.st_mtime_ns)
    ago = _duration(time.time() - status.st_mtime)
    return f"<p><strong>{html.escape(step)}</strong>, logged {ago} ago</p>{rest}"


def _duration(seconds: float) -> str:
    for length, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * length:
            return f"{seconds // length:,.0f} {unit}"
    return f"{max(seconds, 0):.0f} seconds"


@functools.lru_cache(maxsize=8)
def _content(run: Path, _: int) -> tuple[str, str]:
    """The newest step in words, and what a visit does not change; anew when the log has changed."""
    with (run / LOG).open(encoding="utf-8") as file:
        lines = [line for line in file if line.endswith("\n")]  # the last may be half written
    records = [json.loads(line) for line in lines]
    if not records:
        return "nothing logged yet", ""
    parts = [_plot(run.resolve().name, lines) if any("loss" in r for r in records) else ""]
    previews = sorted((run / "previews").glob("*.png"))[-MOST_PREVIEWS:]
    if previews:
        images = [_image(path.read_bytes(), f"Preview of {path.stem}") for path in previews]
        parts.append(f'<h3>Previews</h3><div class="previews">{"".join(reversed(images))}</div>')
    newest: dict[str, Any] = {}
    for record in records:
        newest |= record
    rows = "".join(_row(name, value) for name, value in newest.items() if name != "step")
    parts.append(f"<h3>Newest numbers</h3><table>{rows}</table>")
    last = _max_steps(run)
    of = f" of {last:,}" if last is not None else ""
    return f"Step {records[-1]['step']:,}{of}", "".join(parts)


def _max_steps(run: Path) -> int | None:
    """How many steps the run's config.yaml says; None where there is no such file or number."""
    try:
        settings = parse_yaml((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    steps = settings.get("max_steps") if isinstance(settings, dict) else None
    return steps if isinstance(steps, int) else None


def _plot(name: str, lines: list[str]) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch, name, LOG)  # the plot's title is the folder's name
        log.parent.mkdir()
        log.write_text("".join(lines), encoding="utf-8")
        plot = Path(scratch, "loss.png")
        plot_log(log, plot)
        return _image(plot.read_bytes(), f"Loss of {name} over the steps")


def _image(data: bytes, description: str) -> str:
    source = base64.b64encode(data).decode()
    text = html.escape(description)
    return f'<img alt="{text}" title="{text}" src="data:image/png;base64,{source}">'


def _row(name: str, value: Any) -> str:
    title = "memory (GiB)" if name == "memory" else name
    number = value / GIB if name == "memory" else value
    shown = f"{number:.4g}" if isinstance(number, int | float) else str(number)
    return f'<tr><th scope="row">{html.escape(title)}</th><td>{html.escape(shown)}</td></tr>'
