"""What a fingerprint is of, and what not."""

from dataclasses import replace
from pathlib import Path

import torch

from latentdiff.models.fingerprint import encoder_fingerprint, fingerprint
from latentdiff.models.vae import VAE, VAEConfig


def vae() -> VAE:
    torch.manual_seed(0)
    return VAE(VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4))


def test_the_fingerprint_of_a_network_is_of_configuration_and_weights(tmp_path: Path) -> None:
    def of(vae: VAE) -> str:
        return fingerprint(vae, vae.config.to_dict())

    network, same = vae(), vae()
    assert of(network) == of(same)
    network.save_pretrained(tmp_path)
    assert of(VAE.from_pretrained(tmp_path)) == of(network)
    with torch.no_grad():
        same.decoder.conv_out.bias[0] += 1e-3
    assert of(same) != of(network)
    other = VAE(replace(network.config, scaling_factor=0.8))
    other.load_state_dict(network.state_dict())
    assert of(other) != of(network)


def test_the_fingerprint_of_an_encoder_is_of_what_latents_follow_from() -> None:
    """Each weight that they do not depend on may change, and none of the others."""
    first = encoder_fingerprint(vae())
    network = vae()
    for name, parameter in network.named_parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter += 0.1
        changed = encoder_fingerprint(network) != first
        assert changed == name.startswith(("encoder.", "quant_conv.")), name
        with torch.no_grad():
            parameter.copy_(before)
    for key, value, counts in (
        ("scaling_factor", 0.8, True),
        ("norm_num_groups", 2, True),
        ("sample_size", 64, False),
        ("force_upcast", False, False),
    ):
        network.config = replace(vae().config, **{key: value})
        assert (encoder_fingerprint(network) != first) == counts, key
