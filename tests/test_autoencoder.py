"""The VAE that training goes on from, and what is measured of a trained one."""

from pathlib import Path

import pytest
import torch

from latentdiff.formats.diffusers import find_component
from latentdiff.images import to_floats
from latentdiff.models.discriminator import Discriminator
from latentdiff.models.vae import VAE, VAEConfig
from latentdiff.tasks.vae.config import SMALL, TrainVAE
from latentdiff.tasks.vae.evaluation import discriminator_scores, initial_vae, latent_statistics
from latentdiff.tasks.vae.losses import hinge_loss
from latentdiff.tasks.vae.task import new_vae


def emoji() -> Path:
    return find_component("emoji", "vae")


def test_a_initial_vae_draws_as_it_did_from_latents_as_the_kl_wants_them() -> None:
    """The KL asks for unit variance before scaling, where a saved VAE has 1 / scaling_factor^2."""
    before = VAE.from_pretrained(emoji())
    after = initial_vae(emoji(), image_size=32, decoder_only=False)
    assert after.config.sample_size == 32
    assert all(parameter.requires_grad for parameter in after.parameters())
    images = 2 * torch.rand(2, 3, 32, 32) - 1
    found, scaled = after.posterior(images), before.encode(images)
    torch.testing.assert_close(found.mean, scaled.mean)
    torch.testing.assert_close(found.logvar, scaled.logvar)
    noise = torch.randn_like(found.mean)
    torch.testing.assert_close(
        after(images, noise)[0], before(images, noise)[0], rtol=1e-4, atol=1e-4
    )


def test_of_a_decoder_alone_nothing_else_needs_a_gradient() -> None:
    vae = initial_vae(emoji(), image_size=32, decoder_only=True)
    trained = {name.partition(".")[0] for name, p in vae.named_parameters() if p.requires_grad}
    assert trained == {"decoder", "post_quant_conv"}
    before = VAE.from_pretrained(emoji()).state_dict()
    assert all(tensor.equal(before[name]) for name, tensor in vae.state_dict().items())


def test_a_given_network_and_a_described_one_must_not_differ() -> None:
    initial = VAE.from_pretrained(emoji()).config
    for vae in (SMALL, initial):
        found = new_vae(TrainVAE(init="emoji", vae=vae)).config
        assert found.block_out_channels == initial.block_out_channels
    other = VAEConfig(block_out_channels=(8, 16), norm_num_groups=4)
    with pytest.raises(ValueError, match="vae differs from the network of init='emoji'; leave out"):
        new_vae(TrainVAE(init="emoji", vae=other))


@torch.no_grad()
def test_folded_statistics_leave_standard_latents() -> None:
    """Of 70 images, which are more than a batch."""
    vae = initial_vae(emoji(), image_size=16, decoder_only=False)
    images = torch.randint(0, 256, (70, 3, 16, 16), dtype=torch.uint8)
    vae.fold_latent_statistics(*latent_statistics(vae, images))
    mean, std = latent_statistics(vae, images)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-5)
    torch.testing.assert_close(std, torch.ones_like(std), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_discriminators_scores_are_those_of_all_images_a_few_at_a_time() -> None:
    torch.manual_seed(0)
    vae = VAE(VAEConfig(block_out_channels=(8, 16), norm_num_groups=4))
    images = torch.randint(0, 256, (41, 3, 32, 32), dtype=torch.uint8)
    critic, sizes = Discriminator(), list[int]()
    critic.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    found = discriminator_scores(vae, critic, images)
    assert max(sizes) == 16
    assert sum(sizes) == 2 * len(images)
    images = to_floats(images)
    real, fake = critic(images), critic(vae.decode(vae.encode(images).mean))
    whole = {
        "disc_real": real.mean(),
        "disc_fake": fake.mean(),
        "disc_loss": hinge_loss(real, fake),
    }
    for name, expected in whole.items():
        assert found[name] == pytest.approx(float(expected), rel=1e-4, abs=1e-5), name
