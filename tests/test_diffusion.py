"""Laws of the diffusion process, and its schedules against diffusers'."""

from itertools import product

import diffusers
import pytest
import torch
from support.cases import mostly_exhaustive
from torch import Tensor

from latentdiff.diffusion import Diffusion, Prediction
from latentdiff.guidance import guided_denoiser
from latentdiff.levels import NoiseLevel
from latentdiff.schedules import Schedule

SCHEDULES: list[Schedule] = ["linear", "scaled_linear", "cosine", "flow"]
PREDICTIONS: list[Prediction] = ["epsilon", "sample", "v_prediction", "score", "flow_prediction"]
PAIRS = [
    (schedule, prediction)
    for schedule, prediction in product(SCHEDULES, PREDICTIONS)
    if schedule != "flow" or prediction not in ("epsilon", "score")
]


def diffusion(schedule: Schedule, **options) -> Diffusion:
    return Diffusion(schedule, "flow_prediction", **options)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# The forward process and the posterior.


@pytest.mark.parametrize("schedule", mostly_exhaustive(SCHEDULES))
def test_iterating_the_forward_step_gives_the_one_step_mean_and_variance(schedule):
    process = diffusion(schedule)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    mean, variance = one, zero
    for t in torch.arange(1, process.num_timesteps + 1):
        kept, added = process.forward_step(one, zero, t), process.forward_step(zero, one, t)
        mean, variance = kept * mean, kept**2 * variance + added**2
        alpha, sigma = process.alpha_sigma(t)
        torch.testing.assert_close(mean, alpha[None], atol=1e-12, rtol=0)
        torch.testing.assert_close(variance, sigma[None] ** 2, atol=1e-12, rtol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_add_noise_is_alpha_x0_plus_sigma_eps(schedule):
    process, x0, eps = diffusion(schedule), normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1)
    t = torch.tensor([0, 400, 1000])
    x_t = process.add_noise(x0, eps, t)
    alpha, sigma = process.alpha_sigma(t)
    assert torch.equal(x_t[0], x0[0])
    torch.testing.assert_close(x_t[1], alpha[1] * x0[1] + sigma[1] * eps[1])
    assert alpha[2] < 0.07
    torch.testing.assert_close(x_t[:1], process.add_noise(x0[:1], eps[:1], torch.tensor(0)))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t", [2, 500, 1000])
def test_posterior_is_the_product_of_the_two_gaussians(schedule, t):
    """q(x_{t-1} | x_t, x_0) is proportional to q(x_t | x_{t-1}) q(x_{t-1} | x_0)."""
    process, t = diffusion(schedule), torch.tensor(t)
    x0, x_t = normal(2, 3, 2, 2), normal(2, 3, 2, 2, seed=1)
    one, zero = torch.ones_like(x0), torch.zeros_like(x0)
    a, v = process.forward_step(one, zero, t), process.forward_step(zero, one, t) ** 2
    alpha, sigma = process.alpha_sigma(t - 1)
    precision = a**2 / v + 1 / sigma**2
    expected = (a * x_t / v + alpha * x0 / sigma**2) / precision
    mean, variance = process.posterior(x0, x_t, t)
    torch.testing.assert_close(mean, expected, atol=1e-11, rtol=1e-10)
    torch.testing.assert_close(variance.expand_as(precision), 1 / precision, atol=0, rtol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_posterior_at_the_first_step_is_the_data(schedule):
    x0, x_t = normal(2, 3, 2, 2), normal(2, 3, 2, 2, seed=1)
    mean, variance = diffusion(schedule).posterior(x0, x_t, torch.tensor(1))
    torch.testing.assert_close(mean, x0, atol=1e-12, rtol=0)
    assert variance == 0


# The schedules.


@pytest.mark.parametrize("num_timesteps", [10, 300, 1000, 4000])
@pytest.mark.parametrize(
    ("schedule", "word"),
    [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")],
)
@pytest.mark.filterwarnings("ignore:the end of the noise chain")
def test_betas_are_those_of_diffusers_for_any_number_of_timesteps(schedule, word, num_timesteps):
    process = diffusion(schedule, num_timesteps=num_timesteps)
    start = 1e-4 if process.beta_start is None else process.beta_start
    end = 0.02 if process.beta_end is None else process.beta_end
    theirs = diffusers.DDIMScheduler(num_timesteps, start, end, word)
    torch.testing.assert_close(process.betas.float(), theirs.betas, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(
        process.alphas_cumprod.float(), theirs.alphas_cumprod, atol=1e-6, rtol=1e-4
    )


def test_buffers_are_the_formulas_of_the_notes():
    process = Diffusion("linear", "epsilon", num_timesteps=2000)
    assert process.betas[0] == 1e-4
    assert process.betas[-1] == 0.02
    bars = torch.stack([process.alphas[: t + 1].prod() for t in range(2000)])
    torch.testing.assert_close(process.alphas_cumprod, bars)
    torch.testing.assert_close(process.sqrt_alphas_cumprod**2, bars)
    torch.testing.assert_close(process.sqrt_one_minus_alphas_cumprod**2, 1 - bars)
    torch.testing.assert_close(process.sqrt_recip_alphas**-2, 1 - process.betas)
    t = torch.arange(1, 2001)
    x0, x_t = torch.zeros(2000, 1), torch.zeros(2000, 1)
    torch.testing.assert_close(process.posterior_sigmas**2, process.posterior(x0, x_t, t)[1])


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
def test_formulas_that_the_notes_have_wrong_are_right(schedule):
    """Alphas fall with t, a large t is the noisy one, and sigma_t is a root that holds beta_t."""
    process = Diffusion(schedule, "epsilon")
    assert (process.alphas.diff() <= 0).all()
    assert (process.alphas_cumprod.diff() < 0).all()
    assert (process.alpha_sigma(torch.arange(1001))[1].diff() > 0).all()
    before, now = process.alphas_cumprod[:-1], process.alphas_cumprod[1:]
    right = (process.betas[1:] * (1 - before) / (1 - now)).sqrt()
    torch.testing.assert_close(process.posterior_sigmas[1:], right)
    assert not torch.allclose(process.posterior_sigmas[1:], (1 - before) / (1 - now))


@pytest.mark.parametrize("num_timesteps", [2, 10, 100, 1000, 5000])
def test_cosine_and_flow_end_in_noise_for_any_number_of_timesteps(num_timesteps):
    for schedule in ("cosine", "flow"):
        process = diffusion(schedule, num_timesteps=num_timesteps)
        alpha, sigma = process.alpha_sigma(torch.tensor(num_timesteps))
        assert alpha < 0.03
        assert sigma > 0.999


def test_a_chain_that_does_not_end_in_noise_warns():
    with pytest.warns(UserWarning, match=r"not near N\(0, I\): alpha_bar_T = 0.364"):
        Diffusion("linear", "epsilon", num_timesteps=100)
    Diffusion("scaled_linear", "epsilon")  # Stable Diffusion's 0.0047 does not


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
def test_zero_terminal_snr_moves_the_end_to_pure_noise_and_keeps_the_beginning(schedule):
    """Lin et al. 2023, Algorithm 1: sqrt(alpha_bar) becomes an affine function of itself."""
    process = diffusion(schedule, rescale_betas_zero_snr=True)
    assert process.alphas_cumprod[-1] == 0
    before, after = diffusion(schedule).sqrt_alphas_cumprod, process.sqrt_alphas_cumprod
    torch.testing.assert_close(after[0], before[0])
    moved = (before - before[-1]) * (before[0] / (before[0] - before[-1]))
    torch.testing.assert_close(after, moved, atol=1e-13, rtol=1e-9)
    theirs = diffusers.DDPMScheduler(
        1000,
        process.beta_start or 1e-4,
        process.beta_end or 0.02,
        "squaredcos_cap_v2" if schedule == "cosine" else schedule,
        rescale_betas_zero_snr=True,
    )
    assert theirs.alphas_cumprod[-1] == 0
    bars = process.alphas_cumprod.float()
    torch.testing.assert_close(theirs.alphas_cumprod, bars, atol=1e-6, rtol=1e-4)


# Prediction types.


@pytest.mark.parametrize(("schedule", "prediction"), PAIRS)
def test_to_x0_inverts_target(schedule, prediction):
    process = Diffusion(schedule, prediction)
    x0, eps = normal(8, 3, 4, 4), normal(8, 3, 4, 4, seed=1)
    t = torch.tensor([1, 2, 30, 300, 500, 800, 900, 999])
    alpha, sigma = process.alpha_sigma(t)
    output = process.target(x0, eps, alpha, sigma)
    x0_again = process.to_x0(output, process.add_noise(x0, eps, t), alpha, sigma)
    # Division by alpha (6e-5 at the end of cosine) multiplies the rounding of x_t.
    worst = 1e-12 if schedule != "cosine" else 1e-11
    torch.testing.assert_close(x0_again, x0, atol=worst, rtol=0)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine", "flow"])
def test_prediction_types_convert_into_each_other(schedule):
    """An output of any type, read as x0 and eps and written as another type, is that type's."""
    x0, eps, t = normal(4, 3, 2, 2), normal(4, 3, 2, 2, seed=1), torch.tensor([1, 100, 600, 900])
    kinds = [Diffusion(*pair) for pair in PAIRS if pair[0] == schedule]
    alpha, sigma = kinds[0].alpha_sigma(t)
    x_t = kinds[0].add_noise(x0, eps, t)
    a, s = alpha.reshape(-1, 1, 1, 1), sigma.reshape(-1, 1, 1, 1)
    for one, other in product(kinds, kinds):
        x0_read = one.to_x0(one.target(x0, eps, alpha, sigma), x_t, alpha, sigma)
        written = other.target(x0_read, (x_t - a * x0_read) / s, alpha, sigma)
        expected = other.target(x0, eps, alpha, sigma)
        torch.testing.assert_close(written, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("prediction", ["epsilon", "score"])
def test_predictions_that_say_nothing_of_x0_where_alpha_is_0_are_refused(prediction):
    with pytest.raises(
        ValueError, match=f"prediction={prediction} says nothing of x0 .* schedule=flow"
    ):
        Diffusion("flow", prediction)


# Training.


@pytest.mark.parametrize(("schedule", "prediction"), PAIRS)
def test_loss_is_the_mean_squared_error_of_the_prediction(schedule, prediction):
    process = Diffusion(schedule, prediction)
    x0, noise, t = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1), torch.tensor([1, 500, 1000])
    alpha, sigma = process.alpha_sigma(t)
    target, x_t = process.target(x0, noise, alpha, sigma), process.add_noise(x0, noise, t)

    def network(x, timestep, context):
        torch.testing.assert_close(x, x_t)
        assert torch.equal(timestep, process.timestep(t))
        return context * target

    assert torch.equal(
        process.loss(network, x0, torch.ones(1), noise=noise, t=t), torch.zeros(3).double()
    )
    loss = process.loss(network, x0, torch.zeros(1), noise=noise, t=t)
    weight = sigma.reshape(-1, 1, 1, 1) ** 2 if prediction == "score" else 1.0
    torch.testing.assert_close(loss, (weight * target**2).mean((1, 2, 3)))


def test_score_loss_is_the_epsilon_loss_of_the_same_denoiser():
    x0, noise, t = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1), torch.tensor([1, 500, 1000])
    score, epsilon = Diffusion("linear", "score"), Diffusion("linear", "epsilon")
    sigma = score.alpha_sigma(t)[1].reshape(-1, 1, 1, 1)
    torch.testing.assert_close(
        score.loss(lambda x, *_: -x.sin() / sigma, x0, noise, noise=noise, t=t),
        epsilon.loss(lambda x, *_: x.sin(), x0, noise, noise=noise, t=t),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_results_have_the_dtype_of_x(schedule, dtype):
    process, x = diffusion(schedule), normal(2, 3, 4, 4, dtype=dtype)
    for t in (torch.tensor([1, 1000]), torch.tensor(7)):
        alpha, sigma = process.alpha_sigma(t)
        results = [
            process.add_noise(x, x, t),
            process.forward_step(x, x, t),
            process.posterior(x, x, t)[0],
            process.target(x, x, alpha, sigma),
            process.to_x0(x, x, alpha, sigma),
        ]
        assert {result.dtype for result in results} == {dtype}
    t = torch.tensor([1, 1000])
    assert process.loss(lambda x, *_: x.bfloat16(), x, x, noise=x, t=t).dtype == dtype


def test_a_diffusion_first_used_in_inference_mode_trains_afterwards():
    """Cached tensors made in inference mode would make backward raise."""
    with torch.inference_mode():
        process = Diffusion("scaled_linear", "score", beta_end=0.0123)
        process.alpha_sigma(torch.tensor([3]))
        process.levels(3)
    weight = torch.ones((), requires_grad=True)
    x, t = normal(1, 2, 2, 2, dtype=torch.float32), torch.tensor([3])
    process.loss(lambda x, *_: weight * x, x, x, noise=x, t=t).sum().backward()
    assert weight.grad is not None
    assert not process.alphas_cumprod.is_inference()


# Guidance.


def network(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
    assert x.shape[0] == timestep.shape[0] == context.shape[0]
    return torch.tanh(x + context.mean((1, 2)).reshape(-1, 1, 1, 1) + timestep.reshape(-1, 1, 1, 1))


@pytest.mark.parametrize(("schedule", "prediction"), PAIRS)
def test_guiding_the_output_is_guiding_x0(schedule, prediction):
    process, x = Diffusion(schedule, prediction), normal(2, 3, 4, 4)
    context, null_context = normal(2, 5, 6, seed=1), normal(1, 5, 6, seed=2)
    level = process.levels(4)[1]
    null = guided_denoiser(process, network, null_context.expand(2, -1, -1), None, 1.0)(x, level)
    conditional = guided_denoiser(process, network, context, None, 1.0)(x, level)
    guided = guided_denoiser(process, network, context, null_context, 7.5)(x, level)
    torch.testing.assert_close(guided, null + 7.5 * (conditional - null))


def test_guidance_costs_one_doubled_call_null_first_and_none_at_scale_1():
    calls = []

    def counted(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        calls.append((x.shape[0], context[:, 0, 0].tolist()))
        return network(x, timestep, context)

    process, x = diffusion("flow"), normal(2, 3, 4, 4)
    context, null_context = torch.ones(2, 5, 6).double(), torch.zeros(2, 5, 6).double()
    level = process.levels(4)[0]
    guided_denoiser(process, counted, context, null_context, 3.0)(x, level)
    guided_denoiser(process, counted, context, null_context, 1.0)(x, level)
    assert calls == [(4, [0.0, 0.0, 1.0, 1.0]), (2, [1.0, 1.0])]
    with pytest.raises(ValueError, match=r"guidance_scale=3.0 needs a null_context"):
        guided_denoiser(process, counted, context, None, 3.0)


def test_denoiser_takes_a_level_of_its_own_for_each_image():
    process, x = diffusion("flow"), normal(3, 3, 4, 4)
    context = normal(3, 5, 6)
    levels = process.levels(3)
    denoise = guided_denoiser(process, network, context, torch.zeros_like(context), 2.0)
    together = denoise(x, NoiseLevel(levels.timestep[:3], levels.alpha[:3], levels.sigma[:3]))
    for i in range(3):
        one = guided_denoiser(
            process, network, context[i : i + 1], torch.zeros(1, 5, 6).double(), 2.0
        )
        torch.testing.assert_close(together[i : i + 1], one(x[i : i + 1], levels[i]))


# What users may get wrong.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "sigmoid"}, "schedule='sigmoid' must be one of linear, scaled_linear"),
        ({"prediction": "noise"}, "prediction='noise' must be one of epsilon, sample"),
        ({"timestep_spacing": "even"}, "timestep_spacing='even' must be one of leading"),
        ({"num_timesteps": 1}, "num_timesteps=1 must be 2 to 100000"),
        ({"num_timesteps": 10**9}, "num_timesteps=1000000000 must be 2 to 100000"),
        (
            {"rescale_betas_zero_snr": True},
            "prediction=epsilon says nothing of x0 .* rescale_betas_zero_snr=True choose flow_pred",
        ),
        (
            {"schedule": "flow", "prediction": "sample", "rescale_betas_zero_snr": True},
            "rescale_betas_zero_snr=True is for beta schedules, not flow",
        ),
        (
            {"schedule": "flow", "prediction": "sample", "learned_variance": True},
            "learned_variance=True is for beta schedules, not flow",
        ),
        ({"beta_start": 0.5, "beta_end": 0.1}, "beta_start=0.5, beta_end=0.1 must be"),
        ({"schedule": "cosine", "beta_end": 0.1}, "schedule=cosine has no beta_start or beta_end"),
        ({"steps_offset": -1}, "steps_offset=-1 must not be negative"),
        (
            {"schedule": "flow", "prediction": "sample", "set_alpha_to_one": False},
            "set_alpha_to_one=False is for beta schedules",
        ),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Diffusion(**{"schedule": "linear", "prediction": "epsilon", **options})


def test_flow_has_no_betas():
    with pytest.raises(ValueError, match="schedule=flow has no betas"):
        _ = diffusion("flow").betas
