"""The learner: AdamW with a schedule, the average of the weights, and what resuming needs."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from support.runs import make_learner, options
from torch import Tensor, nn

from latentdiff.training.learner import Learner
from latentdiff.training.optimizer import OptimizerConfig
from latentdiff.training.randomness import MicroBatch

CONFIG = OptimizerConfig(learning_rate=0.05, warmup_steps=4, cooldown_steps=5)
MAX_STEPS = 20


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def learner(seed: int = 0, accelerator: Accelerator | None = None, **changes: Any) -> Learner:
    options: dict[str, Any] = {"learning_rate": 0.05, "warmup_steps": 4, "cooldown_steps": 5}
    options |= {"max_steps": MAX_STEPS, "ema_decay": 0.8}
    return make_learner(network(seed), accelerator, **(options | changes))


def loss_of(model: nn.Module, step: int) -> Tensor:
    draw = torch.Generator().manual_seed(step)
    x, y = torch.randn(7, 3, generator=draw), torch.randn(7, 2, generator=draw)
    return (model(x) - y).square().mean()


def train(subject: Learner, start: int, stop: int) -> list[float]:
    return [
        float(subject.update(loss_of(subject.forward_model, step))) for step in range(start, stop)
    ]


def test_learning_rate_climbs_stays_and_falls_in_straight_lines() -> None:
    rates = [CONFIG.learning_rate_at(step, max_steps=MAX_STEPS) for step in range(20)]
    up = [0.05 * fraction for fraction in (0.25, 0.5, 0.75, 1.0)]
    down = [0.05 * fraction for fraction in (1.0, 0.8, 0.6, 0.4, 0.2)]
    assert rates == pytest.approx([*up, *[0.05] * 11, *down])


def test_learning_rate_is_constant_without_warmup_and_cooldown() -> None:
    config = replace(CONFIG, warmup_steps=0, cooldown_steps=0)
    assert {config.learning_rate_at(step, max_steps=MAX_STEPS) for step in range(20)} == {0.05}


def test_longer_runs_have_the_same_rates_until_either_cools_down() -> None:
    for step in range(MAX_STEPS - CONFIG.cooldown_steps):
        longer = CONFIG.learning_rate_at(step, max_steps=100)
        assert longer == CONFIG.learning_rate_at(step, max_steps=MAX_STEPS)


def test_a_run_that_is_too_short_for_its_learning_rate_says_so() -> None:
    """`max_steps` of a trial at the `warmup_steps` of a long run: it hardly learned, unsaid."""
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=100, cooldown_steps=300)
    assert config.shortfall(400) is None
    assert config.shortfall(399) is not None
    said = config.shortfall(20)
    assert said is not None
    assert "warmup_steps=100 and cooldown_steps=300 are longer than max_steps=20: " in said
    best = max(config.learning_rate_at(step, max_steps=20) for step in range(20)) / 0.1
    assert f"gets to {100 * best:.2g} % of learning_rate=0.1; lower them" in said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("max_steps", 0),
        ("warmup_steps", -1),
        ("cooldown_steps", -1),
        ("beta2", 1.0),
        ("weight_decay", -0.1),
        ("max_grad_norm", 0.0),
        ("ema_decay", 1.0),
    ],
)
def test_values_that_cannot_train_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}"):
        options(**{name: value})


@pytest.mark.parametrize("max_grad_norm", [1e6, 0.1])
def test_updates_are_those_of_torch_adamw_with_clipping(max_grad_norm: float) -> None:
    changes = {"max_grad_norm": max_grad_norm, "weight_decay": 0.1, "beta2": 0.95}
    subject, reference = learner(**changes), network()
    optimizer = torch.optim.AdamW(
        reference.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.1
    )
    for step in range(20):
        norm = subject.update(loss_of(subject.forward_model, step))
        for group in optimizer.param_groups:
            group["lr"] = CONFIG.learning_rate_at(step, max_steps=MAX_STEPS)
        optimizer.zero_grad()
        loss_of(reference, step).backward()
        expected = nn.utils.clip_grad_norm_(reference.parameters(), max_grad_norm)
        optimizer.step()
        torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(
        dict(subject.model.named_parameters()), dict(reference.named_parameters())
    )


def test_ema_is_the_weighted_mean_of_all_weights_so_far() -> None:
    subject = learner()
    weights = [[p.detach().clone() for p in subject.model.parameters()]]
    for step in range(30):
        subject.update(loss_of(subject.forward_model, step % 20))
        weights.append([p.detach().clone() for p in subject.model.parameters()])
    decays = [min(0.8, (1 + n) / (10 + n)) for n in range(1, 31)]
    contributions = [1.0]  # of the initial weights, then of those after each update
    for decay in decays:
        contributions = [c * decay for c in contributions] + [1 - decay]
    assert sum(contributions) == pytest.approx(1)
    for i, average in enumerate(subject.ema.parameters()):
        expected = sum(c * at[i] for c, at in zip(contributions, weights, strict=True))
        torch.testing.assert_close(average, expected)


def test_ema_starts_as_the_network_and_takes_no_gradient() -> None:
    subject = learner()
    torch.testing.assert_close(subject.ema.state_dict(), subject.model.state_dict(), rtol=0, atol=0)
    assert not subject.ema.training
    assert not any(p.requires_grad for p in subject.ema.parameters())


def test_a_restored_learner_goes_on_bit_for_bit() -> None:
    straight, first = learner(), learner()
    expected = train(straight, 0, 12)
    norms = train(first, 0, 5)
    kept = {name: tensor.clone() for name, tensor in first.tensors().items()}
    train(first, 5, 9)  # what was kept is a copy of its own
    second = learner(seed=1)
    second.load_tensors(kept, num_updates=5)
    assert norms + train(second, 5, 12) == expected
    found, wanted = second.tensors(), straight.tensors()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert second.num_updates == 12


def test_a_learner_restored_before_its_first_update_is_new() -> None:
    straight, second = learner(), learner(seed=1)
    second.load_tensors(learner().tensors(), num_updates=0)
    assert train(second, 0, 6) == train(straight, 0, 6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_is_frozen_is_shared_and_in_no_checkpoint(optimizer: str) -> None:
    def half_frozen(seed: int) -> Learner:
        model = network(0)
        model[0].requires_grad_(False)
        with torch.no_grad():
            model[2].weight.add_(seed)
        return make_learner(model, learning_rate=0.05, max_steps=9, optimizer=optimizer)

    subject, restored = half_frozen(0), half_frozen(1)
    train(subject, 0, 5)
    state = {name: tensor.clone() for name, tensor in subject.tensors().items()}
    assert "model.2.weight" in state
    assert not [name for name in state if ".0." in name]
    shared = {id(p) for p in subject.model.parameters()} & {id(p) for p in subject.ema.parameters()}
    assert shared == {id(p) for p in subject.model[0].parameters()}
    restored.load_tensors(state, num_updates=5)
    assert train(subject, 5, 9) == train(restored, 5, 9)
    for name, tensor in subject.tensors().items():
        assert torch.equal(restored.tensors()[name], tensor)


def test_tensors_of_another_network_are_refused_by_name() -> None:
    wider = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    shorter = nn.Sequential(nn.Linear(3, 5))
    for other in (wider, shorter):
        state = make_learner(other).tensors()
        with pytest.raises(ValueError, match=r"(model|ema)\.\d\.\w+ is .* in the checkpoint"):
            learner().load_tensors(state, num_updates=0)


def test_micro_batches_add_up_to_the_step_of_the_batch() -> None:
    full, split = learner(), learner()
    draw = torch.Generator().manual_seed(0)
    for _ in range(5):
        x, y = torch.randn(8, 3, generator=draw), torch.randn(8, 2, generator=draw)
        expected = full.update((full.forward_model(x) - y).square().mean())
        norms = []
        for micro_batch in (MicroBatch(i, 4) for i in range(4)):
            error = split.forward_model(micro_batch.rows(x)) - micro_batch.rows(y)
            norms.append(split.update(error.square().mean(), micro_batch))
        assert [float(norm) for norm in norms[:3]] == [0.0] * 3
        torch.testing.assert_close(norms[3], expected)
    assert split.num_updates == 5
    torch.testing.assert_close(split.model.state_dict(), full.model.state_dict())
    torch.testing.assert_close(split.ema.state_dict(), full.ema.state_dict())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_without_a_finite_gradient_changes_no_bit(bad: float) -> None:
    subject, reference = learner(), learner()
    train(subject, 0, 3)
    train(reference, 0, 3)
    before = {name: tensor.clone() for name, tensor in subject.tensors().items()}
    for count in (1, 2):
        subject.update(loss_of(subject.forward_model, 3) * bad)
        assert (int(subject.skipped), int(subject.skipped_in_a_row)) == (1, count)
    after = subject.tensors()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert subject.num_updates == 5  # the learning rate is one of the step alone
    reference.num_updates = 5
    assert train(subject, 5, 9) == train(reference, 5, 9)
    assert (int(subject.skipped), int(subject.skipped_in_a_row)) == (0, 0)


def test_the_scale_of_half_precision_is_restored() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    first = learner(accelerator=accelerator)
    train(first, 0, 3)
    kept = {name: tensor.clone() for name, tensor in first.tensors().items()}
    assert float(kept["scaler.scale"]) == 16.0
    expected = train(first, 3, 8)
    again = Accelerator(cpu=True, mixed_precision="no")
    again.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    second = learner(1, again)
    second.load_tensors(kept, num_updates=3)
    assert train(second, 3, 8) == expected
    assert second.tensors()["scaler.scale"] == first.tensors()["scaler.scale"]
