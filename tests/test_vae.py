"""The VAE: diffusers' `AutoencoderKL` in every number, posterior, folders, unit variance."""

import dataclasses
import inspect
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from support.cases import mostly_exhaustive
from support.parity import (
    TOLERANCES,
    difference,
    fill,
    gradients,
    no_warning_logged,
    same_weights,
    shapes,
)
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from latentdiff.formats.weights import load_safetensors, save_safetensors
from latentdiff.models.vae import VAE, Posterior, VAEConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"


def config(channels: tuple[int, ...] = (8, 12), **keys: Any) -> VAEConfig:
    values: dict[str, Any] = {"layers_per_block": 1, "norm_num_groups": 4, "sample_size": 16}
    return VAEConfig(block_out_channels=channels, **values | keys)


CONFIGS = {
    "sd": config((4, 8, 8, 12), layers_per_block=2),
    "no mid attention": config(mid_block_add_attention=False, layers_per_block=3),
    "no quant convolutions": config(use_quant_conv=False, use_post_quant_conv=False),
    "one level": config((8,), sample_size=32, scaling_factor=1.0),
    "odd widths": config(
        (9, 21),
        norm_num_groups=3,
        in_channels=1,
        out_channels=2,
        latent_channels=7,
        scaling_factor=2.5,
        force_upcast=False,
    ),
}


def drawn(seed: int) -> VAEConfig:
    """A configuration at random, of all that the keys allow."""
    draw = random.Random(seed)
    return config(
        tuple(4 * draw.randint(1, 4) for _ in range(draw.randint(1, 3))),
        layers_per_block=draw.randint(1, 3),
        norm_num_groups=draw.choice((1, 2, 4)),
        latent_channels=draw.randint(1, 16),
        scaling_factor=draw.uniform(0.1, 2),
        mid_block_add_attention=draw.random() < 0.5,
        use_quant_conv=draw.random() < 0.5,
        use_post_quant_conv=draw.random() < 0.5,
    )


# Of widths that no two levels share, f 4, 8 and 16 with the latents of newer models.
SIZES = {
    "f4, 8 channels": config((4, 8, 12), latent_channels=8),
    "f8, 16 channels": config((4, 8, 12, 16), latent_channels=16),
    "f16, 32 channels": config((4, 8, 12, 16, 20), latent_channels=32),
}
CONFIGS |= SIZES
CONFIGS |= {f"drawn {seed}": drawn(seed) for seed in range(3)}
QUICK = ("sd", "odd widths")
each_config = pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, id=name, marks=[] if name in QUICK else pytest.mark.exhaustive)
        for name, config in CONFIGS.items()
    ],
)


def make_images(config: VAEConfig, *, batch: int = 2, **options: Any) -> Tensor:
    """(batch, C, 3f, 5f): sides that are multiples of f and of nothing else."""
    f = config.factor
    return torch.randn(batch, config.in_channels, 3 * f, 5 * f, **options)


def ours(config: VAEConfig, dtype: torch.dtype = torch.float32) -> VAE:
    """A network with no parameter left at a special value."""
    network = VAE(config)
    fill(network)
    return network.to(dtype)


@each_config
def test_outputs_and_all_gradients_equal_diffusers(config: VAEConfig) -> None:
    reference, vae = AutoencoderKL.from_config(config.to_dict()), VAE(config)
    fill(reference)
    assert shapes(vae) == shapes(reference)
    vae.load_state_dict(reference.state_dict())
    for dtype, tolerance in TOLERANCES.items():
        check_parity(vae.to(dtype), reference.to(dtype), dtype, tolerance)


def check_parity(vae: VAE, reference: AutoencoderKL, dtype: torch.dtype, tolerance: float) -> None:
    """diffusers leaves the scaling to its pipelines, so it stands here."""
    config = vae.config
    images = make_images(config, dtype=dtype, requires_grad=True)
    latents = torch.randn(2, config.latent_channels, 3, 5, dtype=dtype, requires_grad=True)
    noise = torch.randn(latents.shape, dtype=dtype)
    posterior, expected = vae.encode(images), reference.encode(images).latent_dist
    scale = config.scaling_factor
    outputs = {
        "mean": posterior.mean,
        "sample": posterior.sample(noise),
        "kl": vae.posterior(images).kl(),
        "decoded": vae.decode(latents),
    }
    wanted = {
        "mean": expected.mean * scale,
        "sample": (expected.mean + expected.std * noise) * scale,
        "kl": expected.kl(),
        "decoded": reference.decode(latents / scale).sample,
    }
    for name, tensor in wanted.items():
        assert difference({name: outputs[name]}, {name: tensor}) < tolerance
    output, target = (
        torch.cat([tensors[name].flatten() for name in ("sample", "decoded")])
        for tensors in (outputs, wanted)
    )
    reached = gradients(target, reference, (images, latents))
    found = gradients(output, vae, (images, latents))
    assert difference(found, reached) < tolerance
    assert all(gradient.any() for gradient in reached.values())


@each_config
def test_configuration_passes_through_diffusers_unchanged(config: VAEConfig) -> None:
    written = json.loads(json.dumps(config.to_dict()))
    with no_warning_logged(), torch.device("meta"):
        reference = AutoencoderKL.from_config(written)
    assert VAEConfig.from_dict(dict(reference.config)) == config
    assert VAEConfig.from_dict(written) == config


def test_every_key_of_diffusers_is_written_and_an_absent_one_means_what_it_means_there() -> None:
    parameters = inspect.signature(AutoencoderKL.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if name != "self"}
    written = VAEConfig.from_dict({}).to_dict()
    tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in written.items()}
    assert tuples == {"_class_name": "AutoencoderKL", **defaults}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("act_fn", "gelu"),
        ("shift_factor", 0.1),
        ("latents_mean", [0.0, 0.0, 0.0, 0.1]),
        ("down_block_types", ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]),
        ("up_block_types", ["UpDecoderBlock2D"]),
        ("block_out_channels", [8, 10]),
        ("layers_per_block", 0),
        ("latent_channels", None),
        ("norm_num_groups", None),
        ("colour", "red"),
    ],
)
def test_what_the_network_cannot_do_is_refused_by_key_and_value(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key) as error:
        VAE(VAEConfig.from_dict({**config().to_dict(), key: value}))
    assert repr(value) in str(error.value).replace("(", "[").replace(")", "]")


@pytest.mark.parametrize("size", [(8, 12), (12, 8), (9, 9)])
def test_a_size_that_the_factor_does_not_divide_is_refused(size: tuple[int, int]) -> None:
    vae = VAE(CONFIGS["sd"])
    with pytest.raises(ValueError, match=rf"\({size[0]}, {size[1]}\) must be divisible by 8"):
        vae.encode(torch.zeros(1, 3, *size))


def posterior(*shape: int, dtype: torch.dtype = torch.float64) -> Posterior:
    return Posterior(torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype) - 1)


def test_kl_equals_torch_distributions() -> None:
    q = posterior(4, 3, 5, 7)
    expected = kl_divergence(
        Normal(q.mean, (0.5 * q.logvar).exp()),
        Normal(torch.zeros_like(q.mean), torch.ones_like(q.mean)),
    ).sum(dim=(1, 2, 3))
    torch.testing.assert_close(q.kl(), expected, rtol=1e-12, atol=0)


def test_kl_is_the_mean_log_ratio_of_samples() -> None:
    """Within four standard errors of 50,000 draws."""
    q = posterior(1, 2, 2, 1)
    z = q.sample(torch.randn(50_000, 2, 2, 1, dtype=torch.float64))
    std = (0.5 * q.logvar).exp()
    ratios = Normal(q.mean, std).log_prob(z) - Normal(0.0, 1.0).log_prob(z)
    ratios = ratios.sum(dim=(1, 2, 3))
    error = ratios.std() / len(ratios) ** 0.5
    assert abs(ratios.mean() - q.kl()) < 4 * error
    assert error < 0.02 * q.kl()  # or the line above says nothing


def test_kl_is_zero_for_the_prior_alone() -> None:
    zeros = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    assert not Posterior(zeros, zeros).kl().any()
    assert (posterior(8, 3, 4, 4).kl() > 0).all()


def test_a_sample_is_mean_plus_standard_deviation_times_noise() -> None:
    q = posterior(2, 3, 4, 5)
    noise = torch.randn_like(q.mean)
    assert torch.equal(q.sample(torch.zeros_like(noise)), q.mean)
    torch.testing.assert_close((q.sample(noise) - q.mean) / noise, q.logvar.exp().sqrt())


def test_scaled_is_the_distribution_of_the_multiple() -> None:
    q, noise = posterior(2, 3, 4, 5), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(
        q.scaled(0.18215).sample(noise), 0.18215 * q.sample(noise), rtol=1e-12, atol=1e-15
    )


def test_the_log_variance_stays_finite_whatever_the_encoder_says() -> None:
    moments = torch.tensor([0.0, 0.0, 1e9, -1e9]).reshape(1, 4, 1, 1)
    q = Posterior.from_moments(moments)
    assert q.logvar.flatten().tolist() == [20.0, -30.0]
    assert torch.isfinite(q.kl()).all()


def test_a_training_step_sees_the_unscaled_posterior_and_its_reconstruction() -> None:
    vae = ours(CONFIGS["odd widths"], torch.float64)
    images = make_images(vae.config, dtype=torch.float64)
    noise = torch.randn(2, vae.config.latent_channels, 3, 5, dtype=torch.float64)
    reconstruction, q = vae(images, noise)
    again = vae.decode(vae.encode(images).sample(noise))
    torch.testing.assert_close(reconstruction, again, rtol=1e-12, atol=1e-12)
    scaled = q.scaled(vae.config.scaling_factor)
    torch.testing.assert_close(scaled.mean, vae.encode(images).mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(scaled.logvar, vae.encode(images).logvar, rtol=1e-12, atol=0)


def statistics(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (C,)."""
    return latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3), correction=0)


def test_folding_standardises_the_latents_and_changes_no_reconstruction() -> None:
    vae = ours(config(scaling_factor=0.3), torch.float64)
    images = make_images(vae.config, batch=6, dtype=torch.float64)
    noise = torch.randn(6, 4, 3, 5, dtype=torch.float64)
    before, images_before = vae.encode(images), vae.decode(vae.encode(images).sample(noise))

    mean, std = statistics(before.sample(noise))
    vae.fold_latent_statistics(mean, std)
    after = vae.encode(images)

    assert vae.config.scaling_factor == 0.3
    zero, one = statistics(after.sample(noise))
    torch.testing.assert_close(zero, torch.zeros_like(zero), rtol=0, atol=1e-12)
    torch.testing.assert_close(one, torch.ones_like(one), rtol=0, atol=1e-12)
    c = (slice(None), None, None)
    torch.testing.assert_close(after.mean, (before.mean - mean[c]) / std[c], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        after.logvar, before.logvar - 2 * std[c].log(), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(
        vae.decode(after.sample(noise)), images_before, rtol=1e-12, atol=1e-12
    )


def test_what_was_folded_is_in_the_folder_for_us_and_for_diffusers(tmp_path: Path) -> None:
    """And folding what was loaded from a file leaves the file as it was."""
    vae = ours(config())
    images = make_images(vae.config, batch=6)
    vae.save_pretrained(tmp_path / "raw")
    with torch.no_grad():
        images_before = vae.decode(vae.encode(images).mean)
        folded = VAE.from_pretrained(tmp_path / "raw")
        folded.fold_latent_statistics(*statistics(folded.encode(images).mean))
        folded.save_pretrained(tmp_path / "folded")
        loaded = VAE.from_pretrained(tmp_path / "folded")
        reference = AutoencoderKL.from_pretrained(tmp_path / "folded")

        assert same_weights(loaded, folded)
        assert same_weights(VAE.from_pretrained(tmp_path / "raw"), vae)
        latents = loaded.encode(images).mean
        theirs = reference.encode(images).latent_dist.mean * 0.18215
        torch.testing.assert_close(latents, theirs)
        zero, one = statistics(latents)
        torch.testing.assert_close(zero, torch.zeros(4), rtol=0, atol=1e-5)
        torch.testing.assert_close(one, torch.ones(4), rtol=0, atol=1e-5)
        again = loaded.decode(latents)
        torch.testing.assert_close(again, images_before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("key", ["use_quant_conv", "use_post_quant_conv"])
def test_folding_needs_both_convolutions(key: str) -> None:
    vae = VAE(config(**{key: False}))
    with pytest.raises(ValueError, match=f"^{key}=False must be true"):
        vae.fold_latent_statistics(torch.zeros(4), torch.ones(4))


@pytest.mark.parametrize("name", mostly_exhaustive(CONFIGS, quick=2))
def test_a_folder_round_trip_is_bit_exact_through_diffusers_too(tmp_path: Path, name: str) -> None:
    vae = ours(CONFIGS[name])
    vae.save_pretrained(tmp_path / "ours")
    loaded = VAE.from_pretrained(tmp_path / "ours")
    assert loaded.config == vae.config
    assert same_weights(loaded, vae)
    assert not loaded.training
    with no_warning_logged():
        reference = AutoencoderKL.from_pretrained(tmp_path / "ours")
    assert same_weights(reference, vae)
    reference.save_pretrained(tmp_path / "theirs")
    again = VAE.from_pretrained(tmp_path / "theirs")
    assert again.config == vae.config
    assert same_weights(again, vae)


def test_half_precision_on_disk_is_float32_in_memory(tmp_path: Path) -> None:
    vae = ours(config())
    vae.save_pretrained(tmp_path, dtype=torch.float16)
    stored = load_safetensors(tmp_path / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert same_weights(VAE.from_pretrained(tmp_path), vae.half().float())


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    VAE(config()).save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: no such file"):
        VAE.from_pretrained(tmp_path)


def test_weights_that_do_not_fit_are_refused_and_the_first_is_named(tmp_path: Path) -> None:
    vae = VAE(config())
    vae.save_pretrained(tmp_path)
    other = dataclasses.replace(vae.config, latent_channels=5)
    (tmp_path / "config.json").write_text(json.dumps(other.to_dict()))
    with pytest.raises(ValueError, match=r"first decoder\.conv_in\.weight: \(12, 4, .*\(12, 5, "):
        VAE.from_pretrained(tmp_path)

    vae.save_pretrained(tmp_path)
    tensors = load_safetensors(tmp_path / WEIGHTS)
    del tensors["quant_conv.bias"]
    save_safetensors(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"first quant_conv\.bias: missing in the file"):
        VAE.from_pretrained(tmp_path)
