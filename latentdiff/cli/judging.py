"""The work of `latentdiff eval judge` and `distance`: draw, judge, write, print."""

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from latentdiff.cli.drawing import find_device, load_pipeline
from latentdiff.data.crop_flip import crop_to
from latentdiff.data.folder import check_free
from latentdiff.evaluation.contact_sheet import Cell, contact_sheet
from latentdiff.evaluation.controls import controls
from latentdiff.evaluation.distances import Comparison, compare
from latentdiff.evaluation.drawing import draw_prompts, read_settings, side_of, through_vae
from latentdiff.evaluation.features import images_of
from latentdiff.evaluation.intervals import Interval, wilson_interval
from latentdiff.evaluation.judge import Judge, Verdicts
from latentdiff.evaluation.kept_features import kept_features
from latentdiff.evaluation.looks import find_look
from latentdiff.evaluation.prompts import TEMPLATES, Prompt, choose_prompts
from latentdiff.evaluation.references import References, read_references
from latentdiff.evaluation.results import Figure, Result, write_result
from latentdiff.evaluation.shares import shares

SHEET = 128  # drawings on the contact sheet, at most


def judge(arguments: argparse.Namespace) -> None:
    """Draw if there is a model, and say what share of the drawings is right; see its --help."""
    check_free(arguments.out)
    named = find_look(arguments.judge)  # first, as it may be missing
    folder = Path(arguments.drawn)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        true = _references(arguments, arguments.data, min(next(images_of(folder)).size))
    else:
        folder = arguments.out / "images"
        true = _draw(arguments, folder)
    drawn = _references(arguments, folder, true.pixels.shape[-1])
    wanted = _wanted(drawn, true, arguments)
    drawing = read_settings(folder)
    vae_model = arguments.vae or drawing.get("model")
    if vae_model is None:
        raise ValueError(f"{folder} does not say what drew it: name a model as --vae")
    device = find_device(arguments.device)
    vae = load_pipeline(vae_model, dtype="float32", device=device).vae

    path = arguments.reference_features
    features = None if path is None else kept_features(path, named, true)
    judging = Judge(named.look, true, features=features)
    verdicts = judging((drawn.image(i) for i in range(len(drawn))), wanted)
    ceiling = judging(through_vae(vae, true, wanted), wanted)
    splits = [true.splits[i] for i in wanted]
    columns = [str(row.get("column", "all")) for row in drawn.rows]
    figures = shares(verdicts, ceiling, splits, columns)
    for name, images in controls(true, wanted).items():
        control = judging(images, wanted)
        figures[f"concept, control {name}"] = _share(control.concept_right)
        figures[f"style, control {name}"] = _share(control.style_right)
    words = json.dumps([drawn.rows[i].get("text") for i in range(len(drawn))], ensure_ascii=False)
    result = Result(
        settings={
            "judge": named.description,
            "data": true.fingerprint,
            "image_size": true.pixels.shape[-1],
            "num_images": len(drawn),
            "wanted": hashlib.sha256(f"{wanted} {words}".encode()).hexdigest(),
            **drawing.get("options", {}),
        },
        subject={"drawn": arguments.drawn, "vae": vae_model, **drawing},
        figures=figures,
    )
    write_result(result, arguments.out / "result.json")
    _sheet(drawn, true, wanted, verdicts).save(arguments.out / "sheet.png")
    print(f"{named.description}: {len(drawn)} drawings among {len(true)} true images")
    _print(figures)
    print(f"{arguments.out}/result.json, sheet.png")


def distance(arguments: argparse.Namespace) -> None:
    """Say how far two folders are apart; see `latentdiff eval distance --help`."""
    # The folders first, so that their errors come before a network is loaded.
    sets = [images_of(folder) for folder in (arguments.drawn, arguments.true)]
    named = find_look(arguments.features, whole=True)
    side, digests = arguments.image_size, [hashlib.sha256(), hashlib.sha256()]
    drawn, true = (
        named.look(_sized(images, side, digest))
        for images, digest in zip(sets, digests, strict=True)
    )
    comparison = compare(drawn, true)
    print(
        f"Fréchet distance {comparison.frechet:.4g}, "
        f"kernel distance {comparison.kernel:.4g} ({_ends(comparison.kernel_interval)}), "
        f"precision {comparison.precision:.1%}, recall {comparison.recall:.1%} "
        f"({comparison.num_drawn} drawn and {comparison.num_true} true images, "
        f"{drawn.shape[1]} features)"
    )
    if arguments.out is not None:
        result = Result(
            settings={
                "features": named.description,
                "true": digests[1].hexdigest(),
                "image_size": side,
                "num_drawn": len(drawn),
            },
            subject={"drawn": str(arguments.drawn), "sha256": digests[0].hexdigest()},
            figures=_distances(comparison),
        )
        write_result(result, arguments.out)


def _draw(arguments: argparse.Namespace, folder: Path) -> References:
    """Draw the prompts, and return the true images in the size of the drawings."""
    device = find_device(arguments.device)
    pipe = load_pipeline(arguments.drawn, dtype=arguments.dtype, device=device)
    references = _references(arguments, arguments.data, side_of(pipe))
    templates = _templates(arguments.prompts)
    prompts = choose_prompts(references, templates, seed=arguments.seed)
    _tell_fewer(prompts, references, sum(templates.values()))
    names = ("steps", "sampler", "guidance_scale", "guidance_interval")
    options = {name: getattr(arguments, name) for name in names}
    recorded = {"seed": arguments.seed, "dtype": arguments.dtype, "templates": templates}
    draw_prompts(
        pipe,
        prompts,
        references,
        folder,
        options=options,
        settings={
            "model": arguments.drawn,
            "model_sha256": pipe.fingerprint(),
            "device": pipe.device.type,
            "batch_size": arguments.batch_size,
            "options": options | recorded,
        },
        batch_size=arguments.batch_size,
    )
    return references


def _templates(pairs: Sequence[Sequence[str]] | None) -> dict[str, int]:
    if pairs is None:
        return TEMPLATES
    for template, count in pairs:
        if not count.isdecimal():
            raise ValueError(f"--prompts {template!r} {count}: COUNT must be a whole number")
    templates = {template: int(count) for template, count in pairs}
    if len(templates) < len(pairs):
        twice = next(t for t in templates if sum(t == other for other, _ in pairs) > 1)
        raise ValueError(f"--prompts {twice!r} is given twice; give it once, with the whole COUNT")
    return templates


def _tell_fewer(prompts: Sequence[Prompt], references: References, asked: int) -> None:
    """Print how many prompts a split has, where they are fewer than were asked for."""
    splits = Counter(references.splits[prompt.wanted] for prompt in prompts)
    for split, count in splits.items():
        if count < asked:
            print(
                f"split {split!r} has {count} prompts instead of {asked}: each pair of a concept "
                "and a style is drawn once"
            )


def _references(arguments: argparse.Namespace, data: Path, side: int) -> References:
    return read_references(
        data,
        image_size=side,
        concept=arguments.concept_column,
        style=arguments.style_column,
    )


def _wanted(drawn: References, true: References, arguments: argparse.Namespace) -> list[int]:
    """The true image that each drawing should show."""
    pairs = list(zip(drawn.concepts, drawn.styles, strict=True))
    missing = next((pair for pair in pairs if pair not in true.index), None)
    if missing is not None:
        raise ValueError(
            f"{arguments.data} has no image of {arguments.concept_column}={missing[0]!r} in "
            f"{arguments.style_column}={missing[1]!r}, which a drawing should show"
        )
    return [true.index[pair] for pair in pairs]


def _share(right: Tensor) -> Figure:
    count, total = int(right.sum()), len(right)
    return Figure(count / total, *wilson_interval(count, total), of=total)


def _distances(comparison: Comparison) -> dict[str, Figure]:
    c = comparison
    return {
        "kernel": Figure(c.kernel, *c.kernel_interval, of=c.num_drawn),
        "precision": Figure(c.precision, *c.precision_interval, of=c.num_drawn),
        "recall": Figure(c.recall, *c.recall_interval, of=c.num_true),
    }


def _sized(images: Iterator[Image.Image], side: int | None, digest: Any) -> Iterator[Image.Image]:
    """The images, brought to one size where it is given; their pixels go into the digest."""
    for image in images:
        sized = image if side is None else crop_to(image, (side, side))
        digest.update(f"{sized.size}".encode() + sized.tobytes())
        yield sized


def _sheet(
    drawn: References, true: References, wanted: Sequence[int], verdicts: Verdicts
) -> Image.Image:
    """Drawings from all languages and splits, evenly spaced."""
    count = min(SHEET, len(drawn))
    chosen = [i * len(drawn) // count for i in range(count)]
    cells = [
        Cell(
            drawn.image(i),
            true.image(wanted[i]),
            str(drawn.rows[i].get("text", drawn.concepts[i])),
            bool(verdicts.concept_right[i] & verdicts.style_right[i]),
        )
        for i in chosen
    ]
    return contact_sheet(cells)


def _print(figures: dict[str, Figure]) -> None:
    width = max(map(len, figures))
    for name, figure in figures.items():
        ceiling = "" if figure.ceiling is None else f"  ceiling {figure.ceiling:6.1%}"
        interval = f"{figure.low:.1%} to {figure.high:.1%}"
        print(f"{name:{width}}  {figure.value:6.1%}  ({interval:16}) of {figure.of:5}{ceiling}")


def _ends(interval: Interval) -> str:
    return f"95 %: {interval.low:.4g} to {interval.high:.4g}"
