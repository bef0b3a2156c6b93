"""`latentdiff eval`: drawings judged by their captions, a VAE, two folders, two results."""

import argparse
from pathlib import Path

from latentdiff.cli.data import show_help
from latentdiff.cli.generate import DTYPES

JUDGES = ("network", "edges")  # or the folder of a CLIP
DRAWING = {
    "prompts": None,
    "steps": 50,
    "sampler": "ddim",
    "guidance_scale": 7.5,
    "guidance_interval": None,
    "seed": 0,
    "dtype": "float32",
    "batch_size": 32,
}
"""The options of drawing with their defaults, which they have only where a model is drawn with."""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command, its kinds and their arguments."""
    evaluate = commands.add_parser("eval", help="how good drawn images are")
    evaluate.set_defaults(run=show_help, parser=evaluate)
    kinds = evaluate.add_subparsers(metavar="KIND")
    _add_judge(kinds.add_parser("judge", help="what drawings show", allow_abbrev=False))
    _add_vae(kinds.add_parser("vae", help="what a VAE gives back", allow_abbrev=False))
    _add_distance(
        kinds.add_parser("distance", help="how far two folders are apart", allow_abbrev=False)
    )
    _add_compare(kinds.add_parser("compare", help="two results", allow_abbrev=False))


def _add_judge(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_judge, parser=parser, drawing=DRAWING)
    add = parser.add_argument
    add("drawn", metavar="DRAWN", help="a model, or a folder of drawings with metadata.jsonl")
    add("data", metavar="DATA", type=Path, help="true images with the columns concept and style")
    add("--out", type=Path, required=True, help="a new folder for result.json and sheet.png")
    _add_looking(parser)
    add("--vae", metavar="MODEL", help="for the ceiling; default: that of the drawings' model")
    drawing = parser.add_argument_group("how to draw, where DRAWN is a model")
    add = drawing.add_argument
    add(
        "--prompts",
        action="append",
        nargs=2,
        metavar=("TEMPLATE", "COUNT"),
        help='such as "{text}, {in_style}" 300, of each split; may be given several times',
    )
    add("--steps", type=int, help="default: 50")
    add("--sampler", help="default: ddim")
    add("--guidance_scale", type=float, help="default: 7.5")
    add("--guidance_interval", type=float, nargs=2, metavar=("LOW", "HIGH"))
    add("--seed", type=int, help="of the choice and of the first image; default: 0")
    add("--dtype", choices=DTYPES, help="default: float32")
    add("--batch_size", type=int, help="images drawn at once; default: 32")


def _add_looking(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--judge", default="network", help=f"{', '.join(JUDGES)} or a CLIP's folder")
    add("--concept_column", default="concept")
    add("--style_column", default="style")
    add(
        "--reference_features",
        metavar="FILE",
        type=Path,
        help="keeps what takes minutes, the features of the true images, for the next call",
    )
    add("--device", help="such as cpu or cuda; default: an accelerator if any")


def _add_vae(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_vae, parser=parser)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a model, or a VAE alone: RUN/model of train_vae.py")
    add("data", metavar="DATA", type=Path, help="true images with the columns concept and style")
    add("--count", type=int, default=600, help="of the images, chosen at random")
    add("--image_size", type=int, help="default: the size that the VAE was trained on")
    add("--out", metavar="JSON", type=Path, help="a file for the result")
    _add_looking(parser)


def _add_distance(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_distance, parser=parser)
    add = parser.add_argument
    add("drawn", metavar="DRAWN", type=Path, help="a folder of images")
    add("true", metavar="TRUE", type=Path, help="a folder of images as they should be")
    add("--features", default="network", help="network, or the folder of a CLIP: RUN/model")
    add("--image_size", type=int, help="side to which both are brought; default: as they are")
    add("--out", metavar="JSON", type=Path, help="a file for the result")


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_compare, parser=parser)
    for name in ("first", "second"):
        parser.add_argument(name, metavar="JSON", type=Path, help="of eval judge, vae or distance")


def _judge(arguments: argparse.Namespace) -> None:
    from latentdiff.cli.judging import judge

    judge(arguments)


def _vae(arguments: argparse.Namespace) -> None:
    from latentdiff.cli.ceiling import judge_vae

    judge_vae(arguments)


def _distance(arguments: argparse.Namespace) -> None:
    from latentdiff.cli.distance import distance

    distance(arguments)


def _compare(arguments: argparse.Namespace) -> None:
    from latentdiff.evaluation.results import compare_results, read_result

    first, second = (read_result(path) for path in (arguments.first, arguments.second))
    for name, a, b, (low, high) in compare_results(first, second):
        chance = "within chance" if low <= 0 <= high else "more than chance"
        print(
            f"{name:28} {a.value:.4g} -> {b.value:.4g}  ({b.value - a.value:+.3g}, 95 %: "
            f"{low:+.3g} to {high:+.3g}, {chance})"
        )
