"""A script's configuration: a frozen dataclass, filled from a YAML file and the command line."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from jsonargparse import ArgumentParser, Namespace

T = TypeVar("T")


def parse_config(cls: type[T], args: Sequence[str] | None = None) -> tuple[T, str]:
    """Read `--config file.yaml` and `--key value`; returns the configuration and its full YAML.

    Unknown keys and wrong types end the program with one sentence and exit code 2, as do values
    that the dataclass refuses.
    """
    parser = ArgumentParser(description=(cls.__doc__ or "").split("\n\n")[0])
    parser.add_argument("--config", action="config", help="YAML file; later options override it")
    parser.add_class_arguments(cls)
    namespace: Namespace = parser.parse_args(args)
    text = parser.dump(namespace, skip_none=False)
    namespace.pop("config", None)
    instances = parser.instantiate_classes(namespace)
    return cls(**instances.as_dict()), text


def write_config(text: str, folder: Path) -> None:
    """Write `config.yaml` into the run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(text, encoding="utf-8")


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main; what its user got wrong ends in one sentence and exit code 2."""
    try:
        main()
    except ValueError as error:
        sys.exit(_fail(error))
    except KeyboardInterrupt:
        sys.exit("interrupted; run the same command again to go on from the newest checkpoint")


def _fail(error: ValueError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2
