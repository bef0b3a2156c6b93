"""`latentdiff explain`: one figure of how an image is drawn."""

import argparse
from pathlib import Path

from latentdiff.cli.reading import say_reading

OPTIONS = ("steps", "seed", "guidance_scale", "negative_prompt", "sampler", "height", "width")


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser(
        "explain", help="a figure of how an image is drawn", allow_abbrev=False
    )
    parser.set_defaults(run=_explain, parser=parser)
    add = parser.add_argument
    add("prompt", metavar="PROMPT", help='such as "a cat"')
    add("--model", default="emoji", help="emoji (the default), a folder, a file or a hub id")
    add("--out", type=Path, default=Path("explained.png"), help="a .png, .svg or .pdf to write")
    add("--steps", type=int, help="denoising steps; default: 50, or a student's")
    add("--seed", type=int, default=0, help="of the image; default: 0")
    add("--guidance_scale", type=float, help="1 is off; default: 7.5, or 1 for a student")
    add("--negative_prompt", help="what to stay away from")
    add("--sampler", help="one that evaluates the network once a step; default: ddim")
    add("--height", type=int, help="in pixels; default: the model's")
    add("--width", type=int, help="in pixels; default: the model's")


def _explain(arguments: argparse.Namespace) -> None:
    say_reading(arguments.model, "float32")
    import torch

    from latentdiff.explaining.figure import check_path, save_figure
    from latentdiff.explaining.record import explain
    from latentdiff.pipeline import Pipeline

    check_path(arguments.out)
    given = {name: getattr(arguments, name) for name in OPTIONS}
    is_there = torch.accelerator.is_available()
    accelerator = torch.accelerator.current_accelerator() if is_there else None
    pipe = Pipeline.from_pretrained(arguments.model, device=accelerator)
    explanation = explain(pipe, arguments.prompt, **given)
    save_figure(explanation, arguments.out)
    print(arguments.out)
