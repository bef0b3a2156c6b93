"""A network that learns its few training images by heart is told; one that learns is not."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scripts import run_here

from latentdiff.data.shapes import build_shapes
from latentdiff.training.by_heart import (
    ERRORS_FILE,
    LEAST_EXAMPLES,
    HeldOutErrors,
    fraction_for,
    has_risen,
    split_in_words,
)
from latentdiff.training.validation import val_indices

LEVELS = torch.tensor([0.1, 0.5, 2.0, 7.0])[:, None]  # of four examples, which differ much
SAID = "the network begins to learn the training images by heart"


def told(path: Path, changes: list[float], *, start: int = 0) -> list[int]:
    """The steps at which it is said, where all examples change from step to step so."""
    errors = HeldOutErrors(path, start)
    steps = range(start + 1, len(changes) + 1)
    return [step for step in steps if errors.add(step, LEVELS + changes[step - 1])]


def test_each_rise_above_a_least_loss_is_said_once(tmp_path: Path) -> None:
    changes = [0.0, -0.1, -0.05, 0.0, -0.2, -0.15]
    assert told(tmp_path / "errors", changes) == [3, 6]


@pytest.mark.parametrize("at", range(1, 6))
def test_a_resumed_run_says_what_the_whole_one_does(tmp_path: Path, at: int) -> None:
    """It was killed after a validation that it does again."""
    changes = [0.0, -0.1, -0.05, 0.0, -0.2, -0.15]
    before = told(tmp_path / "errors", changes[: at + 1])
    after = told(tmp_path / "errors", changes, start=at)
    assert [step for step in before if step <= at] + after == [3, 6]
    whole = told(tmp_path / "whole", changes)
    assert whole == [3, 6]
    assert (tmp_path / "errors").read_bytes() == (tmp_path / "whole").read_bytes()


def test_the_sentence_has_both_losses_and_what_helps(tmp_path: Path) -> None:
    errors = HeldOutErrors(tmp_path / "errors", 0)
    assert errors.add(400, LEVELS) == ""
    assert errors.add(500, LEVELS + 0.1) == (
        "step 500: the validation loss has risen from 2.4 (step 400) to 2.5: the network begins to "
        "learn the training images by heart; the model of step 400 was better with others; "
        "--save_best true keeps it, and a run with --max_steps 400, more images or a lower "
        "learning_rate helps"
    )


def test_losses_with_other_noises_are_not_compared(tmp_path: Path) -> None:
    errors = HeldOutErrors(tmp_path / "errors", 0)
    assert errors.add(1, LEVELS) == ""
    assert errors.add(2, LEVELS.expand(4, 3) + 1) == ""
    assert errors.add(3, LEVELS.expand(4, 3) + 2) != ""


def test_a_loss_that_is_not_finite_is_no_least_one(tmp_path: Path) -> None:
    errors = HeldOutErrors(tmp_path / "errors", 0)
    for step, loss in enumerate([float("nan"), 1.0, float("nan")]):
        assert errors.add(step, LEVELS + loss) == ""
    assert errors.add(4, LEVELS + 1.5) != ""


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(LEAST_EXAMPLES, 50))
def test_what_all_examples_share_does_not_hide_a_rise(seed: int, n: int) -> None:
    """Examples differ ten times more than they change."""
    rng = np.random.default_rng(seed)
    before = rng.uniform(0, 10, n)
    change = rng.uniform(0.5, 1, n)
    assert has_risen(before, before + change)
    assert not has_risen(before, before - change)
    assert not has_risen(before[:2], before[:2] + change[:2])


def test_a_rise_that_is_none_is_not_said() -> None:
    """Each step moves all examples a bit, by more than their spread."""
    before = np.linspace(1.3, 1.5, 27)
    assert not has_risen(before, before + 0.002)
    assert has_risen(before, before + 0.02)


def test_chance_seldom_makes_a_rise() -> None:
    rng = np.random.default_rng(0)
    before = rng.uniform(0, 1, (2000, 20))
    found = [has_risen(one, one + rng.normal(0, 0.1, 20)) for one in before]
    assert 0.01 < np.mean(found) < 0.05  # 3 % of Student's t with 19 degrees of freedom


@given(num_samples=st.integers(2, 10_000), count=st.integers(1, 3))
def test_the_advised_fraction_holds_out_as_many_as_it_says(num_samples: int, count: int) -> None:
    if count < num_samples:
        fraction = fraction_for(count, num_samples)
        assert fraction < 1
        assert count <= len(val_indices(num_samples, fraction, seed=0)) <= count + 1
        assert len(str(fraction)) <= len(str(num_samples)) + 2


def words(num_val: int, num_samples: int, draws: int, fraction: float = 0.01) -> str:
    return split_in_words(
        num_val, num_samples, val_fraction=fraction, draws=draws, validate_every=50
    )


def test_a_split_that_cannot_warn_says_which_can() -> None:
    assert words(0, 20, 1) == (
        "no validation: val_fraction=0.01 of 20 images is not one; --val_fraction 0.05 for 1 or "
        "--val_fraction 0.15 for 3"
    )
    assert words(2, 20, 9, 0.1).endswith(
        "2 of 20 images, each with 9 noises; to say whether the "
        "network learns by heart needs 3 of them: --val_fraction 0.15 for 3"
    )
    assert words(0, 1, 1) == "no validation: val_fraction=0.01 of 1 images is not one"
    assert words(5, 20, 9).endswith("each with 9 noises")
    assert words(256, 10_000, 1) == words(0, 20, 1, 0) == ""


TINY = (
    "--unet.block_out_channels=[16,32] --unet.norm_num_groups=4 --unet.attention_head_dim=2 "
    "--unet.down_block_types=[CrossAttnDownBlock2D,DownBlock2D] --ema_decay=0.98 --batch_size=4 "
    "--unet.up_block_types=[UpBlock2D,CrossAttnUpBlock2D] --learning_rate=0.003 --warmup_steps=2 "
    "--cooldown_steps=0 --mixed_precision=no --preview_every=9999 --checkpoint_every=9999 "
    "--image_size=32 --preview_prompts=[circle] --vae=emoji --text_encoder=emoji "
    "--check_latents=false --validate_every=25"
)


def train(data: Path, run: Path, *args: str) -> None:
    run_here("train_unet", *TINY.split(), f"--data={data}", f"--output_dir={run}", *args)


def weights(model: Path) -> bytes:
    return (model / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.mark.training
def test_four_images_are_learned_by_heart_and_a_resumed_run_says_it_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_shapes(tmp_path / "few", count=7, seed=0, size=64)
    options = (tmp_path / "few", tmp_path / "run", "--val_fraction=0.43", "--save_best=true")
    train(*options, "--max_steps=25")
    then = weights(tmp_path / "run" / "model")
    said = capsys.readouterr().out
    assert "3 of 7 images, each with 4 noises" in said
    assert SAID not in said
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    train(options[0], tmp_path / "whole", *options[2:], "--max_steps=75")
    whole = [line for line in capsys.readouterr().out.splitlines() if SAID in line]
    assert len(whole) == 1
    train(*options, "--max_steps=50")
    train(*options, "--max_steps=75")
    resumed = [line for line in capsys.readouterr().out.splitlines() if SAID in line]
    assert resumed == whole
    errors = [(tmp_path / name / ERRORS_FILE).read_bytes() for name in ("run", "whole")]
    assert errors[0] == errors[1]
    assert [json.loads(line)["step"] for line in errors[0].splitlines()] == list(range(25, 76, 25))
    for name in ("run", "whole"):  # what a run that ended at the best step left
        assert weights(tmp_path / name / "best") == then != weights(tmp_path / name / "model")


@pytest.mark.training
def test_a_network_that_learns_is_not_accused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_shapes(tmp_path / "many", count=300, seed=0, size=64)
    train(tmp_path / "many", tmp_path / "run", "--val_fraction=0.1", "--max_steps=150")
    assert SAID not in capsys.readouterr().out
