"""`latentdiff push`: a trained model to the Hugging Face Hub."""

import argparse
from pathlib import Path


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser(
        "push", help="upload a model to the Hugging Face Hub", allow_abbrev=False
    )
    parser.set_defaults(run=_push, parser=parser)
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="a folder, such as the `model` of a run")
    add("repo", metavar="OWNER/NAME", help="a repository, which is made if need be")
    add("--private", action="store_true", help="where it is made: for its owner alone")


def _push(arguments: argparse.Namespace) -> None:
    from latentdiff.formats.hub_upload import push_folder

    if not arguments.model.is_dir():
        raise ValueError(
            f"MODEL={arguments.model} is no folder; `latentdiff convert` makes one of a file"
        )
    print(push_folder(arguments.model, arguments.repo, private=arguments.private))
