"""`latentdiff eval`: how far drawn images are from true ones."""

import argparse
from pathlib import Path


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser(
        "eval", help="how far two folders of images are apart", allow_abbrev=False
    )
    parser.set_defaults(run=_evaluate, parser=parser)
    add = parser.add_argument
    add("drawn", metavar="DRAWN", type=Path, help="a folder of images")
    add("true", metavar="TRUE", type=Path, help="a folder of images as they should be")
    add(
        "--features",
        metavar="FOLDER",
        type=Path,
        required=True,
        help="of a CLIP whose image tower compares them: RUN/model of train_clip",
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    import torch

    from latentdiff.evaluation.features import Features, compare, images_of

    # The folders first: what is wrong with them is said before a network is loaded.
    sets = [images_of(folder) for folder in (arguments.drawn, arguments.true)]
    features = Features.from_pretrained(arguments.features)
    if (device := torch.accelerator.current_accelerator(check_available=True)) is not None:
        features.clip.to(device)
    drawn, true = (features(images) for images in sets)
    found = compare(drawn, true)
    print(
        f"Fréchet distance {found.frechet:.4g}, kernel distance {found.kernel:.4g} "
        f"({found.num_drawn} drawn and {found.num_true} true images, {features.width} features)"
    )
