"""Checkpoints: complete or absent, the newest few, safetensors and JSON only."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentdiff.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from latentdiff.training.learner import Learner, OptimizerConfig


class Interrupted(Learner):
    """A learner in whose saving the user presses Control-C."""

    def tensors(self) -> dict[str, Tensor]:
        raise KeyboardInterrupt


def learner(seed: int, *, width: int = 4, kind: type[Learner] = Learner) -> Learner:
    torch.manual_seed(seed)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    return kind(nn.Linear(3, width), OptimizerConfig(warmup_steps=0), accelerator)


def train(subject: Learner, steps: int) -> None:
    for _ in range(steps):
        subject.update(subject.model(torch.randn(5, 3)).square().mean())


def state(subject: Learner) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in subject.tensors().items()}


def test_a_checkpoint_restores_every_learner_and_says_the_step(tmp_path: Path) -> None:
    old = {"unet": learner(0), "critic": learner(1)}
    train(old["unet"], 3)
    train(old["critic"], 2)
    save_checkpoint(tmp_path, 7, old, keep=2)
    new = {"unet": learner(2), "critic": learner(3)}
    assert load_checkpoint(tmp_path, new) == 7
    for name in old:
        torch.testing.assert_close(state(new[name]), state(old[name]), rtol=0, atol=0)
    assert (new["unet"].num_updates, new["critic"].num_updates) == (3, 2)
    names = sorted(path.name for path in (tmp_path / "step-7").iterdir())
    assert names == ["critic.safetensors", "state.json", "unet.safetensors"]


def test_without_a_checkpoint_training_starts_at_zero(tmp_path: Path) -> None:
    subject = learner(0)
    before = state(subject)
    assert load_checkpoint(tmp_path / "none", {"net": subject}) == 0
    torch.testing.assert_close(state(subject), before, rtol=0, atol=0)


def test_the_newest_few_are_kept_in_the_order_of_numbers(tmp_path: Path) -> None:
    subject = {"net": learner(0)}
    for step in (8, 9, 10, 11):
        save_checkpoint(tmp_path, step, subject, keep=3)
    assert [step for step, _ in checkpoints(tmp_path)] == [9, 10, 11]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-11", "step-9"]
    assert load_checkpoint(tmp_path, subject) == 11


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    subject = learner(0)
    save_checkpoint(tmp_path, 5, {"net": subject}, keep=2)
    train(subject, 1)
    save_checkpoint(tmp_path, 5, {"net": subject}, keep=2)
    other = learner(1)
    load_checkpoint(tmp_path, {"net": other})
    torch.testing.assert_close(state(other), state(subject), rtol=0, atol=0)


def test_an_interrupted_checkpoint_is_absent_and_in_nobodys_way(tmp_path: Path) -> None:
    whole = learner(0)
    save_checkpoint(tmp_path, 1, {"a": whole, "b": whole}, keep=2)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, {"a": whole, "b": learner(1, kind=Interrupted)}, keep=2)
    assert (tmp_path / ".step-2.tmp" / "a.safetensors").is_file()
    assert load_checkpoint(tmp_path, {"a": learner(2), "b": learner(3)}) == 1
    save_checkpoint(tmp_path, 2, {"a": whole, "b": whole}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2"]


def test_other_folders_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("step-3.bak", "step-", "step-x", "old-step-4", ".step-9.tmp"):
        (tmp_path / name).mkdir()
    assert checkpoints(tmp_path) == []


def test_checkpoints_of_another_network_are_refused_with_advice(tmp_path: Path) -> None:
    """Changing --unet.… and running the same command again ended in a traceback."""
    save_checkpoint(tmp_path, 4, {"net": learner(0)}, keep=1)
    with pytest.raises(
        ValueError, match=r"step-4 was made with .*model.weight is \(4, 3\).*output_dir"
    ):
        load_checkpoint(tmp_path, {"net": learner(0, width=5)})


def test_checkpoints_open_whatever_their_first_byte(tmp_path: Path) -> None:
    """A safetensors file begins with the length of its header; one in 32 passed for a pickle."""
    seen = set()
    for length in range(0, 128, 4):
        network = nn.Module()
        network.register_parameter("w" * (1 + length), nn.Parameter(torch.ones(2)))
        subject = Learner(network, OptimizerConfig(), Accelerator(cpu=True, mixed_precision="no"))
        save_checkpoint(tmp_path, 1, {"net": subject}, keep=1)
        seen.add((tmp_path / "step-1" / "net.safetensors").read_bytes()[0])
        assert load_checkpoint(tmp_path, {"net": subject}) == 1
    assert 0x80 in seen


@pytest.mark.parametrize("name", ["net.safetensors", "state.json"])
def test_damaged_checkpoints_are_refused_by_name(tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path, 4, {"net": learner(0)}, keep=1)
    path = tmp_path / "step-4" / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=name):
        load_checkpoint(tmp_path, {"net": learner(0)})
    path.unlink()
    with pytest.raises(ValueError, match=name):
        load_checkpoint(tmp_path, {"net": learner(0)})
