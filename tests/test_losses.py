"""Losses, against their formulas."""

import pytest
import torch
from support.runs import make_learner

from latentdiff.models.discriminator import Discriminator
from latentdiff.models.vae import Posterior
from latentdiff.tasks.vae.losses import (
    OutputScale,
    Reconstruction,
    adversarial_weight,
    hinge_loss,
    pixel_nats,
    vae_loss,
)


def example(size: int = 8) -> tuple[torch.Tensor, torch.Tensor, Posterior]:
    """Reconstruction and images (3, 3, size, size), posterior (3, 4, size/4, size/4)."""
    latent = (3, 4, size // 4, size // 4)
    return (
        torch.randn(3, 3, size, size),
        torch.randn(3, 3, size, size),
        Posterior(torch.randn(latent), torch.randn(latent)),
    )


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_vae_loss_is_distance_plus_weighted_kl_per_pixel_value(norm: Reconstruction) -> None:
    reconstruction, images, posterior = example()
    loss, distance, kl = vae_loss(reconstruction, images, posterior, norm=norm, kl_weight=0.3)
    error = reconstruction - images
    torch.testing.assert_close(distance, (error.abs() if norm == "l1" else error**2).mean())
    own = torch.distributions.Normal(posterior.mean, (0.5 * posterior.logvar).exp())
    standard = torch.distributions.Normal(0.0, 1.0)
    nats = torch.distributions.kl_divergence(own, standard).sum()
    torch.testing.assert_close(kl, nats / images.numel())
    torch.testing.assert_close(loss, distance + 0.3 * kl)
    assert loss.shape == distance.shape == kl.shape == ()


def test_vae_loss_means_the_same_at_every_image_size() -> None:
    small = example()
    large = [torch.tile(images, (1, 1, 2, 2)) for images in small[:2]]
    tiled = Posterior(*(torch.tile(m, (1, 1, 2, 2)) for m in (small[2].mean, small[2].logvar)))
    torch.testing.assert_close(
        vae_loss(*small, norm="l1", kl_weight=0.3),
        vae_loss(*large, tiled, norm="l1", kl_weight=0.3),
    )


def test_a_perfect_standard_vae_has_no_loss() -> None:
    images = torch.randn(2, 3, 8, 8)
    standard = Posterior(torch.zeros(2, 4, 2, 2), torch.zeros(2, 4, 2, 2))
    for value in vae_loss(images, images, standard, norm="l2", kl_weight=1.0):
        assert value == 0


def test_vae_loss_of_bfloat16_outputs_is_computed_in_float32() -> None:
    """Autocast leaves the posterior in bfloat16, and log.jsonl showed a KL of three digits."""
    reconstruction, images, posterior = example(32)
    half = Posterior(posterior.mean.bfloat16(), posterior.logvar.bfloat16())
    rounded = Posterior(half.mean.float(), half.logvar.float())
    found = vae_loss(reconstruction.bfloat16(), images, half, norm="l1", kl_weight=1.0)
    expected = vae_loss(
        reconstruction.bfloat16().float(), images, rounded, norm="l1", kl_weight=1.0
    )
    for value, exact in zip(found, expected, strict=True):
        assert value.dtype == torch.float32
        assert value == exact


def test_vae_loss_gradients_reach_encoder_and_decoder() -> None:
    reconstruction, images, posterior = example()
    leaves = [reconstruction, posterior.mean, posterior.logvar]
    for leaf in leaves:
        leaf.requires_grad_(True)
    loss, _, _ = vae_loss(reconstruction, images, posterior, norm="l2", kl_weight=0.5)
    loss.backward()
    count = images.numel()
    gradients = [leaf.grad for leaf in leaves]
    with torch.no_grad():
        torch.testing.assert_close(gradients[0], 2 * (reconstruction - images) / count)
        torch.testing.assert_close(gradients[1], 0.5 * posterior.mean / count)
        torch.testing.assert_close(gradients[2], 0.5 * (posterior.logvar.exp() - 1) / 2 / count)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("logvar", [-4.0, 0.5])
def test_pixel_nats_are_those_of_a_density(norm: Reconstruction, logvar: float) -> None:
    """exp(-nats) over all values of a pixel has the integral 1."""
    errors = torch.linspace(-30, 30, 600_001, dtype=torch.float64)
    distances = errors.abs() if norm == "l1" else errors.square()
    width = torch.tensor(logvar, dtype=torch.float64)
    nats = pixel_nats(distances, width, norm=norm)
    assert float(torch.trapezoid(torch.exp(-nats), errors)) == pytest.approx(1, abs=1e-5)
    laplace = torch.distributions.Laplace(0.0, width.exp())
    gaussian = torch.distributions.Normal(0.0, (0.5 * width).exp())
    known = laplace if norm == "l1" else gaussian
    torch.testing.assert_close(-nats, known.log_prob(errors))


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_best_width_is_the_mean_error(norm: Reconstruction) -> None:
    """Of the nats by calculus, and of what the learner finds among errors that vary."""
    distance = torch.tensor(0.03)
    best = distance.log().requires_grad_(True)
    (slope,) = torch.autograd.grad(pixel_nats(distance, best, norm=norm), best)
    assert float(slope) == pytest.approx(0, abs=1e-6)
    scale = OutputScale(norm)
    options = {"learning_rate": scale.LEARNING_RATE, "weight_decay": 0.0, "cooldown_steps": 200}
    learner = make_learner(scale, ema=False, max_steps=600, **options)
    for error in (0.02, 0.04) * 300:
        learner.update(learner.forward_model(torch.tensor(error)))
    assert scale.logvar.exp().item() == pytest.approx(0.03, rel=1e-2)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_with_a_width_the_loss_is_the_negative_elbo(norm: Reconstruction) -> None:
    reconstruction, images, posterior = example()
    logvar = torch.tensor(-1.5)
    loss, distance, kl = vae_loss(
        reconstruction, images, posterior, norm=norm, kl_weight=1.0, logvar=logvar
    )
    s = logvar.exp()
    density = torch.distributions.Laplace if norm == "l1" else torch.distributions.Normal
    log_p = density(reconstruction, s if norm == "l1" else s.sqrt()).log_prob(images)
    torch.testing.assert_close(loss, (posterior.kl().sum() - log_p.sum()) / images.numel())
    plain = vae_loss(reconstruction, images, posterior, norm=norm, kl_weight=1.0)
    torch.testing.assert_close((distance, kl), plain[1:])


def test_hinge_loss_is_nothing_where_the_scores_are_right_by_one() -> None:
    right = hinge_loss(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, -2.0]))
    assert float(right) == 0
    unsure = hinge_loss(torch.zeros(2, 1, 3, 3), torch.zeros(2, 1, 3, 3))
    assert float(unsure) == 1
    assert float(hinge_loss(torch.tensor([-1.0]), torch.tensor([3.0]))) == 3


def test_the_adversarial_weight_is_the_ratio_of_the_gradients_at_the_last_layer() -> None:
    last = torch.nn.Linear(3, 2)
    out = last(torch.randn(5, 3))
    loss, adversarial = out.square().mean(), -out.mean()
    weight = adversarial_weight(loss, adversarial, last.weight, mean=lambda gradient: gradient)
    assert not weight.requires_grad
    norms = []
    for one in (loss, weight * adversarial):
        last.zero_grad()
        one.backward(retain_graph=True)
        assert last.weight.grad is not None
        norms.append(float(last.weight.grad.norm()))
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    nothing = adversarial_weight(
        100 * loss, 0 * out.sum(), last.weight, mean=lambda gradient: gradient
    )
    assert float(nothing) == pytest.approx(1e4)


def test_the_discriminator_scores_patches_each_image_for_itself() -> None:
    network = Discriminator(channels=8)
    images = torch.randn(4, 3, 64, 64)
    scores = network(images)
    assert scores.shape == (4, 1, 6, 6)
    torch.testing.assert_close(network(images[2:3]), scores[2:3], rtol=1e-5, atol=1e-6)
    # A corner's score depends on the corner alone: 70 x 70 pixels around it at most.
    wide = torch.randn(1, 3, 256, 256)
    moved = wide.clone()
    moved[..., 200:] += 1
    assert network(wide).shape == (1, 1, 30, 30)
    near, far = network.layers[:1](wide), network.layers[:1](moved)
    assert near[..., :90].equal(far[..., :90])
    with pytest.raises(ValueError, match="layers=0 must be at least 1"):
        Discriminator(layers=0)
