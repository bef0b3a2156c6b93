"""Held-out loss: a function of the averaged weights alone, which it leaves as they are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scripts import TWO, launch, run_here
from support.small_run import logged, small_run
from torch import Tensor

from latentdiff.data.shapes import build_shapes
from latentdiff.diffusion import Diffusion
from latentdiff.formats.weights import load_safetensors
from latentdiff.tasks.denoiser.loss import LossConfig
from latentdiff.training.ema_synthesis import find_snapshots
from latentdiff.training.learner import Learner
from latentdiff.training.logging.meter import Metrics
from latentdiff.training.processes import Processes
from latentdiff.training.validation import (
    BINS,
    MAX_EXAMPLES,
    VAL_ERRORS,
    Subset,
    num_draws,
    stratified_t,
    val_indices,
    validation_loss,
)

FLOW = Diffusion("flow", "flow_prediction")
DDPM = Diffusion("linear", "epsilon")


@settings(deadline=None)
@given(
    num_samples=st.integers(0, 3000),
    fraction=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 9),
)
def test_every_example_is_either_validated_or_trained_on(
    num_samples: int, fraction: float, seed: int
) -> None:
    numbers = val_indices(num_samples, fraction, seed=seed)
    assert len(numbers) == min(int(fraction * num_samples), MAX_EXAMPLES)
    rest = Subset(range(num_samples), numbers)
    trained_on = [rest[i] for i in range(len(rest))]
    assert trained_on == sorted(trained_on)
    assert sorted([*trained_on, *numbers.tolist()]) == list(range(num_samples))


def test_the_validation_split_is_a_function_of_number_and_seed() -> None:
    numbers = val_indices(1000, 0.05, seed=1)
    assert np.array_equal(numbers, val_indices(1000, 0.05, seed=1))
    assert not np.array_equal(numbers, val_indices(1000, 0.05, seed=2))
    assert np.isin(numbers, val_indices(1000, 0.1, seed=1)).all()
    assert numbers.tolist() == sorted(set(numbers.tolist()))
    assert abs(numbers.mean() - 500) < 150  # of all the data, not of its beginning


@pytest.mark.parametrize(("num_samples", "fraction"), [(99, 0.01), (0, 0.5), (1000, 0.0)])
def test_too_small_a_fraction_has_no_validation_split(num_samples: int, fraction: float) -> None:
    numbers = val_indices(num_samples, fraction, seed=0)
    assert numbers.tolist() == []
    assert len(Subset(range(num_samples), numbers)) == num_samples


def test_views_are_asked_for_of_the_right_example() -> None:
    class Views:
        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: tuple[int, int]) -> tuple[int, int]:
            return index

    rest = Subset(Views(), np.array([0, 3]))
    assert [rest[i, 7] for i in range(len(rest))] == [(1, 7), (2, 7), (4, 7)]


@pytest.mark.parametrize("count", [1, 2, 7, 256])
@pytest.mark.parametrize("diffusion", [FLOW, DDPM], ids=["flow", "linear"])
def test_each_bin_has_a_time_of_each_example_and_they_fill_it_evenly(
    diffusion: Diffusion, count: int
) -> None:
    t = stratified_t(diffusion, count, seed=0)
    width = diffusion.num_timesteps / BINS
    assert t.shape == (count, BINS)
    for number, column in enumerate(t.T):
        u = column.double().sort().values / width - number
        assert u[0] > 0
        assert u[-1] <= 1
        # Whole times are at most one above, and the bin is 125 wide.
        even = (torch.arange(count) + 0.5) / count
        assert torch.allclose(u, even.double(), rtol=0, atol=1 / width)
    sampled = LossConfig().sample_t(diffusion, 1, generator=torch.Generator())
    assert t.dtype == sampled.dtype
    diffusion.alpha_sigma(t.flatten())  # refuses what is out of range
    assert torch.equal(t, stratified_t(diffusion, count, seed=0))
    assert count == 1 or not torch.equal(t, stratified_t(diffusion, count, seed=1))


LOSSES = torch.rand(20, BINS, generator=torch.Generator().manual_seed(0))
BUCKETS = [row % 3 for row in range(20)]


def test_the_losses_are_means_of_all_examples() -> None:
    asked: list[Sequence[int]] = []

    def score(rows: Sequence[int]) -> Tensor:
        asked.append(rows)
        return LOSSES[list(rows)]

    found = validation_loss(score, BUCKETS, batch_size=4, processes=Processes())
    assert sorted(row for rows in asked for row in rows) == list(range(20))
    for rows in asked:
        assert len(rows) <= 4
        assert len({BUCKETS[row] for row in rows}) == 1
    assert list(found) == ["val_loss", *(f"val_loss_{i}" for i in range(BINS)), VAL_ERRORS]
    means = LOSSES.double().mean(dim=0)
    assert float(found["val_loss"]) == pytest.approx(float(means.mean()))
    for number in range(BINS):
        assert float(found[f"val_loss_{number}"]) == pytest.approx(float(means[number]))
    assert found[VAL_ERRORS].equal(LOSSES.double().mean(dim=1)[:, None])


def test_the_draws_of_an_example_stand_beside_each_other() -> None:
    found = validation_loss(
        lambda rows: LOSSES[list(rows)], BUCKETS, batch_size=4, processes=Processes(), draws=5
    )
    assert found[VAL_ERRORS].equal(LOSSES.double().mean(dim=1).reshape(4, 5))
    assert float(found["val_loss"]) == pytest.approx(float(LOSSES.mean()))


@given(num_val=st.integers(1, MAX_EXAMPLES), every=st.integers(1, 1000), size=st.integers(1, 64))
def test_few_examples_get_as_many_passes_as_many_if_training_has_as_many(
    num_val: int, every: int, size: int
) -> None:
    draws = num_draws(num_val, validate_every=every, batch_size=size)
    assert draws == 1 or draws * num_val * BINS <= every * size
    enough = draws * num_val >= MAX_EXAMPLES
    assert enough or (draws + 1) * num_val * BINS > every * size
    assert draws * num_val < MAX_EXAMPLES + num_val


def test_a_full_split_has_one_noise_as_before() -> None:
    assert num_draws(MAX_EXAMPLES, validate_every=10**6, batch_size=10**6) == 1
    assert num_draws(0, validate_every=1, batch_size=1) == 1


def validated(folder: Path) -> list[dict[str, float]]:
    return [record for record in logged(folder) if "val_loss" in record]


def length_of_average(learner: Learner) -> Metrics:
    return {"val_loss": sum((p.norm() for p in learner.ema.parameters()), torch.zeros(()))}


@pytest.mark.parametrize("until", [1, 4, 5])
def test_the_log_has_what_a_run_without_a_break_would_have(tmp_path: Path, until: int) -> None:
    """Steps 2, 4 and 6 are validated, and the run is taken up again from 0 or from 3."""
    options: dict[str, Any] = {"validate": length_of_average, "validate_every": 2}
    small_run(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        small_run(tmp_path / "broken", until=until, **options)
    small_run(tmp_path / "broken", **options)
    whole, broken = validated(tmp_path / "whole"), validated(tmp_path / "broken")
    assert [record["step"] for record in whole] == [2, 4, 6]
    assert len({record["val_loss"] for record in whole}) == 3
    assert broken == whole


def test_validating_changes_no_weight(tmp_path: Path) -> None:
    small_run(tmp_path / "without")
    small_run(tmp_path / "with", validate=length_of_average, validate_every=1)
    path = Path("checkpoints") / "step-6" / "net.safetensors"
    assert (tmp_path / "with" / path).read_bytes() == (tmp_path / "without" / path).read_bytes()


def test_snapshots_are_written_while_training_and_at_its_end(tmp_path: Path) -> None:
    small_run(tmp_path, ema_lengths=(0.05, 0.1), snapshot_every=4)
    found = find_snapshots(tmp_path / "ema" / "net")
    pairs = [(snapshot.step, snapshot.length) for snapshot in found]
    assert pairs == [(4, 0.05), (4, 0.1), (6, 0.05), (6, 0.1)]


def test_without_lengths_there_are_no_snapshots(tmp_path: Path) -> None:
    small_run(tmp_path, snapshot_every=1)
    assert not (tmp_path / "ema").exists()


TINY = (
    "--unet.block_out_channels=[8,16] --unet.norm_num_groups=4 --unet.attention_head_dim=2 "
    "--unet.down_block_types=[CrossAttnDownBlock2D,DownBlock2D] --val_fraction=0.2 "
    "--unet.up_block_types=[UpBlock2D,CrossAttnUpBlock2D] --batch_size=8 --warmup_steps=2 "
    "--cooldown_steps=0 --mixed_precision=no --preview_every=100 --checkpoint_every=100 "
    "--image_size=32 --preview_prompts=[circle] --vae=emoji --text_encoder=emoji"
)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    build_shapes(folder, count=50, seed=0, size=64)
    return folder


def train_unet(shapes: Path, folder: Path, *args: str) -> None:
    """Run the script on shapes, in this process."""
    run_here("train_unet", *options(shapes, folder, *args))


def options(shapes: Path, folder: Path, *args: str) -> list[str]:
    return [*TINY.split(), f"--data={shapes}", f"--output_dir={folder}", "--max_steps=4", *args]


@pytest.fixture(scope="module")
def whole(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train_unet(shapes, folder, "--validate_every=2")
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    tensors = load_safetensors(folder / "checkpoints" / "step-4" / "unet.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}


@pytest.mark.training
def test_the_script_validates_on_its_split(whole: Path) -> None:
    rows = validated(whole)
    assert [row["step"] for row in rows] == [2, 4]
    names = ["step", "val_loss", *(f"val_loss_{i}" for i in range(BINS))]
    for row in rows:
        assert list(row) == names
        assert row["val_loss"] == pytest.approx(
            np.mean([row[name] for name in names[2:]]), rel=1e-12
        )


@pytest.mark.training
def test_it_scores_the_average_and_leaves_the_weights(
    whole: Path, shapes: Path, tmp_path: Path
) -> None:
    """Another average of the same weights has another loss; how often it is asked changes none."""
    train_unet(shapes, tmp_path / "run", "--validate_every=1", "--ema_decay=0")
    expected, found = weights(whole), weights(tmp_path / "run")
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    rows, others = validated(whole), validated(tmp_path / "run")
    assert [row["step"] for row in others] == [1, 2, 3, 4]
    assert others[-1]["val_loss"] != rows[-1]["val_loss"]


@pytest.mark.processes
def test_two_processes_and_a_resumed_run_find_the_same(
    whole: Path, shapes: Path, tmp_path: Path
) -> None:
    train_unet(shapes, tmp_path / "run", "--validate_every=2", "--max_steps=3")
    launch(TWO, "train_unet", *options(shapes, tmp_path / "run", "--validate_every=2"))
    expected, found = validated(whole), validated(tmp_path / "run")
    assert [row["step"] for row in found] == [2, 3, 4]
    for row, other in ((expected[0], found[0]), (expected[1], found[2])):
        assert other == pytest.approx(row, rel=1e-5)
