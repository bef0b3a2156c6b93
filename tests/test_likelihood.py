"""Likelihood: the bound is exact where the model is, above it elsewhere, and the flow is exact."""

import math

import pytest
import torch
from torch import Tensor

from latentdiff.diffusion import Diffusion
from latentdiff.levels import Denoise, NoiseLevel
from latentdiff.likelihood import (
    bits_per_dim,
    bound_terms,
    composed_bound_terms,
    flow_log_density,
    log_density,
)
from latentdiff.models.vae import Posterior

PREDICTION = {"flow": "flow_prediction"}
SIZE = 5


def diffusion(schedule: str, steps: int) -> Diffusion:
    if schedule == "linear":  # the same noise at the end, whatever the number of steps
        ends = {"beta_start": 0.1 / steps, "beta_end": min(20 / steps, 0.999)}
        return Diffusion("linear", "epsilon", num_timesteps=steps, **ends)
    return Diffusion(schedule, PREDICTION.get(schedule, "epsilon"), num_timesteps=steps)  # pyright: ignore[reportArgumentType]


def gaussian(mean: float, std: float) -> Denoise:
    """E[x0 | x_t] of data that are N(mean, std^2)."""

    def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
        _, alpha, sigma = level
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return mean + gain * (x - alpha * mean)

    return denoise


def exact(x: Tensor, mean: float, std: float) -> Tensor:
    """log N(x; mean, std^2), (B,)."""
    return torch.distributions.Normal(mean, std).log_prob(x).sum(1)


def draws(x0: Tensor, count: int, **options) -> Tensor:
    """(count, B) independent draws of the whole bound."""
    generator = torch.Generator().manual_seed(3)
    repeated = x0.repeat(count, 1)
    terms = bound_terms(x0=repeated, generator=generator, **options)
    return sum(term.reshape(len(repeated), -1).sum(1) for term in terms.values()).reshape(count, -1)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "flow"])
def test_the_bound_is_exact_for_unit_gaussian_data_with_the_large_variance(schedule: str) -> None:
    """There the reverse process is Gaussian, and the model has its mean and variance."""
    x0 = torch.randn(4, SIZE, dtype=torch.float64)
    found = draws(
        x0,
        1000,
        denoise=gaussian(0, 1),
        levels=diffusion(schedule, 40).levels(40),
        variance="large",
    )
    error = found.std(0) / math.sqrt(len(found))
    gap = found.mean(0) + exact(x0, 0, 1)
    # The prior's own gap: N(0, I) is not quite what the chain ends in, but for data N(0, I) it is.
    assert (gap.abs() < 4 * error + 1e-9).all()


def test_a_learned_variance_makes_it_exact_for_any_gaussian_data() -> None:
    """And with either fixed one it lies above."""
    std = 0.3
    levels = diffusion("linear", 50).levels(50)
    x0 = std * torch.randn(3, SIZE, dtype=torch.float64)

    def v(x: Tensor, level: NoiseLevel) -> Tensor:
        """Where Var(x_s | x_t) = beta_tilde + from_x0^2 Var(x0 | x_t) lies between the two."""
        i = int((levels.sigma == level.sigma).nonzero()[0])
        a_t, s_t = level.alpha, level.sigma
        a_s, s_s = levels[i + 1].alpha, levels[i + 1].sigma
        ratio = a_t / a_s
        forward = s_t**2 - (ratio * s_s) ** 2
        small = forward * (s_s / s_t) ** 2
        from_x0 = a_s * forward / s_t**2
        true = small + from_x0**2 * std**2 * s_t**2 / (a_t**2 * std**2 + s_t**2)
        if i == len(levels) - 1:  # the step to data, whose beta_tilde is the step before's
            before = levels[i - 1]
            step = before.sigma**2 - (before.alpha / a_t * s_t) ** 2
            small = step * (s_t / before.sigma) ** 2
        return ((true / small).log() / (forward / small).log()).expand(x.shape)

    def both(x: Tensor, level: NoiseLevel) -> Tensor:
        return torch.cat([gaussian(0, std)(x, level), v(x, level)], dim=1)

    means = {}
    for variance in ("small", "large", "learned"):
        denoise = both if variance == "learned" else gaussian(0, std)
        found = draws(x0, 1000, denoise=denoise, levels=levels, variance=variance)
        error = found.std(0) / math.sqrt(len(found))
        means[variance] = found.mean(0)
        gap = means[variance] + exact(x0, 0, std)
        assert (gap > -4 * error - 1e-3).all()
    # The chain ends a little off N(0, I) for such data: 0.5 alpha_T^2 at most a dimension.
    assert (means["learned"] + exact(x0, 0, std)).abs().max() < 0.05
    assert (means["small"] > means["learned"]).all()
    assert (means["large"] > means["learned"]).all()


def test_more_steps_make_a_tighter_bound() -> None:
    """On data of two points, whose reverse steps are Gaussian only when they are small."""

    def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
        return torch.tanh(level.alpha * x / level.sigma**2)  # E[x0 | x_t] of data at -1 and 1

    x0 = torch.ones(1, 1, dtype=torch.float64)
    means = []
    for steps in (4, 8, 16, 64, 256):
        levels = diffusion("cosine", steps).levels(steps)
        found = draws(x0, 8_000, denoise=denoise, levels=levels, bins=2)
        means.append(float(found.mean()))
    assert means == sorted(means, reverse=True)
    assert means[-1] == pytest.approx(math.log(2), abs=0.05)  # one bit: which of the two it is


def test_the_prior_term_is_the_divergence_of_two_gaussians() -> None:
    x0 = torch.randn(3, SIZE, dtype=torch.float64)
    levels = diffusion("linear", 20).levels(20)
    terms = bound_terms(gaussian(0, 1), x0, levels)
    normal = torch.distributions.Normal
    q = normal(levels[0].alpha * x0, levels[0].sigma)
    expected = torch.distributions.kl_divergence(q, normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(terms["prior"], expected)
    assert terms["denoising"].shape == (3, 19)


def test_probabilities_of_all_bins_sum_to_one() -> None:
    values = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, variance in ((0.0, 0.1), (0.93, 1e-3), (-1.2, 1e-6), (0.5, 9.0)):
        log_variance = torch.tensor(variance, dtype=torch.float64).log()
        log_p = log_density(values, torch.tensor(mean), log_variance, bins=256)
        assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-12)
        assert not log_p.isnan().any()


def test_far_bins_keep_a_finite_logarithm() -> None:
    log_variance = torch.tensor(-8.0, dtype=torch.float64)
    far = log_density(
        torch.tensor([-1.0, 0.99]).double(), torch.tensor(0.5), log_variance, bins=256
    )
    assert far.isfinite().all()
    assert (far < -100).all()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "flow"])
def test_the_flow_gives_the_density_of_gaussian_data(schedule: str) -> None:
    mean, std = 0.4, 0.7
    x0 = mean + std * torch.randn(6, SIZE, dtype=torch.float64)
    errors = []
    for steps in (40, 80):
        levels = Diffusion(schedule, PREDICTION.get(schedule, "epsilon")).levels(steps)  # pyright: ignore[reportArgumentType]
        least = levels[-2]
        found = flow_log_density(gaussian(mean, std), x0, levels, probes=None)
        noised = math.sqrt(float((least.alpha * std) ** 2 + least.sigma**2))
        errors.append(float((found - exact(x0, float(least.alpha) * mean, noised)).abs().max()))
    assert errors[-1] < 0.05
    assert errors[-1] < errors[0]


def test_hutchinsons_estimate_is_exact_for_a_diagonal_jacobian_and_unbiased_otherwise() -> None:
    x0 = torch.randn(2, SIZE, dtype=torch.float64)
    levels = Diffusion("cosine", "epsilon").levels(10)
    alone = gaussian(0.2, 0.8)
    torch.testing.assert_close(
        flow_log_density(alone, x0, levels), flow_log_density(alone, x0, levels, probes=None)
    )
    mixing = 0.3 * torch.randn(SIZE, SIZE, dtype=torch.float64)

    def mixed(x: Tensor, level: NoiseLevel) -> Tensor:
        return torch.tanh(alone(x, level) @ mixing)

    expected = flow_log_density(mixed, x0, levels, probes=None)
    generator = torch.Generator().manual_seed(0)
    found = flow_log_density(mixed, x0, levels, probes=400, generator=generator)
    assert (found - expected).abs().max() < 0.6
    single = [flow_log_density(mixed, x0, levels, probes=1, generator=generator) for _ in range(20)]
    assert (torch.stack(single).mean(0) - expected).abs().max() < 1


def test_bits_are_nats_over_log_two_a_dimension() -> None:
    assert float(bits_per_dim(torch.tensor(12 * math.log(2)), 4)) == pytest.approx(3)


def test_what_is_no_variance_is_refused() -> None:
    x0, levels = torch.zeros(1, 2), diffusion("cosine", 4).levels(4)
    with pytest.raises(ValueError, match="variance='medium' must be one of small, large, learned"):
        bound_terms(gaussian(0, 1), x0, levels, variance="medium")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="levels has 1 steps and must have 2 or more"):
        bound_terms(gaussian(0, 1), x0, diffusion("cosine", 4).levels(1))


@pytest.mark.parametrize("right", [True, False])
def test_an_autoencoder_with_a_diffusion_prior_is_exact_where_its_posterior_is(right: bool) -> None:
    """x = w z + s eps with z ~ N(0, 1) is N(0, w^2 + s^2); another q(z | x) is above by its KL."""
    w, s = 0.8, 0.3
    x = torch.randn(3, 1, 1, SIZE, dtype=torch.float64)
    variance = 1 / (1 + (w / s) ** 2)
    width = variance if right else 4 * variance
    repeated = x.repeat(4000, 1, 1, 1)
    posterior = Posterior(
        variance * w / s**2 * repeated, torch.full_like(repeated, math.log(width))
    )
    terms = composed_bound_terms(
        repeated,
        posterior,
        lambda z: w * z,
        gaussian(0, 1),
        diffusion("flow", 20).levels(20),
        log_variance=torch.tensor(2 * math.log(s)),
        variance="large",
        bins=None,
        generator=torch.Generator().manual_seed(0),
    )
    found = sum(term.reshape(len(repeated), -1).sum(1) for term in terms.values())
    assert isinstance(found, Tensor)
    found = found.reshape(4000, 3)
    error = found.std(0) / math.sqrt(len(found))
    log_p = exact(x.flatten(1), 0, math.hypot(w, s))
    kl = 0.5 * SIZE * (width / variance - 1 - math.log(width / variance))
    assert ((found.mean(0) + log_p - kl).abs() < 4 * error + 1e-9).all()
