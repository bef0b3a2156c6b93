"""Learned variances: the right ones are learned, by the bound alone, and drawn with."""

import math
from dataclasses import replace

import diffusers
import pytest
import torch
from support.schedulers import CASES, assert_same_path, our_path, processes, their_path
from support.toys import network, noise_from, normal
from torch import Tensor, nn

from latentdiff.diffusion import Diffusion, Prediction
from latentdiff.gaussians import (
    learned_log_variance,
    posterior_coefficients,
    reverse_variances,
)
from latentdiff.guidance import Guidance, guided_denoiser
from latentdiff.likelihood import bits_per_dim, bound_terms
from latentdiff.samplers import SAMPLERS, ddpm, find_sampler

# diffusers hands tensors to numpy in a way that numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BETAS: tuple[Prediction, ...] = ("epsilon", "sample", "v_prediction", "score", "flow_prediction")
T = 8


def short(prediction: Prediction = "epsilon", *, learned: bool = True, steps: int = T) -> Diffusion:
    """A chain of few steps that ends in noise."""
    ends = {"beta_start": 0.02, "beta_end": min(20 / steps, 0.9)}
    return Diffusion("linear", prediction, num_timesteps=steps, learned_variance=learned, **ends)


def doubled(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
    """A network of both halves; the second goes beyond [-1, 1], as nothing forbids it."""
    return torch.cat([network(x, timestep, context), 1.2 * torch.sin(3 * x + context)], dim=1)


def constant(output: Tensor):
    """A network whose output is that tensor."""
    return lambda x, timestep, context: output


# Training.


@pytest.mark.parametrize("prediction", BETAS)
def test_the_bound_teaches_the_variance_alone_and_the_error_the_mean_alone(prediction) -> None:
    x0, noise, t = normal(1), normal(2), torch.tensor([1, 5])
    output = torch.cat([normal(3), normal(4)], dim=1).requires_grad_()
    options = {"noise": noise, "t": t}
    loss, bound = short(prediction).losses(constant(output), x0, x0, **options)
    assert bound is not None
    (of_loss,) = torch.autograd.grad(loss.sum(), output)
    (of_bound,) = torch.autograd.grad(bound.sum(), output)
    mean, variance = of_bound.chunk(2, dim=1)
    assert not mean.any()
    assert variance.all()
    mean, variance = of_loss.chunk(2, dim=1)
    assert not variance.any()
    first = output.detach()[:, :3].requires_grad_()
    alone = short(prediction, learned=False)
    simple, nothing = alone.losses(constant(first), x0, x0, **options)
    assert nothing is None
    assert torch.equal(simple, loss)
    assert torch.equal(alone.loss(constant(first), x0, x0, **options), loss)
    assert torch.equal(torch.autograd.grad(simple.sum(), first)[0], mean)


@pytest.mark.parametrize("prediction", BETAS)
def test_the_bound_of_training_is_that_of_the_likelihood(prediction) -> None:
    """Term for term, with the same noise; the prior is what training leaves out."""
    diffusion, x0, context = short(prediction), normal(1), normal(7)
    denoise = guided_denoiser(diffusion, doubled, context, None, 1.0, with_v=True)
    terms = bound_terms(
        denoise,
        x0,
        diffusion.levels(T),
        variance="learned",
        generator=torch.Generator().manual_seed(5),
    )
    expected = torch.cat([terms["denoising"], terms["reconstruction"][:, None]], dim=1)
    noise, found = noise_from(5), []
    for t in range(T, 0, -1):
        options = {"noise": noise(), "t": torch.full((2,), t)}
        found.append(diffusion.losses(doubled, x0, context, **options)[1])
    of_training = torch.stack(found, dim=1)
    size = x0[0].numel()
    torch.testing.assert_close(of_training / T, bits_per_dim(expected, size), rtol=1e-9, atol=1e-9)
    total = expected.sum(1) + terms["prior"]
    prior = bits_per_dim(terms["prior"], size)
    torch.testing.assert_close(of_training.mean(1) + prior, bits_per_dim(total, size))


def true_variance(std: float, s: tuple[Tensor, Tensor], t: tuple[Tensor, Tensor]) -> Tensor:
    """Var(x_s | x_t) of data N(0, std^2): beta_tilde + from_x0^2 Var(x0 | x_t)."""
    from_x0, _, small = posterior_coefficients(s, t)
    return small + from_x0**2 * std**2 * t[1] ** 2 / ((t[0] * std) ** 2 + t[1] ** 2)


def test_the_least_bound_has_the_true_variance_at_every_step() -> None:
    """Of Gaussian data, known exactly: training the second half alone arrives there."""
    std, draws, diffusion = 0.4, 4000, short()
    every = torch.arange(1, T + 1)
    v = torch.zeros(T, 1, dtype=torch.float64, requires_grad=True)
    t = every.repeat(draws)
    source = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, len(t), 1, generator=source, dtype=torch.float64)
    x0 = std * x0

    def perfect(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        alpha, sigma = diffusion.alpha_sigma(timestep + 1)
        gain = sigma / ((alpha * std) ** 2 + sigma**2)  # E[eps | x_t] = gain x_t
        return torch.cat([gain[:, None] * x, v[timestep]], dim=1)

    optimizer = torch.optim.LBFGS([v], max_iter=40, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        bound = diffusion.losses(perfect, x0, x0, noise=noise, t=t)[1]
        assert bound is not None
        bound.mean().backward()
        return bound.mean()

    optimizer.step(closure)
    small, large = reverse_variances(diffusion.alpha_sigma(every - 1), diffusion.alpha_sigma(every))
    small[0] = small[1]
    found = learned_log_variance((v.detach()[:, 0] + 1) / 2, small, large)
    true = true_variance(std, diffusion.alpha_sigma(every - 1), diffusion.alpha_sigma(every))
    torch.testing.assert_close(found, true.log(), rtol=0, atol=5 * math.sqrt(2 / draws))
    # No fixed variance is right at more than one end of the chain.
    assert (true[1:] / small[1:]).max() > 1.2
    assert (large / true).max() > 1.2


@pytest.mark.training
def test_a_trained_variance_makes_a_lower_bound_than_both_fixed_ones() -> None:
    """A small network on a ring: mean and variance learned together."""
    diffusion = short("v_prediction", steps=20)
    source = torch.Generator().manual_seed(0)

    def data(n: int) -> Tensor:
        angle = 2 * math.pi * torch.rand(n, generator=source)
        ring = torch.stack([angle.cos(), angle.sin()], dim=1)
        return ring + 0.1 * torch.randn(n, 2, generator=source)

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 4)
            )

        def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
            return self.layers(torch.cat([x, timestep[:, None] / 10 - 1], dim=1).float()).to(x)

    torch.manual_seed(0)
    model = Small()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(500):
        x0 = data(256)
        t = torch.randint(1, 21, (256,), generator=source)
        noise = torch.randn(x0.shape, generator=source)
        loss, bound = diffusion.losses(model, x0, x0, noise=noise, t=t)
        assert bound is not None
        optimizer.zero_grad()
        (loss.mean() + 0.01 * bound.mean()).backward()
        optimizer.step()
    x0, bits = data(2000).double(), {}
    for variance in ("small", "large", "learned"):
        denoise = guided_denoiser(diffusion, model, x0, None, 1.0, with_v=variance == "learned")
        with torch.no_grad():
            terms = bound_terms(
                denoise,
                x0,
                diffusion.levels(20),
                variance=variance,
                generator=torch.Generator().manual_seed(1),
            )
        nats = terms["prior"] + terms["denoising"].sum(1) + terms["reconstruction"]
        bits[variance] = bits_per_dim(nats, 2)
    for fixed in ("small", "large"):
        gap = bits[fixed] - bits["learned"]
        assert gap.mean() > 5 * gap.std() / math.sqrt(len(gap))


# Sampling.


@pytest.mark.parametrize("case", CASES)
def test_ddpm_with_learned_variances_takes_the_steps_of_diffusers(case) -> None:
    diffusion, scheduler = processes(diffusers.DDPMScheduler, *case, variance_type="learned_range")
    diffusion = replace(diffusion, learned_variance=True)
    generator = torch.Generator().manual_seed(5)
    theirs = their_path(scheduler, 10, normal(1), network=doubled, generator=generator)
    levels = diffusion.levels(10, grid="ddpm")
    ours = our_path(
        diffusion,
        ddpm,
        normal(1),
        levels,
        network=doubled,
        with_v=True,
        variance="learned",
        noise=noise_from(5),
    )
    if levels.timestep[-2] > 0:
        # diffusers adds noise to the finished sample unless it comes from timestep 0.
        ours, theirs = ours[:-1], theirs[:-1]
    assert_same_path(ours, theirs)


@pytest.mark.parametrize(("v", "variance"), [(-1.0, "small"), (1.0, "large")])
def test_the_ends_of_the_range_are_the_two_fixed_variances(v: float, variance) -> None:
    def extreme(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return torch.cat([network(x, timestep, context), torch.full_like(x, v)], dim=1)

    levels, context = short().levels(T), normal(7)
    learned = guided_denoiser(short(), extreme, context, None, 1.0, with_v=True)
    fixed = guided_denoiser(short(learned=False), network, context, None, 1.0)
    for path, expected in zip(
        ddpm(learned, normal(1), levels, variance="learned", noise=noise_from(5)),
        ddpm(fixed, normal(1), levels, variance=variance, noise=noise_from(5)),
        strict=True,
    ):
        torch.testing.assert_close(path, expected)
    draw = {"x0": normal(2), "levels": levels}
    found = bound_terms(
        learned, **draw, variance="learned", generator=torch.Generator().manual_seed(1)
    )
    expected = bound_terms(
        fixed, **draw, variance=variance, generator=torch.Generator().manual_seed(1)
    )
    for term in ("prior", "denoising", "reconstruction"):
        torch.testing.assert_close(found[term], expected[term])


@pytest.mark.parametrize("guidance", [Guidance(1.0), Guidance(3.0), Guidance(3.0, eta=0.5)])
@pytest.mark.parametrize("prediction", BETAS)
def test_v_is_that_with_the_prompt_and_x0_is_that_of_a_fixed_variance(
    prediction, guidance: Guidance
) -> None:
    level, x = short().levels(T)[2], normal(1)
    context, null = normal(7), normal(8)
    both = guided_denoiser(short(prediction), doubled, context, null, guidance, with_v=True)(
        x, level
    )
    fixed = guided_denoiser(short(prediction, learned=False), network, context, null, guidance)(
        x, level
    )
    x0, v = both.chunk(2, dim=1)
    torch.testing.assert_close(x0, fixed)
    torch.testing.assert_close(v, (1.2 * torch.sin(3 * x + context) + 1) / 2)
    alone = guided_denoiser(short(prediction), doubled, context, null, guidance)(x, level)
    assert torch.equal(alone, x0)


@pytest.mark.parametrize("name", [*SAMPLERS, "DDPMScheduler"])
def test_only_ddpm_draws_with_the_learned_variance_and_calls_the_network_once_a_step(name) -> None:
    calls = []

    def counted(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        calls.append(x)
        return doubled(x, timestep, context)

    diffusion = Diffusion("linear", "epsilon", learned_variance=True)
    learned = find_sampler(name, learned_variance=True)
    assert learned.takes_v == (name == "ddpm")
    levels = learned.levels(diffusion, 5)
    paths = []
    for sampler in (learned, find_sampler(name)):
        denoise = guided_denoiser(diffusion, counted, normal(7), None, 1.0, with_v=sampler.takes_v)
        calls.clear()
        *_, sample = sampler(denoise, normal(1), levels, noise=noise_from(5))
        paths.append([*calls, sample])
    assert len(paths[0]) == len(paths[1])
    same = all(map(torch.equal, *paths))
    assert same == (name != "ddpm")
    assert name != "ddpm" or len(paths[0]) == 6
