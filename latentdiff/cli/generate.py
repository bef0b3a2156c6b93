"""`latentdiff generate`: prompts to pictures in a folder."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser("generate", help="draw pictures", allow_abbrev=False)
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help='such as "a cat" "a dog"')
    parser.add_argument("--model", default="emoji", help="emoji, a folder or a hub id")
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the pictures")
    parser.add_argument("--steps", type=int, default=50, help="more are finer and slower")
    parser.add_argument("--sampler", default="ddim", help="how a step is taken")
    parser.add_argument("--guidance_scale", type=float, default=7.5, help="1 is off")
    parser.add_argument("--negative_prompt", default="", help="what to stay away from")
    parser.add_argument("--num_images", type=int, default=1, help="pictures of each prompt")
    parser.add_argument("--seed", type=int, help="of the first picture; the others count up")
    parser.add_argument("--height", type=int, help="in pixels; default: the model's")
    parser.add_argument("--width", type=int, help="in pixels; default: the model's")
    parser.add_argument("--device", help="such as cpu or cuda; default: an accelerator if any")
    parser.add_argument(
        "--grid",
        action=argparse.BooleanOptionalAction,
        help="write grid.png, all pictures with their prompts; default: if there are several",
    )
    parser.set_defaults(run=_generate, parser=parser)


def _generate(arguments: argparse.Namespace) -> None:
    from latentdiff.formats.diffusers import find_model

    arguments.out.mkdir(parents=True, exist_ok=True)  # a folder that cannot be: before any work
    device = _device(arguments.device)
    folder = find_model(arguments.model)  # before bars are turned off: a download shows its own
    _quiet_transformers()
    from latentdiff.pictures import picture_grid
    from latentdiff.pipeline import Pipeline

    output = Pipeline.from_pretrained(folder, device=device)(
        arguments.prompts,
        steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        negative_prompt=arguments.negative_prompt,
        height=arguments.height,
        width=arguments.width,
        seed=arguments.seed,
        num_images=arguments.num_images,
        sampler=arguments.sampler,
    )
    prompts = [prompt for prompt in arguments.prompts for _ in range(arguments.num_images)]
    paths = _free_paths(arguments.out, output.seeds)
    for path, image, prompt in zip(paths, output.images, prompts, strict=True):
        image.save(path)
        print(f"{path}  {prompt}")
    if arguments.grid or (arguments.grid is None and len(paths) > 1):
        path = arguments.out / "grid.png"
        picture_grid(output.images, prompts, plain=[path.name for path in paths]).save(path)
        print(path)


def _device(name: str | None) -> "torch.device":
    """The named device, checked by using it; without a name an accelerator, or else the CPU."""
    import torch

    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name!r} cannot be used on this machine: {reason}") from error


def _quiet_transformers() -> None:
    """No bars and no advice while weights are read; must run before transformers reads any."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _free_paths(folder: Path, seeds: Sequence[int]) -> list[Path]:
    """<index>-<seed>.png, counted on from the pictures that the folder holds already.

    The prompt is no part of a name: it may hold any character, and too many of them.
    """
    taken = [path.name.split("-")[0] for path in folder.glob("*-*.png")]
    first = 1 + max((int(index) for index in taken if index.isdecimal()), default=-1)
    return [folder / f"{first + i:04d}-{seed}.png" for i, seed in enumerate(seeds)]
