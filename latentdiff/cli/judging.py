"""The work of `latentdiff eval judge`: draw, judge, write, print."""

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from latentdiff.cli.ceiling import load_vae, psnr_words
from latentdiff.cli.drawing import load_pipeline
from latentdiff.data.folder import check_free
from latentdiff.device import find_device
from latentdiff.evaluation.ceiling import mean_psnr, through_vae
from latentdiff.evaluation.contact_sheet import Cell, contact_sheet
from latentdiff.evaluation.controls import controls
from latentdiff.evaluation.drawing import SETTINGS, draw_prompts, read_settings
from latentdiff.evaluation.features import images_of
from latentdiff.evaluation.judge import Judge, Verdicts
from latentdiff.evaluation.kept_features import kept_features
from latentdiff.evaluation.looks import find_look
from latentdiff.evaluation.prompts import TEMPLATES, Prompt, choose_prompts
from latentdiff.evaluation.references import References, read_references
from latentdiff.evaluation.results import Figure, Result, write_result
from latentdiff.evaluation.shares import share, shares
from latentdiff.models.vae import VAE
from latentdiff.request import Request

SHEET = 128  # drawings on the contact sheet, at most


def judge(arguments: argparse.Namespace) -> None:
    """Draw if there is a model, and say what share of the drawings is right; see its --help."""
    folder, vae = Path(arguments.drawn), None
    draws = not folder.is_dir() or (folder / "model_index.json").is_file()
    _settle_drawing(arguments, draws=draws)
    if not (draws and _is_begun(arguments.out)):
        check_free(arguments.out)
    device = find_device(arguments.device)
    named = find_look(arguments.judge, device=device)  # first, as it may be missing
    if draws:
        folder = arguments.out / "images"
        true, vae = _draw(arguments, folder, device)
    else:
        true = _references(arguments, arguments.data, min(next(images_of(folder)).size))
    drawing = read_settings(folder)
    side = true.pixels.shape[-1]
    drawn = _drawings(arguments, folder, side)
    wanted = _wanted(drawn, true, arguments)
    vae_model = arguments.vae or drawing.get("model")
    if vae_model is None:
        raise ValueError(f"{folder} does not say what drew it: name a model as --vae")
    if vae is None or arguments.vae is not None:
        vae = load_vae(vae_model, device)

    path = arguments.reference_features
    features = None if path is None else kept_features(path, named, true)
    judging = Judge(named.look, true, features=features)
    verdicts = judging((drawn.image(i) for i in range(len(drawn))), wanted)
    given_back = list(through_vae(vae, true, wanted))
    psnr = mean_psnr(given_back, true, wanted)
    splits = [true.splits[i] for i in wanted]
    columns = [str(row.get("column", "all")) for row in drawn.rows]
    figures = shares(verdicts, judging(given_back, wanted), splits, columns)
    for name, images in controls(true, wanted).items():
        control = judging(images, wanted)
        figures[f"concept, control {name}"] = share(control.concept_right)
        figures[f"style, control {name}"] = share(control.style_right)
    result = Result(
        settings={
            "judge": named.description,
            "data": true.fingerprint,
            "image_size": side,
            "num_images": len(drawn),
            "wanted": _digest(drawn, wanted),
            **drawing.get("options", {}),
        },
        subject={"drawn": arguments.drawn, "vae": vae_model, **drawing},
        figures={**figures, "PSNR of the VAE": psnr},
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    _sheet(drawn, true, wanted, verdicts).save(arguments.out / "sheet.png")
    write_result(result, arguments.out / "result.json")
    print(f"{named.description}: {len(drawn)} drawings among {len(true)} true images")
    _print(figures)
    print(f"The ceiling is that of the VAE, {psnr_words(psnr)}.")
    print(f"{arguments.out}/result.json, sheet.png")


def _settle_drawing(arguments: argparse.Namespace, *, draws: bool) -> None:
    """Give the options of drawing their defaults. Raises ValueError for what cannot be.

    Before anything is written: a folder that was begun with a wrong option has to be deleted.
    """
    for name, default in arguments.drawing.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
        elif not draws:
            raise ValueError(
                f"--{name} is for drawing, but {arguments.drawn} holds drawings and no model; "
                "leave it out"
            )
    if arguments.batch_size < 1:
        raise ValueError(f"batch_size={arguments.batch_size} must be at least 1")
    if sum(_templates(arguments.prompts).values()) < 1:
        raise ValueError("--prompts: the COUNTs are 0 together; at least one prompt is drawn")
    Request("", seed=arguments.seed, **_options(arguments))


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of each drawing that the pipeline has too."""
    names = ("steps", "sampler", "guidance_scale", "guidance_interval")
    return {name: getattr(arguments, name) for name in names}


def _is_begun(out: Path) -> bool:
    """Whether drawing was interrupted there, or what follows it."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    return names <= {"images", "sheet.png"} and (out / "images" / SETTINGS).is_file()


def _digest(drawn: References, wanted: list[int]) -> str:
    """SHA-256 of what the drawings should show, and of the words that asked for it."""
    words = json.dumps([row.get("text") for row in drawn.rows], ensure_ascii=False)
    return hashlib.sha256(f"{wanted} {words}".encode()).hexdigest()


def _draw(
    arguments: argparse.Namespace, folder: Path, device: torch.device
) -> tuple[References, VAE]:
    """Draw the prompts; return the true images in the size of the drawings, and the VAE."""
    pipe = load_pipeline(arguments.drawn, dtype=arguments.dtype, device=device)
    references = _references(arguments, arguments.data, pipe.side)
    templates = _templates(arguments.prompts)
    prompts = choose_prompts(references, templates, seed=arguments.seed)
    _tell_fewer(prompts, references, sum(templates.values()))
    options = _options(arguments)
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
    return references, pipe.vae.float()


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


def _drawings(arguments: argparse.Namespace, folder: Path, side: int) -> References:
    """Read drawings. What was drawn here has columns of its own, whatever those of DATA are."""
    if (folder / SETTINGS).is_file():
        return read_references(folder, image_size=side)
    return _references(arguments, folder, side)


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
