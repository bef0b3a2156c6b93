"""`latentdiff data`: data sets of captioned images that build themselves, and a check of any."""

import argparse
from pathlib import Path


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command, its kinds and their arguments."""
    data = commands.add_parser("data", help="make or check a data set of captioned images")
    data.set_defaults(run=show_help, parser=data)
    kinds = data.add_subparsers(metavar="KIND")
    _add_emoji(kinds.add_parser("emoji", help="every emoji of a font", allow_abbrev=False))
    _add_drawings(
        kinds.add_parser("drawings", help="sets of emoji, in six styles", allow_abbrev=False)
    )
    _add_shapes(kinds.add_parser("shapes", help="scenes of coloured shapes", allow_abbrev=False))
    _add_check(kinds.add_parser("check", help="find what cannot be used", allow_abbrev=False))


def show_help(arguments: argparse.Namespace) -> None:
    """Show what there is to choose from, as for a command that names nothing."""
    arguments.parser.print_help()


def _add_emoji(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--font", type=Path, help="default: the system's Noto Color Emoji")
    parser.add_argument("--languages", type=_names, default=("en", "zh"), help="such as en,zh")
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    parser.set_defaults(run=_data_emoji, parser=parser)


def _add_drawings(parser: argparse.ArgumentParser) -> None:
    languages = ("en", "zh", "es", "fr", "de")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--packages", type=Path, help="folder of tarballs; default: npm fetches them"
    )
    parser.add_argument("--languages", type=_names, default=languages, help="such as en,zh")
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    parser.add_argument("--sets", type=_names, help="such as noto,emojione; default: six of nine")
    parser.set_defaults(run=_data_drawings, parser=parser)


def _add_shapes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--count", type=int, default=10_000, help="number of scenes")
    parser.add_argument("--seed", type=int, default=0, help="the same seed draws the same scenes")
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels")
    parser.set_defaults(run=_data_shapes, parser=parser)


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="a folder, .tar or .parquet files, or a hub data set")
    parser.add_argument("--split", help="default: all")
    parser.add_argument("--out", type=Path, help="folder for the two files; default: the data's")
    parser.add_argument("--max_bad", type=float, default=0.01, help="fraction that may be bad")
    parser.add_argument("--image_size", type=int, default=1, help="smaller images are bad")
    parser.add_argument("--upscale_limit", type=float, default=1.0, help="unless by this factor")
    parser.add_argument("--bucket_step", type=int, default=0, help="sizes by aspect ratio")
    parser.add_argument("--max_aspect", type=float, default=2.0, help="the longest of these")
    parser.add_argument(
        "--batch_size", type=int, help="with --bucket_step: say which sizes have fewer images"
    )
    parser.add_argument("--image_column", default="image")
    parser.add_argument(
        "--caption_columns", type=_names, default=("text",), help='such as text,text_zh; "" is none'
    )
    parser.add_argument("--allow_empty_caption", action="store_true")
    parser.add_argument(
        "--instance_prompts", nargs="+", default=(), help="captions in place of those in the data"
    )
    parser.add_argument("--max_megapixels", type=float, default=64, help="larger is bad")
    parser.add_argument("--first_frame", action="store_true", help="take it from animations")
    parser.add_argument("--background", default="white", help="behind transparent images")
    parser.add_argument("--num_workers", type=int, default=0, help="threads that decode")
    parser.set_defaults(run=_data_check, parser=parser)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _data_emoji(arguments: argparse.Namespace) -> None:
    from latentdiff.data.emoji import build_emoji

    groups = build_emoji(
        arguments.out, font=arguments.font, languages=arguments.languages, size=arguments.size
    )
    _report(arguments.out, {split: sum(count.values()) for split, count in groups.items()})


def _data_drawings(arguments: argparse.Namespace) -> None:
    from latentdiff.data.drawings.build import build_drawings
    from latentdiff.data.drawings.sets import SIX

    styles = build_drawings(
        arguments.out,
        packages=arguments.packages,
        languages=arguments.languages,
        size=arguments.size,
        sets=SIX if arguments.sets is None else arguments.sets,
    )
    _report(arguments.out, {split: sum(count.values()) for split, count in styles.items()})


def _data_shapes(arguments: argparse.Namespace) -> None:
    from latentdiff.data.shapes import build_shapes

    counts = build_shapes(
        arguments.out, count=arguments.count, seed=arguments.seed, size=arguments.size
    )
    _report(arguments.out, counts)


def _data_check(arguments: argparse.Namespace) -> None:
    from dataclasses import fields

    from latentdiff.data.bad_samples import advice, breakdown
    from latentdiff.data.buckets import small_buckets
    from latentdiff.data.check import check_data
    from latentdiff.data.config import DataConfig

    names = {field.name for field in fields(DataConfig)} - {"split"}
    config = DataConfig(**{name: v for name, v in vars(arguments).items() if name in names})
    if arguments.batch_size is not None and not config.bucket_step:
        raise ValueError("--batch_size has no effect without --bucket_step")
    if config.instance_prompts and (
        config.caption_columns != ("text",) or config.allow_empty_caption
    ):
        raise ValueError(
            "--caption_columns and --allow_empty_caption have no effect with --instance_prompts"
        )
    out = arguments.out
    if out is None:
        if not Path(config.data).exists():
            raise ValueError(f"--out is needed: data={config.data!r} is no folder to write into")
        out = Path(config.data) if Path(config.data).is_dir() else Path(config.data).parent
    summary = check_data(config, out, split=arguments.split)
    rows = {
        "samples": ", ".join(f"{count} {split}" for split, count in summary.splits.items()),
        "bad": f"{summary.bad}: {breakdown(summary.reasons)}" if summary.bad else "0",
        "converted": breakdown(summary.notes) or "0",
        "shorter side": _range(summary.shorter_side),
        "aspect ratios": breakdown(summary.aspect_ratios),
        "sizes": "; ".join(
            ", ".join(f"{count} {size}" for size, count in counts.items()) + f" {split}"
            for split, counts in summary.buckets.items()
        ),
        "captions each": _range(summary.captions_each),
        "characters each": _range(summary.caption_lengths),
        "same files": str(summary.duplicates["files"]),
        "extra files": str(summary.extra_files["count"]),
    }
    for name, value in rows.items():
        if value:
            print(f"{name:16}{value}")
    if arguments.batch_size is not None:
        for split, counts in summary.buckets.items():
            if sentence := small_buckets(counts, arguments.batch_size):
                print(f"{split}: {sentence}")
    print(f"written: {out}/bad_samples.jsonl, summary.json")
    if summary.bad / max(1, summary.samples) > config.max_bad:
        raise ValueError(
            f"{summary.bad} of {summary.samples} samples are bad, more than "
            f"max_bad={config.max_bad}: {breakdown(summary.reasons)}; "
            f"{advice(summary.bad, summary.samples)}"
        )


def _range(spread: dict[str, float]) -> str:
    if not spread:
        return "none"
    return f"{spread['min']:g} to {spread['max']:g}, median {spread['median']:g}"


def _report(folder: Path, counts: dict[str, int]) -> None:
    print(f"{folder}: " + ", ".join(f"{count} {split}" for split, count in counts.items()))
