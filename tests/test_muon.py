"""Muon: its step against torch's own, and what a learner with it needs to go on from."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from support.runs import make_learner, options
from support.tiny import UNET
from torch import Tensor, nn

from latentdiff.models.discriminator import Discriminator
from latentdiff.models.precision import computes_bf16
from latentdiff.models.unet import UNet
from latentdiff.training import muon
from latentdiff.training.learner import Learner
from latentdiff.training.muon import Muon, hidden_matrices, orthogonalised
from latentdiff.training.optimizer import OptimizerConfig

SHAPES = [(8, 8), (8, 8), (6, 10), (10, 6), (6, 20), (20, 6), (16, 4)]
RATES: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}


def parameters(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]


def give_gradients(parameters: list[nn.Parameter], step: int) -> None:
    draw = torch.Generator().manual_seed(step + 1)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=draw)


def test_matrices_step_as_in_torch() -> None:
    ours, theirs = parameters(SHAPES), parameters(SHAPES)
    subject = Muon(ours, [], **RATES)
    reference = torch.optim.Muon(theirs, **RATES, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        for optimizer, group in ((subject, ours), (reference, theirs)):
            give_gradients(group, step)
            optimizer.step()
    for mine, its in zip(ours, theirs, strict=True):
        wide = max(mine.shape) >= muon.WIDE * min(mine.shape)  # rounded in another order
        tolerance = {"rtol": 0, "atol": 1e-3} if wide else {}
        torch.testing.assert_close(mine, its, **tolerance)
        moment = reference.state[its]["momentum_buffer"]
        assert torch.equal(subject.state[mine]["momentum_buffer"], moment)


@pytest.mark.parametrize("rank", [2, 12])
def test_wide_matrices_are_iterated_to_the_same(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly, and in bfloat16 no further from it than torch's way."""
    left, right, little = parameters([(3, 12, rank), (3, rank, 90), (3, 12, 90)])
    matrices = (left @ right + 0.01 * little).detach().double()

    def found(wide: float, dtype: torch.dtype) -> Tensor:
        monkeypatch.setattr(muon, "WIDE", wide)
        return orthogonalised(matrices.to(dtype)).double()

    exact = found(float("inf"), torch.float64)
    torch.testing.assert_close(found(2, torch.float64), exact, rtol=0, atol=1e-11)
    ours, theirs = (found(wide, torch.bfloat16) - exact for wide in (2, float("inf")))
    assert ours.norm() < 1.5 * theirs.norm()


def test_other_parameters_step_as_by_adamw() -> None:
    ours, theirs = parameters([(5, 3), (7,)]), parameters([(5, 3), (7,)])
    subject = Muon([], ours, betas=(0.9, 0.95), **RATES)
    reference = torch.optim.AdamW(theirs, betas=(0.9, 0.95), fused=True, **RATES)
    for step in range(5):
        for optimizer, group in ((subject, ours), (reference, theirs)):
            give_gradients(group, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (40, 4, 3, 3), (8, 16, 1, 1)])
def test_a_convolution_steps_as_its_flattened_matrix(shape: tuple[int, ...]) -> None:
    (kernel,) = parameters([shape])
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    for step in range(3):
        give_gradients([kernel], step)
        assert kernel.grad is not None
        matrix.grad = kernel.grad.flatten(1).clone()
        if step == 0:
            both = [Muon([p], [], **RATES) for p in (kernel, matrix)]
        for optimizer in both:
            optimizer.step()
    assert torch.equal(kernel.flatten(1), matrix)


def test_the_weights_memory_format_changes_no_bit() -> None:
    shape = (8, 4, 3, 3)
    (plain,), (last,) = parameters([shape]), parameters([shape])
    last.data = last.data.to(memory_format=torch.channels_last)
    optimizers = [Muon([p], [], **RATES) for p in (plain, last)]
    for step in range(3):
        for p, optimizer in zip((plain, last), optimizers, strict=True):
            give_gradients([p], step)
            optimizer.step()
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain, last)


def test_matrices_of_one_shape_step_together_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    together, alone = parameters(SHAPES * 2), parameters(SHAPES * 2)
    give_gradients(together, 0)
    give_gradients(alone, 0)
    Muon(together, [], **RATES).step()
    monkeypatch.setattr(muon, "STACK", 1)
    Muon(alone, [], **RATES).step()
    torch.testing.assert_close(together, alone)


def test_singular_values_become_nearly_one() -> None:
    draw = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, 16, 40, generator=draw, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(matrices, full_matrices=False)
    found = U.mT @ orthogonalised(matrices) @ Vh.mT  # diagonal: the singular vectors stay
    values = found.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(found, torch.diag_embed(values))
    assert 0.6 < values.min() < values.max() < 1.3


def test_the_matrices_are_those_of_the_blocks() -> None:
    """The first and the last layer, the embedding of the time, norms and biases are AdamW's."""
    network = UNet(UNET)
    chosen = set(hidden_matrices(network))
    others = {name for name, p in network.named_parameters() if p not in chosen and p.ndim > 1}
    layers = ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
    assert others == {f"{name}.weight" for name in layers}
    assert all(p.ndim in (2, 4) for p in chosen)
    assert hidden_matrices(Discriminator()) == []


def test_frozen_matrices_are_left_out() -> None:
    network = UNet(UNET)
    network.mid_block.requires_grad_(False)  # pyright: ignore[reportOptionalMemberAccess] # it has one
    frozen = {p for p in network.parameters() if not p.requires_grad}
    assert not frozen & set(hidden_matrices(network))


def network(seed: int = 0) -> nn.Module:
    """A convolution and a linear layer for Muon, between a first and a last one."""
    torch.manual_seed(seed)
    block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(36, 6))
    return nn.Sequential(nn.Conv2d(2, 4, 1), block, nn.Linear(6, 2))


def learner(seed: int = 0, accelerator: Accelerator | None = None, **changes: Any) -> Learner:
    flat: dict[str, Any] = {"optimizer": "muon", "learning_rate": 0.01, "muon_learning_rate": 0.02}
    flat |= {"max_steps": 20, "warmup_steps": 4, "cooldown_steps": 5, "ema_decay": 0.8}
    return make_learner(network(seed), accelerator, **(flat | changes))


def loss_of(model: Any, step: int) -> Tensor:
    draw = torch.Generator().manual_seed(step)
    x, y = torch.randn(7, 2, 3, 3, generator=draw), torch.randn(7, 2, generator=draw)
    return (model(x) - y).square().mean()


def train(subject: Learner, start: int, stop: int) -> list[float]:
    return [
        float(subject.update(loss_of(subject.forward_model, step))) for step in range(start, stop)
    ]


def test_a_learner_steps_each_part_at_its_own_rate() -> None:
    subject, reference = learner(weight_decay=0.1), network()
    chosen = hidden_matrices(reference)
    assert len(chosen) == 2
    others = [p for p in reference.parameters() if not any(p is one for one in chosen)]
    dtype = torch.bfloat16 if computes_bf16(torch.device("cpu")) else torch.float32
    optimizer = Muon(chosen, others, lr=1.0, weight_decay=0.1, dtype=dtype)
    config = subject.config
    for step in range(20):
        subject.update(loss_of(subject.forward_model, step))
        for group in optimizer.param_groups:
            rate = config.learning_rate_at(step, max_steps=20)
            group["lr"] = 2 * rate if group["muon"] else rate
        optimizer.zero_grad()
        loss_of(reference, step).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), config.max_grad_norm)
        optimizer.step()
    torch.testing.assert_close(
        dict(subject.model.named_parameters()), dict(reference.named_parameters())
    )
    assert subject.learning_rate == config.learning_rate_at(19, max_steps=20)


def test_a_restored_learner_goes_on_bit_for_bit() -> None:
    straight, first = learner(), learner()
    expected = train(straight, 0, 12)
    norms = train(first, 0, 5)
    kept = {name: tensor.clone() for name, tensor in first.tensors().items()}
    assert "optimizer.1.0.weight.momentum_buffer" in kept
    assert "optimizer.1.0.weight.exp_avg" not in kept
    assert "optimizer.0.weight.exp_avg_sq" in kept
    second = learner(seed=1)
    second.load_tensors(kept, num_updates=5)
    assert norms + train(second, 5, 12) == expected
    found, wanted = second.tensors(), straight.tensors()
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_without_a_finite_gradient_changes_no_bit(bad: float, start: int) -> None:
    subject, reference = learner(), learner()
    train(subject, 0, start)
    train(reference, 0, start)
    before = {name: tensor.clone() for name, tensor in subject.tensors().items()}
    subject.update(loss_of(subject.forward_model, 3) * bad)
    assert int(subject.skipped) == 1
    after = subject.tensors()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    reference.num_updates = start + 1
    assert train(subject, 5, 9) == train(reference, 5, 9)


def test_the_scale_of_half_precision_skips_and_is_restored() -> None:
    def scaled(scale: float) -> Accelerator:
        accelerator = Accelerator(cpu=True, mixed_precision="no")
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
        return accelerator

    first = learner(accelerator=scaled(8.0))
    train(first, 0, 3)
    kept = {name: tensor.clone() for name, tensor in first.tensors().items()}
    first.update(loss_of(first.forward_model, 3) * float("inf"))
    after = first.tensors()
    assert float(after["scaler.scale"]) == float(kept["scaler.scale"]) / 2 == 8.0
    changed = [name for name in kept if not torch.equal(kept[name], after[name])]
    assert changed == ["scaler.scale", "scaler.growth"]
    kept = {name: tensor.clone() for name, tensor in after.items()}
    expected = train(first, 4, 8)
    second = learner(1, scaled(2.0))
    second.load_tensors(kept, num_updates=4)
    assert train(second, 4, 8) == expected


def test_options_that_do_not_apply_are_refused() -> None:
    with pytest.raises(ValueError, match=r"muon_learning_rate=0.0 must be positive"):
        options(optimizer="muon", muon_learning_rate=0.0)
    with pytest.raises(ValueError, match="optimizer='muon' must be 'adamw' with sharding='zero1'"):
        learner(sharding="zero1")
    with pytest.raises(ValueError, match="optimizer='sgd' must be one of adamw, adamw8bit, muon"):
        OptimizerConfig(optimizer="sgd")  # pyright: ignore[reportArgumentType]
