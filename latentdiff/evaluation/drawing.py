"""Draws prompts for a judge, into an image folder that says what each image should show."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from latentdiff.evaluation.prompts import Prompt
from latentdiff.evaluation.references import References
from latentdiff.evaluation.results import differences
from latentdiff.pipeline import Pipeline

SETTINGS = "drawing.json"  # beside the images: how they were drawn
METADATA = "metadata.jsonl"  # a row for each
BATCH_SIZE = 32  # images at once; where a call draws fewer than a hundred, more gain nothing


def draw_prompts(
    pipe: Pipeline,
    prompts: Sequence[Prompt],
    references: References,
    folder: Path,
    *,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
    batch_size: int = BATCH_SIZE,
) -> None:
    """Draw each prompt once and write `drawing.json`, the images and `metadata.jsonl`.

    `options` are those of the pipeline's call; `settings` is what `drawing.json` holds. The rows
    have the prompt as `text`, and `concept`, `style`, `of_split` and `column` as it was chosen.
    Images go through the networks in batches, also on the CPU. Rows are written batch by batch, and
    a folder that has some is gone on with. Raises ValueError, naming what differs, where they were
    drawn with other settings or of other prompts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pipe.batched = True
    rows = [_row(i, prompt, references) for i, prompt in enumerate(prompts)]
    drawn = _drawn_before(folder, settings, rows, batch_size)
    with (
        tqdm(total=len(prompts), initial=drawn, desc="drawing", unit="image") as bar,
        (folder / METADATA).open("a", encoding="utf-8") as metadata,
    ):
        for start in range(drawn, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            images = pipe(
                [prompt.text for prompt in batch],
                seed=[prompt.seed for prompt in batch],
                progress=False,
                **options,
            ).images
            for i, image in enumerate(images, start):
                image.save(folder / _file_name(i))
            metadata.writelines(rows[start : start + batch_size])
            metadata.flush()
            bar.update(len(batch))


def _file_name(i: int) -> str:
    return f"{i:05}.png"


def _row(i: int, prompt: Prompt, references: References) -> str:
    """The line of a drawing in `metadata.jsonl`."""
    row = {
        "file_name": _file_name(i),
        "text": prompt.text,
        "concept": references.concepts[prompt.wanted],
        "style": references.styles[prompt.wanted],
        "of_split": references.splits[prompt.wanted],
        "column": prompt.column,
        "seed": prompt.seed,
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def _drawn_before(
    folder: Path, settings: Mapping[str, Any], rows: Sequence[str], batch_size: int
) -> int:
    """How many images an interrupted call left in a folder that is now ready for the next.

    They are whole batches: an image's last bits depend on those that it was drawn with.
    """
    if not (folder / SETTINGS).is_file():
        text = json.dumps(dict(settings), ensure_ascii=False, indent=1)
        (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")
        return 0
    before = read_settings(folder)
    different = [
        *differences({**before, "options": None}, {**settings, "options": None}, "there", "now"),
        *differences(before["options"], settings["options"], "there", "now"),
    ]
    if different:
        raise ValueError(
            f"{folder} holds drawings that were begun with other settings: "
            f"{'; '.join(different)}; name another folder, or go on with the same settings"
        )
    path = folder / METADATA
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = [line + "\n" for line in text.split("\n")[:-1]]  # a line without an end was cut off
    if len(lines) < len(rows):
        lines = lines[: len(lines) // batch_size * batch_size]
    if lines != list(rows[: len(lines)]):
        raise ValueError(f"{folder} holds drawings of other prompts: name another folder")
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def read_settings(folder: Path) -> dict[str, Any]:
    """Read how the images of a folder were drawn; of other folders nothing is known: {}."""
    path = folder / SETTINGS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
