"""AdamW with moments of eight bits, on a CPU; skipped where bitsandbytes is not installed."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import make_learner
from torch import Tensor, nn

from latentdiff.training.adamw8bit import BLOCK, MIN_SIZE, moment_bytes
from latentdiff.training.checkpoint import load_checkpoint, save_checkpoint
from latentdiff.training.learner import Learner

INSTALLED = pytest.mark.skipif(
    find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed",
)


def learner(**changes: Any) -> Learner:
    """Of a network with a matrix of eight bits, a frozen one, and biases of float32."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(40, 120), nn.Tanh(), nn.Linear(120, 40), nn.Linear(40, 2))
    network[2].requires_grad_(False)
    options = {"optimizer": "adamw8bit", "learning_rate": 1e-2, "warmup_steps": 0, "max_steps": 99}
    return make_learner(network, **(options | changes))


def train(subject: Learner, start: int, stop: int) -> list[float]:
    norms = []
    for step in range(start, stop):
        draw = torch.Generator().manual_seed(step)
        x = torch.randn(16, 40, generator=draw)
        loss = (subject.forward_model(x) - x[:, :2]).square().mean()
        norms.append(float(subject.update(loss)))
    return norms


def weights(subject: Learner) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in subject.model.named_parameters()}


@INSTALLED
def test_it_steps_nearly_as_adamw_does() -> None:
    eight, full = learner(), learner(optimizer="adamw")
    start = weights(eight)
    train(eight, 0, 30)
    train(full, 0, 30)
    for name, weight in weights(full).items():
        moved = (weight - start[name]).norm()
        assert (weights(eight)[name] - weight).norm() <= 0.05 * moved
    assert torch.equal(weights(eight)["2.weight"], start["2.weight"])


@INSTALLED
def test_its_moments_take_what_is_said() -> None:
    subject = learner()
    train(subject, 0, 1)
    of_all = subject.tensors()
    for name, parameter in subject.trained.items():
        state = {k: v for k, v in of_all.items() if k.startswith(f"optimizer.{name}.")}
        tables = ("step", "qmap1", "qmap2")
        held = sum(v.nbytes for k, v in state.items() if not k.endswith(tables))
        assert held == moment_bytes(parameter.numel())
    assert of_all["optimizer.0.weight.state1"].dtype == torch.uint8
    assert moment_bytes(MIN_SIZE - 1) == 8 * (MIN_SIZE - 1)
    assert moment_bytes(MIN_SIZE + 1) == 2 * (MIN_SIZE + 1 + 4 * (MIN_SIZE // BLOCK + 1))


@INSTALLED
def test_a_restored_learner_goes_on_bit_for_bit(tmp_path: Path) -> None:
    straight, first, second = learner(), learner(), learner()
    expected = train(straight, 0, 12)
    norms = train(first, 0, 5)
    save_checkpoint(tmp_path, 5, {"network": first}, keep=1, manifest={})
    assert load_checkpoint(tmp_path, {"network": second}, manifest={}) == 5
    assert norms + train(second, 5, 12) == expected
    found, wanted = second.tensors(), straight.tensors()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@INSTALLED
def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    subject = learner()
    train(subject, 0, 3)
    before = {name: tensor.clone() for name, tensor in subject.tensors().items()}
    norm = subject.update(subject.forward_model(torch.full((1, 40), torch.inf)).sum())
    assert not norm.isfinite()
    assert subject.skipped == 1
    after = subject.tensors()
    assert all(torch.equal(after[name], before[name]) for name in before)
    train(subject, 4, 5)
    assert torch.isfinite(torch.cat([w.flatten() for w in weights(subject).values()])).all()


def test_without_bitsandbytes_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match=r"optimizer='adamw8bit' needs bitsandbytes \(pip install"):
        learner()


@pytest.mark.parametrize("sharding", ["full", "zero1", "zero2"])
def test_it_cannot_be_sharded(sharding: str) -> None:
    with pytest.raises(ValueError, match=f"must be 'adamw' with sharding='{sharding}': bitsandb"):
        learner(sharding=sharding)
