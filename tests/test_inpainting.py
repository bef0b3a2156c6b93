"""An inpainting network: what it reads, and how a network that reads less comes to read it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.tiny import CONTEXT_DIM, UNET, randomise

from latentdiff.diffusion import Diffusion
from latentdiff.formats.ldm.compatibility import SD1_TOWER, is_sd_shape
from latentdiff.formats.ldm.inferred_config import ModelConfigs
from latentdiff.formats.ldm.modelspec import modelspec
from latentdiff.models.dit import DiT, DiTConfig
from latentdiff.models.inpainting import with_mask_channels
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.models.vae_config import VAEConfig

DIT = DiTConfig(
    num_layers=2, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=CONTEXT_DIM
)
NETWORKS = [(UNet, UNET), (DiT, DIT)]


def network(cls: Any, config: Any, **changes: Any) -> Any:
    torch.manual_seed(0)
    made = cls(replace(config, **changes))
    randomise(made)
    return made.eval()


@pytest.mark.parametrize(("cls", "config"), NETWORKS)
@torch.no_grad()
def test_a_network_that_grows_computes_what_it_did(cls: Any, config: Any) -> None:
    """Whatever it reads in the new channels, and they learn from the first step on."""
    before, grown = network(cls, config), with_mask_channels(network(cls, config), 4)
    assert grown.config == replace(config, in_channels=9)
    x, channels = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8, 8)
    t, context = torch.tensor([3.0, 700.0]), torch.randn(2, 7, CONTEXT_DIM)
    expected = before(x, t, context)
    found = grown(torch.cat([x, channels], dim=1), t, context)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    with torch.enable_grad():
        grown(torch.cat([x, channels], dim=1), t, context).square().mean().backward()
    first = grown.conv_in if cls is UNet else grown.patch_embed
    assert first.weight.grad[:, 4:].any()


@pytest.mark.parametrize(("cls", "config"), NETWORKS)
def test_a_grown_network_is_one_that_was_made_so(cls: Any, config: Any) -> None:
    """Its weights fit, and it is taken as it is."""
    grown = with_mask_channels(network(cls, config), 4)
    made = network(cls, config, in_channels=9)
    made.load_state_dict(grown.state_dict())
    weights = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    assert with_mask_channels(made, 4) is made
    assert all(weights[name].equal(tensor) for name, tensor in made.state_dict().items())


def test_the_network_of_stable_diffusion_grows_to_that_of_its_inpainting_model() -> None:
    with torch.device("meta"):
        grown = with_mask_channels(UNet(UNetConfig()), 4)
        expected = UNet(UNetConfig(in_channels=9))
    shapes = {name: tensor.shape for name, tensor in grown.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in expected.state_dict().items()}
    assert grown.config == expected.config
    configs = ModelConfigs(
        grown.config.to_dict(),
        VAEConfig().to_dict(),
        SD1_TOWER,
        Diffusion("scaled_linear", "epsilon").to_scheduler_config(),
    )
    is_sd = is_sd_shape(configs.unet, configs.vae, configs.text_encoder)
    said = modelspec(configs, {}, title="", is_sd=is_sd)
    assert said["modelspec.architecture"] == "stable-diffusion-v1-inpainting"


@pytest.mark.parametrize(("cls", "config"), NETWORKS)
def test_a_network_of_other_channels_is_refused(cls: Any, config: Any) -> None:
    with pytest.raises(ValueError, match=r"in_channels=5 .* must be 4, .* or 9, with mask and"):
        with_mask_channels(network(cls, config, in_channels=5), 4)
