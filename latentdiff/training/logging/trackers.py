"""Trackers: tensorboard, wandb and trackio log what log.jsonl does; a failing one stops no run."""

import os
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from accelerate import Accelerator
from accelerate.tracking import (
    GeneralTracker,
    TensorBoardTracker,
    TrackioTracker,
    WandBTracker,
)
from PIL import Image

PROJECT = "latentdiff"
TrackerName = Literal["tensorboard", "wandb", "trackio"]


class Tracker(GeneralTracker):
    """Wraps one of accelerate's trackers, and switches it off with a warning when it fails.

    It is passed to `Accelerator(log_with=...)`, which calls its methods.
    """

    requires_logging_directory = False

    def __init__(self, name: TrackerName, folder: Path) -> None:
        """`folder` receives the tracker's files."""
        self.name = name
        self.folder = folder
        self._make = _MAKERS[name]
        self.resumed_at = 0
        """The step that the run resumes from, which is known only when it starts."""
        self._inner: GeneralTracker | None = None
        super().__init__()

    @property
    def tracker(self) -> Any:
        """The object inside accelerate's tracker, or None when this tracker is off."""
        return None if self._inner is None else self._inner.tracker  # pyright: ignore[reportAttributeAccessIssue]

    def start(self) -> None:
        """Start the tracker, or resume from what is in its folder."""
        with self._guarded():
            self.folder.mkdir(parents=True, exist_ok=True)
            inner = self._make(self.folder, self.resumed_at)
            inner.start()
            self._inner = inner

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Log the run's configuration."""
        if self._inner is None:
            return
        with self._guarded():
            if self.name == "tensorboard":  # accelerate would write one more folder at each start
                code = yaml.safe_dump(values, allow_unicode=True, sort_keys=False)
                text = "".join(f"    {line}\n" for line in code.splitlines())
                self._inner.log({"configuration": text}, step=self.resumed_at)
            else:
                self._inner.store_init_configuration(values)

    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log scalars by name."""
        if self._inner is not None:
            with self._guarded():
                self._inner.log(dict(values), step=step, **kwargs)

    def log_image(self, path: Path, step: int) -> None:
        """Log an image file."""
        if self._inner is None:
            return
        with self._guarded():
            if self.name == "trackio":
                from trackio import Image as TrackedImage  # pyright: ignore[reportMissingImports]

                self._inner.log({"preview": TrackedImage(path)}, step=step)
            else:
                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("RGB"))[None]  # (1, H, W, 3)
                layout = {"dataformats": "NHWC"} if self.name == "tensorboard" else {}
                self._inner.log_images({"preview": pixels}, step=step, **layout)  # pyright: ignore[reportAttributeAccessIssue]

    def finish(self) -> None:
        """Finish the tracker, if it is on."""
        if self._inner is not None:
            with self._guarded():
                self._inner.finish()
            self._inner = None

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:  # some trackers call sys.exit
            self._inner = None
            warnings.warn(
                f"report_to={self.name} is switched off, and training goes on without it: "
                f"{type(error).__name__}: {' '.join(str(error).split())}",
                stacklevel=2,
            )


def make_trackers(names: Sequence[TrackerName], folder: Path) -> list[Tracker]:
    """The trackers for `Accelerator(log_with=...)`, which are not started yet.

    Raises ValueError, naming option and package, for one that is not installed.
    """
    for name in names:
        if find_spec(name) is None:
            raise ValueError(
                f"report_to={name} needs the package {name}; install it (pip install {name}) or "
                "leave it out"
            )
    return [Tracker(name, folder / name) for name in dict.fromkeys(names)]


@contextmanager
def finishing(accelerator: Accelerator) -> Iterator[None]:
    """Finish the trackers on the way out, in any case: an open one would log the next run too."""
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def start_trackers(accelerator: Accelerator, configuration: Mapping[str, Any], start: int) -> None:
    """Start the accelerator's trackers for a run that resumes from step `start`."""
    for tracker in accelerator.log_with:
        if isinstance(tracker, Tracker):
            tracker.resumed_at = start
    accelerator.init_trackers(PROJECT, config=dict(configuration))


def track_image(accelerator: Accelerator, path: Path, step: int) -> None:
    """Log an image with all trackers, which only the main process has."""
    for tracker in accelerator.trackers:
        if isinstance(tracker, Tracker):
            tracker.log_image(path, step)


def _tensorboard(folder: Path, resumed_at: int) -> GeneralTracker:
    # purge_step hides what a killed run has logged after the step that this one resumes from.
    return TensorBoardTracker(folder.name, folder.parent, purge_step=resumed_at + 1)


def _wandb(folder: Path, resumed_at: int) -> GeneralTracker:
    # wandb resumes the run of the same id, and ignores steps that it already has.
    id_file = folder / "id"
    if not id_file.is_file() or not resumed_at:
        id_file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    name = folder.resolve().parents[1].name
    run = id_file.read_text(encoding="utf-8")
    return WandBTracker(PROJECT, name=name, id=run, resume="allow", dir=str(folder))


def _trackio(folder: Path, resumed_at: int) -> GeneralTracker:
    # trackio reads it when it is imported, which TrackioTracker does.
    os.environ["TRACKIO_DIR"] = str(folder.resolve())
    name = folder.resolve().parents[1].name
    resume = "allow" if resumed_at else "never"
    return TrackioTracker(PROJECT, name=name, resume=resume, embed=False)


_MAKERS: dict[TrackerName, Callable[[Path, int], GeneralTracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
