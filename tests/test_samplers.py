"""Samplers by their laws; test_samplers_parity.py compares them with diffusers."""

from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
from support.toys import SHAPE, network, noise_from, normal
from torch import Tensor

from latentdiff.diffusion import Diffusion
from latentdiff.guidance import guided_denoiser
from latentdiff.levels import Denoise, LevelSpacing, NoiseLevel, NoiseLevels
from latentdiff.samplers import (
    SAMPLERS,
    ddim,
    ddpm,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_sde,
    euler,
    euler_ancestral,
    find_sampler,
    heun,
    lcm,
    lms,
    pndm,
    unipc,
)

# On data N(mu, s^2) the best denoiser is linear and everything is known exactly.


def gaussian_denoiser(mu: float, s: float) -> Denoise:
    def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
        gain = level.alpha * s**2 / ((level.alpha * s) ** 2 + level.sigma**2)
        return mu + gain * (x - level.alpha * mu)

    return denoise


def log_snr_levels(steps: int, path: str, *, ends_on_data: bool = False) -> NoiseLevels:
    """alpha / sigma from e^-4 to e^4 in even steps of its logarithm."""
    ratio = torch.linspace(4, -4, steps + 1, dtype=torch.float64).exp()
    alpha = 1 / (1 + ratio) if path == "flow" else 1 / (1 + ratio**2).sqrt()
    return NoiseLevels(torch.zeros(steps + 1), alpha, ratio * alpha)


def deviation(level: NoiseLevel, s: float) -> Tensor:
    return ((level.alpha * s) ** 2 + level.sigma**2).sqrt()


def ode_error(sampler: Callable[..., Iterator[Tensor]], steps: int, path: str) -> float:
    """How far the sampler ends from the probability-flow ODE's exact solution."""
    mu, s, levels = 0.7, 0.5, log_snr_levels(steps, path)
    first, last, x = levels[0], levels[steps], normal(3)
    scale = deviation(last, s) / deviation(first, s)
    exact = last.alpha * mu + scale * (x - first.alpha * mu)
    *_, sample = sampler(gaussian_denoiser(mu, s), x, levels)
    return float((sample - exact).abs().max())


@pytest.mark.parametrize("path", ["variance preserving", "flow"])
@pytest.mark.parametrize(
    ("sampler", "factor"),
    [(ddim, 2.0), (euler, 2.0), (dpmpp_2m, 4.0), (heun, 4.0), (pndm, 4.0)],
)
def test_ode_error_falls_by_the_order_when_steps_double(sampler, factor, path):
    errors = [ode_error(sampler, steps, path) for steps in (128, 256, 512)]
    assert errors[0] / errors[1] == pytest.approx(factor, rel=0.06)
    assert errors[1] / errors[2] == pytest.approx(factor, rel=0.03)


@pytest.mark.parametrize("path", ["variance preserving", "flow"])
@pytest.mark.parametrize(("sampler", "factor"), [(unipc, 7.5), (lms, 10.0)])
def test_ode_error_of_a_higher_order_falls_faster(sampler, factor, path):
    """UniPC's corrector makes its order 3; LMS begins with steps of lower orders than its 4."""
    errors = [ode_error(sampler, steps, path) for steps in (32, 64, 128)]
    assert errors[0] / errors[1] > factor
    assert errors[1] / errors[2] > factor


def chain_mean_and_variance(
    sampler: Callable[..., Iterator[Tensor]],
    levels: NoiseLevels,
    mu: float,
    s: float,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Of the samples of N(0, 1), without chance.

    The sample is affine in the first x and in each noise, of which a step draws two at most: the
    first of a batch of chains gets none of them and each of the others one.
    """
    n = 2 * len(levels) + 2
    columns = iter(torch.eye(n, dtype=torch.float64)[:, 1:].T.reshape(-1, n, 1, 1, 1))
    x = next(columns)
    *_, sample = sampler(
        gaussian_denoiser(mu, s), x, levels, noise=lambda: next(columns), **options
    )
    return sample[0].squeeze(), (sample[1:] - sample[0]).square().sum()


CHAINS = [
    pytest.param(ddpm, {"variance": "small"}, id="ddpm small"),
    pytest.param(ddpm, {"variance": "large"}, id="ddpm large"),
    pytest.param(ddim, {"eta": 1.0}, id="ddim"),
    pytest.param(euler_ancestral, {}, id="euler_ancestral"),
    pytest.param(dpmpp_2m_sde, {}, id="dpmpp_2m_sde"),
    pytest.param(dpmpp_sde, {}, id="dpmpp_sde"),
]


@pytest.mark.parametrize(("sampler", "options"), CHAINS)
@pytest.mark.parametrize(
    "schedule",
    ["linear", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("cosine", "flow"))],
)
def test_the_chain_ends_on_the_mean_and_variance_of_the_data(schedule, sampler, options):
    """Up to the noise that the schedule leaves, and the size of a step."""
    diffusion, errors = Diffusion(schedule, "sample"), []
    for steps in (125, 250, 500):
        levels = diffusion.levels(steps, grid="sde" if sampler is dpmpp_sde else "ddpm")
        mean, variance = chain_mean_and_variance(sampler, levels, 0.7, 0.5, **options)
        assert mean == pytest.approx(0.7, abs=0.01)
        errors.append(abs(float(variance) - 0.25))
    assert errors[2] < 0.01
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("sampler", [dpmpp_2m_sde, dpmpp_sde])
@pytest.mark.parametrize("path", ["variance preserving", "flow"])
def test_the_second_order_in_noise_needs_fewer_steps_than_ddpm(path, sampler):
    """At 30 steps the variance of N(0.7, 0.25) is nearer than ddpm's at 60."""
    diffusion = Diffusion("flow" if path == "flow" else "cosine", "sample")
    levels = diffusion.levels(30, grid="sde" if sampler is dpmpp_sde else "dpm")
    _, variance = chain_mean_and_variance(sampler, levels, 0.7, 0.5)
    _, theirs = chain_mean_and_variance(ddpm, diffusion.levels(60), 0.7, 0.5)
    assert abs(variance - 0.25) < abs(theirs - 0.25)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("schedule", ["scaled_linear", "cosine", "flow"])
def test_lcm_samples_the_data_with_a_consistency_function_at_any_number_of_steps(schedule, steps):
    """What its networks are distilled to: not the mean of x0, but where the ODE ends."""
    mu, s = 0.7, 0.5

    def consistency(x: Tensor, level: NoiseLevel) -> Tensor:
        return mu + s * (x - level.alpha * mu) / deviation(level, s)

    levels = Diffusion(schedule, "sample").levels(steps, grid="lcm")
    n = steps + 1
    columns = iter(torch.eye(n, dtype=torch.float64)[:, 1:].T.reshape(-1, n, 1, 1, 1))
    first = levels[0].alpha * mu + deviation(levels[0], s) * next(columns)
    *_, sample = lcm(consistency, first, levels, noise=lambda: next(columns))
    assert sample[0].item() == pytest.approx(mu, abs=1e-4)
    assert (sample[1:] - sample[0]).square().sum() == pytest.approx(s**2, abs=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine", "flow"])
def test_each_ddpm_variance_is_exact_for_its_data_at_any_number_of_steps(schedule, steps):
    """DDPM, section 3.2: "large" for N(0, 1), "small" for a single point."""
    diffusion = Diffusion(schedule, "sample")
    levels = diffusion.levels(steps, grid="ddpm")
    before = NoiseLevels(levels.timestep[:-1], levels.alpha[:-1], levels.sigma[:-1])
    mean, variance = chain_mean_and_variance(ddpm, levels, 0.3, 0.0, variance="small")
    torch.testing.assert_close(torch.stack([mean, variance]), torch.tensor([0.3, 0.0]).double())
    if steps > 1:  # the chain up to its last step, which by definition adds no noise
        trail: list[Tensor] = []

        def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
            trail.append(x)
            return gaussian_denoiser(0.0, 1.0)(x, level)

        sources = torch.eye(steps, dtype=torch.float64)
        sources[:, 0] *= deviation(levels[0], 1.0)
        columns = iter(sources.T.reshape(steps, steps, 1, 1, 1))
        x = next(columns)
        list(ddpm(denoise, x, levels, variance="large", noise=lambda: next(columns)))
        for x, level in zip(trail, map(before.__getitem__, range(steps)), strict=True):
            torch.testing.assert_close(x.square().sum(), deviation(level, 1.0) ** 2)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine", "flow"])
def test_ddim_with_eta_1_and_euler_ancestral_are_ddpm_with_the_small_variance(schedule):
    diffusion = Diffusion(schedule, "sample")
    denoise = guided_denoiser(diffusion, network, normal(7), None, 1.0)
    levels = diffusion.levels(20, grid="ddpm")
    expected = list(ddpm(denoise, normal(1), levels, noise=noise_from(2)))
    for others in (
        ddim(denoise, normal(1), levels, eta=1.0, noise=noise_from(2)),
        euler_ancestral(denoise, normal(1), levels, noise=noise_from(2)),
    ):
        for one, other in zip(expected, others, strict=True):
            torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("schedule", ["linear", "flow"])
def test_euler_is_ddim_without_noise(schedule):
    levels = Diffusion(schedule, "sample").levels(9, grid="euler")
    for one, other in zip(
        euler(gaussian_denoiser(0.7, 0.5), normal(1), levels),
        ddim(gaussian_denoiser(0.7, 0.5), normal(1), levels),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("sampler", [ddim, euler, heun, dpmpp_2m, unipc, lms, pndm])
def test_samplers_are_exact_when_the_data_are_one_point(sampler):
    """Then x0 is known from the first step on."""
    point = normal(4)
    for schedule in ("linear", "flow"):
        levels = Diffusion(schedule, "sample").levels(7)
        for preview in sampler(lambda x, level: point, normal(1), levels):
            torch.testing.assert_close(preview, point)


def halfway(levels: NoiseLevels) -> NoiseLevels:
    """With a level between each two, for dpmpp_sde."""
    ratio = levels.sigma / levels.alpha
    ratio = (ratio[:-1] * ratio[1:]).sqrt()
    if torch.allclose(levels.alpha + levels.sigma, torch.ones(()).double()):
        middle = NoiseLevel(0 * ratio, 1 / (1 + ratio), 1 / (1 + 1 / ratio))
    else:
        middle = NoiseLevel(0 * ratio, 1 / (1 + ratio**2).sqrt(), 1 / (1 + ratio**-2).sqrt())
    return NoiseLevels(levels.timestep, levels.alpha, levels.sigma, middle)


@pytest.mark.parametrize("path", ["variance preserving", "flow"])
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "pndm"])
def test_pure_noise_where_alpha_is_0_makes_no_nan(name, path):
    """A flow's t = T, or zero terminal SNR: sigma / alpha is infinite there."""
    sigma = torch.linspace(1, 0, 6, dtype=torch.float64)
    alpha = 1 - sigma if path == "flow" else (1 - sigma**2).sqrt()
    levels = halfway(NoiseLevels(1000 * sigma, alpha, sigma))
    point = normal(4)
    *_, sample = SAMPLERS[name](lambda x, _: point, normal(1), levels, noise=noise_from(2))
    torch.testing.assert_close(sample, point, atol=1e-6, rtol=1e-6)
    diffusion = Diffusion("flow", "flow_prediction")
    if path != "flow":
        diffusion = Diffusion("linear", "v_prediction", rescale_betas_zero_snr=True)
    denoise = guided_denoiser(diffusion, network, normal(7), None, 1.0)
    for steps in (1, 2, 5):
        kept = NoiseLevels(*(v[[*range(steps), 5]] for v in (1000 * sigma, alpha, sigma)))
        previews = list(SAMPLERS[name](denoise, normal(1), halfway(kept), noise=noise_from(2)))
        assert len(previews) == steps
        for preview in previews:
            assert preview.isfinite().all()
            assert preview.abs().max() < 20


def test_pndm_refuses_where_the_noise_says_nothing_of_the_data():
    zero_snr = Diffusion("linear", "v_prediction", rescale_betas_zero_snr=True)
    levels = SAMPLERS["pndm"].levels(zero_snr, 5)
    with pytest.raises(ValueError, match="sampler=pndm works with the noise, which says nothing"):
        next(pndm(lambda x, level: x, normal(1), levels))
    with pytest.raises(ValueError, match="sampler=pndm is for beta schedules, and this"):
        SAMPLERS["pndm"].levels(Diffusion("flow", "sample"), 5)


# Every sampler by name.


PAIRS = [
    (name, schedule)
    for name in SAMPLERS
    for schedule in ("linear", "scaled_linear", "cosine", "flow")
    if name != "pndm" or schedule != "flow"
]


def calls_of(name: str, steps: int) -> int:
    if name in ("heun", "dpmpp_sde"):
        return 2 * steps - 1
    return steps + 1 if name == "pndm" and steps > 1 else steps


@pytest.mark.parametrize(("name", "schedule"), PAIRS)
def test_a_sampler_yields_as_many_previews_as_steps_and_calls_nothing_it_need_not(name, schedule):
    diffusion, sampler = Diffusion(schedule, "v_prediction"), SAMPLERS[name]
    for steps in (1, 2, 3, 20):
        levels = sampler.levels(diffusion, steps)
        for n in {1, (steps + 1) // 2, steps}:  # whole runs, and ends of them
            calls = []

            def counted(x: Tensor, timestep: Tensor, context: Tensor, calls=calls) -> Tensor:
                calls.append(float(timestep[0]))
                return network(x, timestep, context)

            denoise = guided_denoiser(diffusion, counted, normal(7), None, 1.0)
            previews = list(sampler(denoise, normal(1), levels.last(n), noise=noise_from(2)))
            assert len(previews) == n
            assert len(calls) == calls_of(name, n)
            assert min(calls) >= 0
            assert all(preview.isfinite().all() for preview in previews)


@pytest.mark.parametrize(("name", "schedule"), [pair for pair in PAIRS if pair[1] != "linear"])
def test_a_spacing_is_sampled_with_or_refused_by_name(name, schedule):
    diffusion, sampler = Diffusion(schedule, "v_prediction"), SAMPLERS[name]
    for spacing in get_args(LevelSpacing):
        even = spacing in ("leading", "trailing", "linspace")
        if name == "lcm" or (name == "pndm" and not even):
            refusal = f"level_spacing={spacing} does not fit sampler={name}"
        elif schedule == "flow" and even:
            refusal = f"level_spacing={spacing} is for beta schedules"
        else:
            refusal = None
        if refusal is not None:
            with pytest.raises(ValueError, match=refusal):
                sampler.levels(diffusion, 6, spacing=spacing)
            continue
        levels = sampler.levels(diffusion, 6, spacing=spacing)
        denoise = guided_denoiser(diffusion, network, normal(7), None, 1.0)
        previews = list(sampler(denoise, normal(1), levels, noise=noise_from(2)))
        assert len(previews) == 6, spacing
        assert all(preview.isfinite().all() for preview in previews), spacing


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_seed_gives_the_same_sample(name):
    diffusion, sampler = Diffusion("scaled_linear", "epsilon"), SAMPLERS[name]
    denoise = guided_denoiser(diffusion, network, normal(7), None, 1.0)
    levels = sampler.levels(diffusion, 8)
    samples = [
        list(sampler(denoise, normal(1), levels, noise=noise_from(seed)))[-1] for seed in (3, 3, 4)
    ]
    assert torch.equal(samples[0], samples[1])
    assert torch.equal(samples[1], samples[2]) is not sampler.takes_noise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_have_the_dtype_of_x(name, dtype):
    schedule = "linear" if name == "pndm" else "flow"
    diffusion, sampler = Diffusion(schedule, "v_prediction"), SAMPLERS[name]
    denoise = guided_denoiser(diffusion, lambda x, *_: x.tanh(), normal(7), None, 1.0)
    levels = sampler.levels(diffusion, 4)
    for preview in sampler(denoise, normal(1, dtype), levels, noise=noise_from(2, dtype)):
        assert preview.dtype == dtype


@pytest.mark.parametrize(("name", "schedule"), PAIRS)
def test_sampling_never_reads_a_value_back(name, schedule):
    """Tensors on the meta device have no values: any host synchronisation would raise."""
    diffusion, sampler = Diffusion(schedule, "v_prediction"), SAMPLERS[name]
    x = torch.empty(SHAPE, device="meta")
    denoise = guided_denoiser(diffusion, lambda x, *_: x.tanh(), x, x, 3.0)
    levels = sampler.levels(diffusion, 5)
    previews = list(sampler(denoise, x, levels, noise=lambda: torch.empty_like(x)))
    assert {preview.shape for preview in previews} == {x.shape}


def test_ddpm_without_its_noise_is_another_thing():
    """Why fresh noise is added: without it the chain's samples have far too little variance."""
    levels = Diffusion("linear", "sample").levels(1000, grid="ddpm")
    noise = iter(torch.randn(1000, 4096, 1, 1, 1, generator=torch.Generator().manual_seed(0)))
    x, denoise = next(noise), gaussian_denoiser(0.0, 0.5)
    *_, without = ddpm(denoise, x, levels, noise=lambda: torch.zeros_like(x))
    *_, with_noise = ddpm(denoise, x, levels, noise=lambda: next(noise))
    assert with_noise.var() == pytest.approx(0.25, rel=5 * (2 / 4096) ** 0.5)
    assert without.var() < 0.05


def test_an_unknown_sampler_is_refused_with_the_nearest_name():
    assert find_sampler("heun") is SAMPLERS["heun"]
    with pytest.raises(ValueError, match=r"sampler=dpmpp2m is unknown; did you mean dpmpp_2m\?"):
        find_sampler("dpmpp2m")
    with pytest.raises(ValueError, match=r"did you mean euler_ancestral\?"):
        find_sampler("Euler_Anc")
    with pytest.raises(ValueError, match=r"did you mean ddim\?"):
        find_sampler("DDIM")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 1.5}, "eta=1.5 must be from 0 to 1"),
        ({"eta": -0.1}, "eta=-0.1 must be from 0 to 1"),
        ({"eta": 0.5}, "eta=0.5 needs noise"),
    ],
)
def test_ddim_refuses_what_it_cannot_do(options, message):
    levels = Diffusion("linear", "sample").levels(3)
    with pytest.raises(ValueError, match=message):
        next(ddim(lambda x, level: x, normal(1), levels, **options))


def test_ddpm_refuses_an_unknown_variance():
    levels = Diffusion("linear", "sample").levels(3)
    with pytest.raises(ValueError, match="variance=medium must be one of small, large, learned"):
        next(ddpm(lambda x, level: x, normal(1), levels, variance="medium", noise=noise_from(1)))
