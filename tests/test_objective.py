"""The objective: weights mean the same for every prediction, times have the density they should."""

import math
from dataclasses import replace
from itertools import product
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from latentdiff.diffusion import Diffusion, Prediction
from latentdiff.tasks.denoiser.loss import LossConfig, TimestepDistribution, Uncertainty, Weighting

PREDICTIONS = get_args(Prediction)
MEAN, STD = 1.0, 0.5


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def errors(diffusion: Diffusion, t: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of a network that estimates x0 wrongly, and the square of its error in x0, (B,)."""
    x0, noise, wrong = torch.randn(3, len(t), 2, 3, 3, generator=draw(), dtype=torch.float64)
    alpha, sigma = diffusion.alpha_sigma(t)
    level = alpha[:, None, None, None], sigma[:, None, None, None]

    def network(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        estimate = x0 + 0.1 * wrong  # as an output: of this x0 and the noise that x then has
        return diffusion.target(estimate, (x - level[0] * estimate) / level[1], alpha, sigma)

    loss = diffusion.loss(network, x0, x0, noise=noise, t=t)
    return loss, (0.1 * wrong).square().flatten(1).mean(1)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("weighting", ["min_snr", "p2"])
def test_a_weighted_loss_is_the_same_for_every_prediction(prediction, weighting) -> None:
    """It is the error of x0 by a function of the signal-to-noise ratio, as the papers say."""
    diffusion = Diffusion("scaled_linear", prediction)
    t = torch.tensor([1, 50, 300, 700, 999])
    loss, of_x0 = errors(diffusion, t)
    alpha, sigma = diffusion.alpha_sigma(t)
    snr = (alpha / sigma) ** 2
    expected = snr.clamp(max=5) if weighting == "min_snr" else snr / (1 + snr)
    weight = LossConfig(weighting=weighting).weight(diffusion, t)
    torch.testing.assert_close(weight * loss, expected * of_x0)


def test_min_snr_has_the_papers_forms() -> None:
    """min(SNR, gamma) / SNR for noise, / (SNR + 1) for v, and itself for x0 (Hang et al. 2023)."""
    t = torch.tensor([1, 100, 500, 1000])
    alpha, sigma = Diffusion("scaled_linear", "epsilon").alpha_sigma(t)
    snr = (alpha / sigma) ** 2
    clamped = snr.clamp(max=5)
    forms = {"epsilon": clamped / snr, "v_prediction": clamped / (snr + 1), "sample": clamped}
    for prediction, expected in forms.items():
        found = LossConfig("min_snr").weight(Diffusion("scaled_linear", prediction), t)
        torch.testing.assert_close(found, expected)


def test_p2_without_gamma_is_the_plain_loss_of_the_noise() -> None:
    t = torch.arange(1, 1001)
    found = LossConfig("p2", p2_gamma=0).weight(Diffusion("linear", "epsilon"), t)
    torch.testing.assert_close(found, torch.ones(1000, dtype=torch.float64))


def test_without_a_weighting_all_weigh_one() -> None:
    t = torch.tensor([1.0, 400.0, 1000.0])
    for weighting in ("none", "uncertainty"):
        weight = LossConfig(weighting).weight(Diffusion("flow", "flow_prediction"), t)
        assert weight.tolist() == [1, 1, 1]


@pytest.mark.parametrize("stratified", [False, True])
def test_uniform_times_come_up_equally_often(stratified: bool) -> None:
    objective = LossConfig(stratified=stratified)
    t = objective.sample_t(
        Diffusion("cosine", "epsilon", num_timesteps=10), 20_000, generator=draw()
    )
    counts = t.bincount()
    assert counts[0] == 0
    assert len(counts) == 11
    assert (counts[1:] - 2000).abs().max() <= (0 if stratified else 5 * math.sqrt(2000))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_shift_moves_the_times_of_a_flow(shift: float) -> None:
    t = LossConfig(timestep_shift=shift).sample_t(
        Diffusion("flow", "flow_prediction"), 20_000, generator=draw()
    )
    assert t.min() > 0
    assert t.max() <= 1000
    u = (t / 1000) / (shift - (shift - 1) * t / 1000)  # the shift undone: uniform again
    assert ((u * 10).ceil().long().bincount()[1:] - 2000).abs().max() < 5 * math.sqrt(2000)


def test_logit_normal_times_have_a_normal_logit() -> None:
    objective = LossConfig(timestep_distribution="logit_normal", logit_mean=0.5, logit_std=0.8)
    t = objective.sample_t(Diffusion("flow", "flow_prediction"), 50_000, generator=draw())
    logit = torch.logit(t.double() / 1000)
    assert float(logit.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(logit.std()) == pytest.approx(0.8, abs=0.02)


def test_stratified_times_have_one_in_each_share_in_no_order() -> None:
    diffusion = Diffusion("flow", "flow_prediction")
    t = LossConfig(stratified=True).sample_t(diffusion, 64, generator=draw())
    assert sorted((t * 64 / 1000).ceil().long().tolist()) == list(range(1, 65))
    assert t.tolist() != sorted(t.tolist())
    again = LossConfig(stratified=True).sample_t(diffusion, 64, generator=draw())
    assert t.equal(again)


def test_offset_noise_adds_to_the_variance_of_a_channels_mean() -> None:
    shape = (2000, 3, 8, 8)
    means = [
        LossConfig(offset_noise=strength).noise(shape, generator=draw()).mean((2, 3)).var()
        for strength in (0.0, 0.3)
    ]
    assert float(means[0]) == pytest.approx(1 / 64, rel=0.1)
    assert float(means[1] - means[0]) == pytest.approx(0.09, rel=0.1)


def test_a_learned_uncertainty_finds_the_logarithm_of_each_levels_loss() -> None:
    """And begins by changing nothing."""
    alpha = torch.tensor([0.99, 0.7, 0.2])
    sigma = (1 - alpha**2).sqrt()
    loss = torch.tensor([0.02, 0.3, 4.0])
    model = Uncertainty()
    assert model(alpha, sigma).tolist() == [0, 0, 0]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        u = model(alpha, sigma)
        (loss * torch.exp(-u) + u).sum().backward()
        optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(model(alpha, sigma), loss.log(), rtol=1e-3, atol=1e-3)


class Small(nn.Module):
    """A network of two numbers, (B, 2, 1, 1), that knows the time; its output begins at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU())
        self.out = nn.Linear(64, 2)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        time = (timestep.float()[:, None] + 1) / 1000
        time = torch.cat([time, time.log() / 3, (1.001 - time).log() / 3], dim=1)
        return self.out(self.layers(torch.cat([x[..., 0, 0], time], dim=1)))[..., None, None]


def best(diffusion: Diffusion, t: Tensor) -> Tensor:
    """The network that no other is better than, for data N(MEAN, STD^2)."""
    alpha, sigma = (a.reshape(-1, 1, 1, 1).float() for a in diffusion.alpha_sigma(t))

    def network(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        x0 = MEAN + alpha * STD**2 * (x - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2)
        return diffusion.target(x0, (x - alpha * x0) / sigma, alpha.flatten(), sigma.flatten())

    return network  # pyright: ignore[reportReturnType]


def assert_learns(diffusion: Diffusion, objective: LossConfig) -> None:
    """Train by Algorithm 1: four fifths of what there is to learn are learned, at least."""
    torch.manual_seed(0)
    source, model, uncertainty = draw(), Small(), Uncertainty()
    parameters = [*model.parameters(), *uncertainty.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=4e-3)
    shape = (256, 2, 1, 1)

    def data(shape: tuple[int, ...]) -> Tensor:
        return MEAN + STD * torch.randn(shape, generator=source)

    x0 = data((4000, 2, 1, 1))
    t = objective.sample_t(diffusion, 4000, generator=source)
    noise = objective.noise(x0.shape, generator=source)
    weight = objective.weight(diffusion, t)

    @torch.no_grad()
    def score(network) -> float:
        return float((weight * diffusion.loss(network, x0, x0, noise=noise, t=t)).mean())

    before, least = score(model), score(best(diffusion, t))
    for _ in range(150):
        some = data(shape)
        at = objective.sample_t(diffusion, 256, generator=source)
        eps = objective.noise(shape, generator=source)
        losses = diffusion.loss(model, some, some, noise=eps, t=at)
        loss = (objective.weight(diffusion, at).float() * losses).mean()
        if objective.weighting == "uncertainty":
            u = uncertainty(*diffusion.alpha_sigma(at))
            loss = (losses * torch.exp(-u) + u).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert least < before
    assert score(model) - least < 0.2 * (before - least)


@pytest.mark.parametrize(
    ("diffusion", "objective"),
    [
        (Diffusion("scaled_linear", "epsilon"), LossConfig("min_snr")),
        (Diffusion("linear", "sample"), LossConfig("p2", timestep_distribution="logit_normal")),
        (Diffusion("cosine", "v_prediction"), LossConfig(stratified=True, offset_noise=0.1)),
        (Diffusion("linear", "v_prediction", rescale_betas_zero_snr=True), LossConfig()),
        (Diffusion("linear", "score"), LossConfig("uncertainty")),
        (Diffusion("flow", "flow_prediction"), LossConfig(timestep_shift=2.0, stratified=True)),
    ],
    ids=lambda value: getattr(value, "prediction", None) or value.weighting,
)
def test_every_prediction_learns(diffusion: Diffusion, objective: LossConfig) -> None:
    assert_learns(diffusion, objective)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("weighting", "density"),
    [*zip(get_args(Weighting), 2 * get_args(TimestepDistribution), strict=True)],
)
@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [*product(["linear"], PREDICTIONS), *product(["flow"], ("sample", "v_prediction"))],
)
def test_every_prediction_learns_with_every_weighting(
    schedule, prediction, weighting, density
) -> None:
    assert_learns(
        Diffusion(schedule, prediction), LossConfig(weighting, timestep_distribution=density)
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vlb_weight", 0.0, "vlb_weight=0.0 must be positive"),
        ("weighting", "snr", "weighting='snr' must be one of none, min_snr, p2, uncertainty"),
        (
            "timestep_distribution",
            "normal",
            "timestep_distribution='normal' must be one of uniform, logit_normal",
        ),
        ("snr_gamma", 0.0, "snr_gamma=0.0 must be positive"),
        ("timestep_shift", -1.0, "timestep_shift=-1.0 must be positive"),
        ("offset_noise", -0.1, "offset_noise=-0.1 must not be negative"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(LossConfig(), **{field: value})  # pyright: ignore[reportArgumentType]


def test_a_shift_is_for_flows() -> None:
    with pytest.raises(ValueError, match=r"timestep_shift=2\.0 must be 1 unless schedule=flow"):
        LossConfig(timestep_shift=2.0).check(Diffusion("linear", "epsilon"))
