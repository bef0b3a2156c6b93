"""`latentdiff data`: data sets of captioned pictures that build themselves."""

import argparse
from pathlib import Path


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command, its kinds and their arguments."""
    data = commands.add_parser("data", help="make a data set of captioned pictures")
    kinds = data.add_subparsers(metavar="KIND", required=True)
    _add_emoji(kinds.add_parser("emoji", help="every emoji of a font", allow_abbrev=False))
    _add_shapes(kinds.add_parser("shapes", help="scenes of coloured shapes", allow_abbrev=False))


def _add_emoji(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--font", type=Path, help="default: the system's Noto Color Emoji")
    parser.add_argument("--languages", type=_names, default=("en", "zh"), help="such as en,zh")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in pixels")
    parser.set_defaults(run=_data_emoji, parser=parser)


def _add_shapes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--count", type=int, default=10_000, help="number of scenes")
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same scenes")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
    parser.set_defaults(run=_data_shapes, parser=parser)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _data_emoji(arguments: argparse.Namespace) -> None:
    from latentdiff.data.emoji import build_emoji

    groups = build_emoji(
        arguments.out, font=arguments.font, languages=arguments.languages, size=arguments.size
    )
    _report(arguments.out, {split: sum(count.values()) for split, count in groups.items()})


def _data_shapes(arguments: argparse.Namespace) -> None:
    from latentdiff.data.shapes import build_shapes

    counts = build_shapes(
        arguments.out, count=arguments.count, seed=arguments.seed, size=arguments.size
    )
    _report(arguments.out, counts)


def _report(folder: Path, counts: dict[str, int]) -> None:
    print(f"{folder}: " + ", ".join(f"{count} {split}" for split, count in counts.items()))
