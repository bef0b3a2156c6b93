"""A script's configuration: a frozen dataclass, filled from a YAML file and the command line."""

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

T = TypeVar("T")


def parse_config(cls: type[T], args: Sequence[str] | None = None) -> tuple[T, str]:
    """Read `--config file.yaml` and `--key value`; returns the configuration and its full YAML.

    Raises ValueError, in one sentence, for unknown keys, wrong types and values that the
    dataclass refuses. `--help` and `--print_config` print and end the program.
    """
    # So that --help says of each option what its field's docstring does.
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    description = (cls.__doc__ or "").split("\n\n")[0]
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file; later options override it")
    parser.add_class_arguments(cls)
    try:
        namespace: Namespace = parser.parse_args(args)
    except ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from error
    text = parser.dump(namespace, skip_unset=False)
    namespace.pop("config", None)
    return cls(**vars(parser.instantiate(namespace))), text


def write_config(text: str, folder: Path) -> None:
    """Write `config.yaml` into the run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(text, encoding="utf-8")


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main; what its user got wrong ends in one sentence and exit code 2."""
    try:
        main()
    except (ValueError, OSError) as error:  # OSError: a damaged picture, a full disk
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted; run the same command again to go on from the newest checkpoint")
    finally:
        # Readers of data outlive SIGTERM, with which Python ends its children before it waits.
        for reader in multiprocessing.active_children():
            reader.kill()
        # A process that leaves its group open crashes now and then while Python ends.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
