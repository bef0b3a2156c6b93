"""A hook of mkdocs: each notebook of docs/notebooks is run, and shown as a page with its outputs.

In the repository they have none, so that a change of one is a change of what it says.
"""

import tempfile
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient

MOST_SECONDS = 1800  # of a cell, on a slow machine that does other things as well
log = get_plugin_logger("notebooks")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Run the notebooks and add their pages. A cell that fails ends the build."""
    for path in sorted(Path(config.docs_dir, "notebooks").glob("*.ipynb")):
        log.info("Running %s", path.name)
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            resources = {"metadata": {"path": folder}}
            NotebookClient(notebook, timeout=MOST_SECONDS, resources=resources).execute()
        page = f"notebooks/{path.stem}.md"
        files.append(File.generated(config, page, content=_markdown(notebook, path.name)))
    return files


def _markdown(notebook: nbformat.NotebookNode, name: str) -> str:
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        parts += [_output(output) for output in cell.outputs]
    parts.append(f"[This page as a notebook]({name}): `docs/notebooks/{name}`.")
    return "\n\n".join(part for part in parts if part)


def _output(output: nbformat.NotebookNode) -> str:
    if output.output_type == "stream":
        # A progress bar is of the moment; what it ended in is not news.
        return "" if output.name == "stderr" else f"```text\n{output.text.rstrip()}\n```"
    if image := output.data.get("image/png"):
        encoded = "".join(image.split())
        return f"![what the cell shows](data:image/png;base64,{encoded})"
    return f"```text\n{output.data['text/plain']}\n```"
