"""RunFolder: one run at a time in a folder, and always with the configuration it began with."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from filelock import FileLock, Timeout

from latentdiff.formats.weights import load_json
from latentdiff.training.checkpoint import MANIFEST, checkpoints
from latentdiff.training.config import write_config
from latentdiff.training.processes import Processes

MAY_CHANGE = frozenset(
    {
        # Where the run ends and how it gets there: its past is the same.
        "max_steps",
        "cooldown_steps",
        # What it reports and keeps.
        "output_dir",
        "log_every",
        "preview_every",
        "preview_prompts",
        "validate_every",
        "snapshot_every",
        "report_to",
        "checkpoint_every",
        "keep_checkpoints",
        "resume_from",
        "max_bad_steps",
        # Who does the work and how: the numbers are the same up to rounding.
        "accumulation",
        "sharding",
        "gradient_checkpointing",
        "compile",
        "num_workers",
        "timeout",
        "config",
    }
)
"""Keys that may differ when a run is resumed; any other makes another run."""


class RunFolder:
    """The folder of a run, held until `close` or the end of the process, however it ends.

    Open it before anything that takes long: it raises ValueError when the folder cannot be
    written, when another run is in it, and when it holds checkpoints of another configuration,
    and then names the keys. `settings` is the script's configuration as YAML.
    """

    def __init__(self, path: Path, settings: str, processes: Processes | None = None) -> None:
        self.path = path
        self.settings = settings
        self.processes = Processes() if processes is None else processes
        # As JSON would give it back: that is what it will be compared with.
        self.configuration: dict[str, Any] = json.loads(
            json.dumps(yaml.safe_load(settings) or {}, default=str)
        )
        self._lock = FileLock(path / ".lock")
        self.processes.on_first(self._open)

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    def write_config(self) -> None:
        """Keep the configuration as config.yaml, beside the results."""
        write_config(self.settings, self.path)

    def close(self) -> None:
        """Let other runs in."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
            self._lock.acquire(timeout=0)
            for left in self.path.glob(".*.tmp"):  # of killed runs; nobody else is here now
                left.unlink()
        except Timeout as error:
            raise ValueError(
                f"output_dir={self.path} is in use by another run; wait for its end or choose "
                "another output_dir"
            ) from error
        except OSError as error:
            raise ValueError(
                f"output_dir={self.path} cannot be written: {error.strerror}"
            ) from error
        try:
            self._check_configuration()
        except ValueError:
            self.close()
            raise

    def _check_configuration(self) -> None:
        found = checkpoints(self.checkpoints)
        if not found:
            return
        try:
            recorded = load_json(found[-1][1] / MANIFEST)["configuration"]
        except (ValueError, KeyError):
            return  # damaged: loading will say so, and may find an older one
        changed = differences(recorded, self.configuration)
        if changed:
            raise ValueError(
                f"{self.path} holds a run with another configuration: {'; '.join(changed)}; "
                "go back to that one or choose another output_dir"
            )


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A phrase for each key that differs and may not, such as `seed was 1 and is 2`."""
    before, after = _flat(was), _flat(now)
    return [
        f"{key} was {before.get(key, 'absent')!r} and is {after.get(key, 'absent')!r}"
        for key in sorted(before.keys() | after.keys())
        if key.split(".")[0] not in MAY_CHANGE
        and (key not in before or key not in after or before[key] != after[key])
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= _flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
