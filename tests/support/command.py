"""The command `latentdiff`, run in this process."""

import sys
from pathlib import Path

import pytest

from latentdiff.cli import main


def run(*arguments: str) -> int:
    """The exit code, whether main returns it or argparse exits with it."""
    with pytest.raises(SystemExit) as exit_:
        sys.exit(main(arguments))
    return int(exit_.value.code or 0)


def generate(model: str, out: Path, *arguments: str) -> int:
    """Draw two steps of each prompt into a folder."""
    return run("generate", "--model", model, "--steps", "2", "--out", str(out), *arguments)
