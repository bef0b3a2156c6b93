"""Writes a project: a folder with the configurations of its modules and a README for its owner."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from latentdiff.data.bad_samples import BAD_SAMPLES, breakdown
from latentdiff.projects.folder import MODULES, PROMPTS, check_free
from latentdiff.projects.look import Look, look_at
from latentdiff.projects.measure import measure
from latentdiff.projects.rules import COMMENT, configurations

README = """# {name}

A text-to-image model of the images in `{data}`, made by latentdiff.

    latentdiff train {path}

trains what is not trained yet, in the order of the table, and draws the prompts of `prompts.txt`
into `images/`. Stopped by Control-C, or by anything else? The same command goes on. One part alone:
`latentdiff train {path} vae`. When it is done:

    latentdiff generate "{prompt}" --model {path}/unet/model --out images

## What it does

| part | what it is | steps | images a step | time here |
|---|---|---|---|---|
{table}

{times}

Each part is a configuration, `PART.yaml`, and a folder of that name: `report.html` in it has curves
and previews, and is drawn anew at each checkpoint.

- Longer is often better: raise `max_steps` and `cooldown_steps`, two fifths of it, at any time, and
  run the same command.
- To be done sooner, lower both, and `warmup_steps` before the part has begun, to a tenth of
  `max_steps` at most; the model is the worse for it. `checkpoint_every` and `preview_every` may be
  a tenth of `max_steps` again.
- All other options are edited before the part has begun. To begin it anew delete its folder, and
  `cache/` and `unet/` with that of the VAE, `unet/` with that of CLIP.

By hand a part is `cd {path} && accelerate launch --quiet -m latentdiff.scripts.SCRIPT --config
PART.yaml`, where SCRIPT is train_vae, train_clip, cache_latents or train_unet.

## The images

{data_lines}

`check/summary.json` has all that was counted. docs/own.md of latentdiff says by which rules sizes
and steps were chosen, and docs/data.md how captions are given.
"""


def new_project(
    project: Path,
    data: str,
    *,
    gpu: bool,
    image_size: int | None = None,
    caption_columns: Sequence[str] | None = None,
    measured: bool = True,
) -> Look:
    """Look at the data and write the project's folder, which must not hold anything yet.

    `measured` takes a few steps of each network, to tell what the training takes. Raises ValueError
    as `look_at` does; nothing is left then.
    """
    check_free(project)
    where = str(Path(data).resolve()) if Path(data).exists() else data
    made = not project.exists()
    project.mkdir(parents=True, exist_ok=True)
    try:
        look = look_at(
            where,
            project / "check",
            gpu=gpu,
            image_size=image_size,
            caption_columns=caption_columns,
        )
        options = configurations(look, gpu=gpu)
        for module in MODULES:
            text = yaml.safe_dump(options[module], sort_keys=False, allow_unicode=True, width=100)
            path = project / f"{module}.yaml"
            path.write_text(f"# {COMMENT[module]}\n{text}", encoding="utf-8")
        prompts = "".join(f"{' '.join(prompt.split())}\n" for prompt in look.prompts)
        (project / PROMPTS).write_text(prompts, encoding="utf-8")
        seconds = measure(project, look.num_images) if measured else {}
        readme = _readme(project, data, look, options, seconds)
        (project / "README.md").write_text(readme, encoding="utf-8")
    except BaseException:
        shutil.rmtree(project, ignore_errors=True)
        if not made:
            project.mkdir()
        raise
    return look


def describe(look: Look) -> list[str]:
    """What was found, a sentence each: the images, the captions, and what to do about bad ones."""
    side, summary = look.summary.shorter_side, look.summary
    size, limit = look.config.image_size, look.config.upscale_limit
    sentences = [
        f"{look.num_images} images, whose shorter sides are {_range(side)} pixels; they are "
        f"trained on at {size} x {size}, the middle of each"
        + (f", the smallest enlarged up to {limit:.2g} times." if limit > 1 else "."),
        f"Captions: {', '.join(look.config.caption_columns)}; written in "
        f"{', '.join(f'{word} ({count})' for word, count in look.writing.items())}, of those that "
        f"were looked at; all but one in twenty have at most {look.longest} characters.",
    ]
    if summary.bad:
        sentences.append(
            f"{summary.bad} of {summary.samples} images cannot be used: "
            f"{breakdown(summary.reasons)}. check/{BAD_SAMPLES} names each. They are left out; to "
            "have them, mend them, delete this project and make it anew."
        )
    else:
        sentences.append("All images can be used.")
    if again := summary.duplicates.get("files"):
        sentences.append(f"{again} files are the same as another; each is trained on as often.")
    if extra := summary.extra_files.get("count"):
        sentences.append(
            f"{extra} files are not used, since nothing names them, such as "
            f"{json.dumps(summary.extra_files['first'][0], ensure_ascii=False)}."
        )
    return sentences


def _range(side: Mapping[str, float]) -> str:
    if side["min"] == side["max"]:
        return f"{side['min']:g}"
    return f"{side['min']:g} to {side['max']:g}, half of them {side['median']:g} or less,"


def in_words(seconds: float) -> str:
    """A time as people say it."""
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _readme(
    project: Path,
    data: str,
    look: Look,
    options: Mapping[str, Mapping[str, Any]],
    seconds: Mapping[str, float],
) -> str:
    rows = []
    for module in MODULES:
        steps, batch = options[module].get("max_steps"), options[module].get("batch_size")
        what = COMMENT[module].partition(":")[0].rstrip(".")
        cells = (module, what, steps or 1, batch or f"all {look.num_images}")
        time = in_words(seconds[module]) if module in seconds else ""
        rows.append("| " + " | ".join(map(str, (*cells, time))) + " |")
    times = (
        f"Together about {in_words(sum(seconds.values()))} on this machine: its time for a few "
        "steps of each network, times their number. Reading, previews and saving come to that."
        if seconds
        else "What it takes was not measured (--no-measure); `latentdiff plan "
        f"{project}` estimates it."
    )
    return README.format(
        name=project.name,
        path=os.fspath(project),
        data=data,
        prompt=look.prompts[0].replace('"', "'"),
        table="\n".join(rows),
        times=times,
        data_lines="\n".join(f"- {sentence}" for sentence in describe(look)),
    )
