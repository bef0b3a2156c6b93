"""Runs a script of the package by `accelerate launch`, in this process or in its torchrun's."""

import logging
import signal
from collections.abc import Sequence
from types import FrameType

from accelerate.commands.launch import launch_command, launch_command_parser

INTERRUPTED = 130


def launch(module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module arguments` on the processors that accelerate chooses; its exit code.

    What accelerate's own configuration file says is kept. Control-C reaches the script, which saves
    a checkpoint; this process waits for it, and returns 130.
    """
    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)  # a list of defaults
    # --quiet: the script has said what is wrong, and a traceback of its launcher says nothing.
    options = launch_command_parser().parse_args(["--quiet", "--module", module, *arguments])
    interrupted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True

    previous = signal.signal(signal.SIGINT, note)
    try:
        launch_command(options)
    except SystemExit as ended:
        return INTERRUPTED if interrupted else int(ended.code or 0)
    finally:
        signal.signal(signal.SIGINT, previous)
    return 0
