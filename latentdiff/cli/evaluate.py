"""`latentdiff eval`: distances between a folder of drawn images and one of true images."""

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

    # The folders first, so that their errors come before a network is loaded.
    sets = [images_of(folder) for folder in (arguments.drawn, arguments.true)]
    features = Features.from_pretrained(arguments.features)
    if (device := torch.accelerator.current_accelerator(check_available=True)) is not None:
        features.clip.to(device)
    drawn, true = (features(images) for images in sets)
    comparison = compare(drawn, true)
    print(
        f"Fréchet distance {comparison.frechet:.4g}, kernel distance {comparison.kernel:.4g} "
        f"({comparison.num_drawn} drawn and {comparison.num_true} true images, "
        f"{features.width} features)"
    )
