"""`latentdiff new` and `latentdiff train`: from own images to a model of them, in two commands."""

import argparse
from pathlib import Path

MODULES = ("vae", "clip", "cache", "unet")


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add both commands and their arguments."""
    parser = commands.add_parser(
        "new", help="make a project of your own images", allow_abbrev=False
    )
    parser.set_defaults(run=_new, parser=parser)
    add = parser.add_argument
    add("project", type=Path, metavar="PROJECT", help="a new folder")
    add("--data", required=True, help="folder of images with captions, tars, or a hub data set")
    add("--image_size", type=int, help="32, 64, 128, 256 or 512; default: by images and machine")
    add("--caption_columns", type=_names, help="default: text and text_..., such as text,text_zh")
    add(
        "--measure",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take a few steps of each network, to say how long the training will take",
    )
    parser = commands.add_parser(
        "train", help="train a project, or go on with it, and draw", allow_abbrev=False
    )
    parser.set_defaults(run=_train, parser=parser)
    parser.add_argument("project", type=Path, metavar="PROJECT", help="that `new` made")
    parser.add_argument(
        "module", nargs="?", choices=MODULES, help="one part alone; default: what is not done"
    )


def _names(text: str) -> list[str]:
    return text.split(",")


def _new(arguments: argparse.Namespace) -> None:
    from latentdiff.projects.folder import check_free

    check_free(arguments.project)  # before what takes seconds to import

    import torch

    from latentdiff.projects.new import describe, new_project

    look = new_project(
        arguments.project,
        arguments.data,
        gpu=torch.accelerator.is_available(),
        image_size=arguments.image_size,
        caption_columns=arguments.caption_columns,
        measured=arguments.measure,
    )
    for sentence in describe(look):
        print(sentence)
    print(f"{arguments.project}/README.md says what each part takes; begin with")
    print(f"  latentdiff train {arguments.project}")


def _train(arguments: argparse.Namespace) -> None:
    from latentdiff.projects.folder import check_project

    check_project(arguments.project)  # before what takes seconds to import

    from latentdiff.projects.run import train_project

    if code := train_project(arguments.project, arguments.module):
        raise SystemExit(code)
