"""The run folder: one run at a time, and one configuration."""

from pathlib import Path

import pytest

from latentdiff.formats.weights import save_json
from latentdiff.options import changeable
from latentdiff.tasks.clip.config import TrainCLIP
from latentdiff.tasks.denoiser.config import TrainUNet
from latentdiff.tasks.vae.config import TrainVAE
from latentdiff.training.run_folder import RunFolder, differences


def checkpoint(folder: Path, configuration: dict[str, object]) -> None:
    path = folder / "checkpoints" / "step-3"
    path.mkdir(parents=True)
    save_json({"configuration": configuration}, path / "manifest.json")


def test_a_second_run_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    first = RunFolder(tmp_path, "seed: 1")
    with pytest.raises(ValueError, match="is in use by another run"):
        RunFolder(tmp_path, "seed: 1")
    first.close()
    with RunFolder(tmp_path, "seed: 1"):
        pass


def test_another_configuration_is_refused_by_key_and_value(tmp_path: Path) -> None:
    checkpoint(tmp_path, {"seed": 1, "max_steps": 5, "vae": {"width": [4, 8], "groups": 2}})
    settings = "{seed: 2, max_steps: 9, vae: {width: [4, 16], groups: 2}}"
    message = r"seed was 1 and is 2; vae.width was \[4, 8\] and is \[4, 16\]; go back"
    with pytest.raises(ValueError, match=message):
        RunFolder(tmp_path, settings, may_change={"max_steps"})
    settings = "{seed: 1, max_steps: 9, vae: {width: [4, 8], groups: 2}}"
    RunFolder(tmp_path, settings, may_change={"max_steps"}).close()


def test_keys_that_come_or_go_are_differences() -> None:
    assert differences({"a": {"b": 1}}, {"a": {}}, ()) == [
        "a was 'absent' and is {}",
        "a.b was 1 and is 'absent'",
    ]


def test_an_option_that_has_lost_its_effect_is_no_difference() -> None:
    """What it depends on is: a run of an older version recorded all, with and without effect."""
    before = {"optimizer": "muon", "muon_learning_rate": 0.1, "size": 3, "exclude": {"a": 1}}
    assert differences(before, {"optimizer": "adamw", "size": 3, "exclude": {}}, ()) == [
        "exclude was 'absent' and is {}",
        "exclude.a was 1 and is 'absent'",
        "optimizer was 'muon' and is 'adamw'",
    ]
    assert differences({**before, "old": 1}, before, ()) == []


MAY_CHANGE = {
    # Where the run ends and how it gets there: its past is the same.
    *("max_steps", "cooldown_steps"),
    # What it reports and keeps.
    *("output_dir", "log_every", "preview_every", "preview_prompts", "validate_every"),
    *("snapshot_every", "report_to", "checkpoint_every", "keep_checkpoints", "resume_from"),
    *("save_best", "license"),
    "max_nonfinite_steps",
    # Who does the work and how: the numbers are the same up to rounding.
    *("gradient_accumulation_steps", "sharding", "gradient_checkpointing", "compile"),
    *("num_workers", "in_memory", "timeout"),
}


def test_what_does_not_change_the_past_may_change() -> None:
    assert changeable(TrainUNet) == MAY_CHANGE
    assert changeable(TrainVAE) == changeable(TrainCLIP) == MAY_CHANGE - {"preview_prompts"}
    for key in MAY_CHANGE:
        assert differences({key: 1}, {key: 2}, MAY_CHANGE) == []
        assert differences({key: {"a": 1}}, {}, MAY_CHANGE) == []


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"output_dir=.*file/run cannot be written: Not a directory"
    ):
        RunFolder(tmp_path / "file" / "run", "seed: 1")


def test_what_a_killed_run_left_half_written_goes(tmp_path: Path) -> None:
    """A kill while report.html was written left its temporary file for good."""
    left = tmp_path / ".report.html.123.tmp"
    left.touch()
    (tmp_path / "report.html").touch()
    RunFolder(tmp_path, "seed: 1").close()
    assert not left.exists()
    assert (tmp_path / "report.html").exists()
