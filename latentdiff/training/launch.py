"""Runs a script of the package by `accelerate launch`, in this process or in its torchrun's."""

import logging
import signal
import subprocess
from collections.abc import Sequence
from types import FrameType

from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

INTERRUPTED = 130


def launch(module: str, arguments: Sequence[str]) -> int:
    """Run `python -m module arguments` on the processors that accelerate chooses; its exit code.

    What accelerate's own configuration file says is kept. Control-C reaches the script, which saves
    a checkpoint; this process waits for it, and returns 130.
    """
    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)  # a list of defaults
    options = launch_command_parser().parse_args(["--module", module, *arguments])
    interrupted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True

    previous = signal.signal(signal.SIGINT, note)
    try:
        launch_command(options)
        code = 0
    # Whose tracebacks say less than the script has said; accelerate's --quiet makes 1 of each code.
    except subprocess.CalledProcessError as ended:
        code = ended.returncode
    except ChildFailedError as ended:
        code = ended.get_first_failure()[1].exitcode
    finally:
        signal.signal(signal.SIGINT, previous)
    if interrupted:
        return INTERRUPTED
    return code if code >= 0 else 128 - code  # a shell's number where a signal ended it
