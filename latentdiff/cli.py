"""The command line: `latentdiff generate`, `latentdiff data`, `latentdiff env`.

Only arguments, files and messages: what a command does is the library's business. torch and
transformers are imported inside the commands, so that `latentdiff --help` answers at once.
"""

import argparse
import difflib
import os
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import latentdiff

if TYPE_CHECKING:
    import torch

USER_ERROR = 2  # argparse's exit code for a wrong command line
PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "safetensors",
    "huggingface_hub",
    "pillow",
    "accelerate",
    "datasets",
    "diffusers",
    "open_clip_torch",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 2 after one sentence about what was wrong."""
    parsed, unknown = _parser().parse_known_args(arguments)
    if unknown:
        parsed.parser.unknown(unknown[0])
    try:
        with _one_line_warnings():
            parsed.run(parsed)
    except (ValueError, OSError) as error:
        print(f"{parsed.parser.prog}: {error}", file=sys.stderr)
        return USER_ERROR
    except ModuleNotFoundError as error:  # data sets need packages that drawing does not
        print(
            f"{parsed.parser.prog} needs the package {error.name}: pip install 'latentdiff[train]'",
            file=sys.stderr,
        )
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"{parsed.parser.prog}: interrupted", file=sys.stderr)
        return 130  # what shells report for SIGINT
    return 0


class _Parser(argparse.ArgumentParser):
    """argparse, with one sentence for an error instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def unknown(self, argument: str) -> NoReturn:
        """Refuse an argument, naming the option that was perhaps meant."""
        options = [name for action in self._actions for name in action.option_strings]
        near = difflib.get_close_matches(argument.split("=")[0], options, n=1)
        self.error(f"unknown argument {argument}" + (f"; did you mean {near[0]}?" if near else ""))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="latentdiff",
        description="Draw pictures from prompts, and make data sets to train on.",
    )
    parser.add_argument("--version", action="version", version=latentdiff.__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_generate(commands.add_parser("generate", help="draw pictures", allow_abbrev=False))
    data = commands.add_parser("data", help="make a data set of captioned pictures")
    kinds = data.add_subparsers(metavar="KIND", required=True)
    _add_emoji(kinds.add_parser("emoji", help="every emoji of a font", allow_abbrev=False))
    _add_shapes(kinds.add_parser("shapes", help="scenes of coloured shapes", allow_abbrev=False))
    env = commands.add_parser("env", help="versions and devices, for a bug report")
    env.set_defaults(run=_env, parser=env)
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
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


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Show warnings that are meant for users as one line each, and developers' not at all."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(f"latentdiff: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning)
        warnings.showwarning = show
        yield


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


def _env(arguments: argparse.Namespace) -> None:
    import torch

    print(f"latentdiff {latentdiff.__version__}")
    print(f"Python {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        try:
            print(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"{package} is not installed")
    print(f"CPU: {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        print("accelerator: none")
        return
    for index in range(torch.accelerator.device_count()):
        name = torch.get_device_module(accelerator).get_device_name(index)
        print(f"accelerator: {accelerator.type}:{index}, {name}")


if __name__ == "__main__":
    sys.exit(main())
