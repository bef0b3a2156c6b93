"""Trackers: they get what the log gets, go on where it goes on, and cannot end a training."""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from support.runs import options
from support.small_run import STEPS, logged, small_run

from latentdiff.training.logging.trackers import Tracker, TrackerName, make_trackers
from latentdiff.training.run import Run


def needs(name: str) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")


def train(folder: Path, *names: TrackerName, until: int | None = None) -> Accelerator:
    return small_run(folder, report_to=names, until=until)


def events(folder: Path) -> Any:
    """What tensorboard shows of a run folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that it imports
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = EventAccumulator(str(folder / "trackers" / "tensorboard"))
    found.Reload()
    return found


def test_tensorboard_shows_every_number_of_the_log_and_the_previews(tmp_path: Path) -> None:
    needs("tensorboard")
    train(tmp_path, "tensorboard")
    found, records = events(tmp_path), logged(tmp_path)
    assert len(records) == STEPS
    assert set(found.Tags()["scalars"]) == set(records[0]) - {"step"}
    for name in found.Tags()["scalars"]:
        assert [event.step for event in found.Scalars(name)] == [r["step"] for r in records]
        values = [event.value for event in found.Scalars(name)]
        assert values == pytest.approx([r[name] for r in records])
    (image,) = found.Images("preview")
    assert (image.step, image.width, image.height) == (STEPS, 6, 4)
    (text,) = found.Tensors("configuration/text_summary")
    assert "<b>猫</b>" in text.tensor_proto.string_val[0].decode()


@pytest.mark.parametrize("until", [1, 5])
def test_a_resumed_run_goes_on_in_its_curves(tmp_path: Path, until: int) -> None:
    """Steps after the checkpoint that were logged before the fault are there once."""
    needs("tensorboard")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "tensorboard", until=until)
    assert events(tmp_path).Scalars("loss")[-1].step == until
    train(tmp_path, "tensorboard")
    shown = events(tmp_path).Scalars("loss")
    assert [event.step for event in shown] == list(range(1, STEPS + 1))
    values = [record["loss"] for record in logged(tmp_path)]
    assert [event.value for event in shown] == pytest.approx(values)


def test_a_finished_run_leaves_its_curves_as_they_are(tmp_path: Path) -> None:
    needs("tensorboard")
    train(tmp_path, "tensorboard")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    train(tmp_path, "tensorboard")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_wandb_keeps_one_run_for_a_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, "wandb", until=5)
    train(tmp_path, "wandb")
    names = [path.name for path in tmp_path.rglob("*.wandb") if not path.parent.is_symlink()]
    identity = (tmp_path / "trackers" / "wandb" / "id").read_text()
    assert names == [f"run-{identity}.wandb"] * 2
    assert len(list(tmp_path.rglob("preview_*.png"))) == 1


def test_trackio_keeps_its_database_in_the_run_folder(tmp_path: Path) -> None:
    needs("trackio")
    train(tmp_path, "trackio")
    assert len(list((tmp_path / "trackers" / "trackio").glob("*.db"))) == 1


def test_without_the_option_there_are_no_trackers(tmp_path: Path) -> None:
    assert options().loop.report_to == ()
    assert train(tmp_path).trackers == []
    assert not (tmp_path / "trackers").exists()


def test_a_tracker_that_is_not_installed_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentdiff.training.logging.trackers.find_spec", lambda name: None)
    config = options(report_to=("wandb",), output_dir=tmp_path / "run")
    with pytest.raises(ValueError, match=r"^report_to=wandb needs the package wandb; .*\w$"):
        Run(config, "")
    assert not (tmp_path / "run").exists()


ENDS = [RuntimeError("no\nroom"), BrokenPipeError(32, "Broken pipe"), SystemExit("no key")]


@pytest.mark.parametrize("error", ENDS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("method", ["__init__", "start", "log", "log_images", "finish"])
def test_a_tracker_that_fails_is_switched_off_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, error: BaseException
) -> None:
    """Fault 20 of the list of faults: at any time, with one warning and whatever it raises."""
    needs("tensorboard")
    calls = []

    def fail(*args: Any, **kwargs: Any) -> None:
        calls.append(method)
        raise error

    train(tmp_path / "well", "tensorboard")
    with monkeypatch.context() as patch:
        patch.setattr(f"accelerate.tracking.TensorBoardTracker.{method}", fail)
        with pytest.warns(UserWarning, match="report_to=tensorboard is switched off") as caught:
            accelerator = train(tmp_path / "ill", "tensorboard")
    assert len(caught) == len(calls) == 1
    assert "\n" not in str(caught[0].message)
    assert [tracker.tracker for tracker in accelerator.trackers] == [None]
    well, ill = logged(tmp_path / "well"), logged(tmp_path / "ill")
    assert [record["loss"] for record in ill] == [record["loss"] for record in well]
    assert (tmp_path / "ill" / "checkpoints" / f"step-{STEPS}").is_dir()


def test_a_tracker_that_cannot_write_is_switched_off(tmp_path: Path) -> None:
    needs("tensorboard")
    (tmp_path / "trackers").write_text("in the way")
    with pytest.warns(UserWarning, match="report_to=tensorboard is switched off"):
        train(tmp_path, "tensorboard")
    assert len(logged(tmp_path)) == STEPS


def test_a_tracker_asked_for_twice_is_there_once(tmp_path: Path) -> None:
    needs("tensorboard")
    (tracker,) = make_trackers(("tensorboard", "tensorboard"), tmp_path)
    assert isinstance(tracker, Tracker)
    assert tracker.name == "tensorboard"
