"""RunFolder: it admits one run at a time, and only with the configuration it began with."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from filelock import FileLock, Timeout

from latentdiff.formats.weights import load_json
from latentdiff.training.checkpoint_files import MANIFEST, checkpoints
from latentdiff.training.command_line import write_config
from latentdiff.training.processes import Processes


class RunFolder:
    """The folder of a run, locked until `close` or the end of the process, however it ends.

    Open it before anything that takes long: it raises ValueError when the folder cannot be
    written, when another run has locked it, and when it holds checkpoints of another
    configuration, naming the keys. `settings` is the script's configuration as YAML; a resumed
    run may change the options in `may_change`.
    """

    def __init__(
        self,
        path: Path,
        settings: str,
        processes: Processes | None = None,
        *,
        may_change: Collection[str] = (),
    ) -> None:
        self.path = path
        self.settings = settings
        self.may_change = may_change
        self.processes = Processes() if processes is None else processes
        # As a round trip through JSON leaves it, since it is compared with a manifest.
        self.configuration: dict[str, Any] = json.loads(
            json.dumps(yaml.safe_load(settings) or {}, default=str)
        )
        self._lock = FileLock(path / ".lock")
        self.processes.on_main(self._open)

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def write_config(self) -> None:
        """Write the configuration as config.yaml."""
        write_config(self.settings, self.path)

    def close(self) -> None:
        """Release the lock."""
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
            for folder in (self.path, self.path / "model"):  # killed runs': this one has the lock
                for leftover in folder.glob(".*.tmp"):
                    leftover.unlink()
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
        saved = checkpoints(self.checkpoints)
        if not saved:
            return
        try:
            recorded = load_json(saved[-1][1] / MANIFEST)["configuration"]
        except (ValueError, KeyError):
            return  # damaged: loading will say so, and may find an older one
        changed = differences(recorded, self.configuration, self.may_change)
        if changed:
            raise ValueError(
                f"{self.path} holds a run with another configuration: {'; '.join(changed)}; "
                f"go back to that one, delete {self.path} to begin anew, or choose another "
                "output_dir"
            )


def differences(
    recorded: Mapping[str, Any], current: Mapping[str, Any], may_change: Collection[str]
) -> list[str]:
    """A phrase for each key that must not differ but does, such as `seed was 1 and is 2`.

    An option that is not there now has no effect: what it depends on is told if it has changed. One
    that was not there is no difference while it is null.
    """
    before, after = _flat(recorded), _flat(current)
    free = {*may_change, "config", *(recorded.keys() - current.keys())}
    fixed = {key for key in before | after if key.split(".")[0] not in free}
    return [
        f"{key} was {before.get(key, 'absent')!r} and is {after.get(key, 'absent')!r}"
        for key in sorted(fixed)
        if before.get(key) != after.get(key)
    ]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= _flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
