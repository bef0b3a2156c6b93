"""The enlarging decoder: its latent is the image made small, and all else stays what it was."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from support.parity import fill, same_weights
from support.scripts import run_here
from support.tiny import UNET, randomise, tiny_pipeline
from test_train_vae import assert_near, train, train_in_two, weights
from torch import Tensor

from latentdiff.data.shapes import build_shapes
from latentdiff.models.unet import UNet
from latentdiff.models.vae import VAE, Posterior, VAEConfig
from latentdiff.pipeline import Pipeline


def config(levels: int = 3, **keys: Any) -> VAEConfig:
    values: dict[str, Any] = {"layers_per_block": 1, "norm_num_groups": 4, "sample_size": 16}
    return VAEConfig(
        block_out_channels=(8,) * levels,
        encoder="downsample",
        latent_channels=3,
        **values | keys,
    )


def enlarger(levels: int = 3, **keys: Any) -> VAE:
    """With no parameter left at a special value."""
    network = VAE(config(levels, **keys))
    fill(network)
    network.encoder.load_state_dict({"mean": torch.zeros(3), "std": torch.ones(3)})
    return network.eval()


def areas(images: Tensor, f: int) -> Tensor:
    """The mean colour of each f x f square."""
    return images.unflatten(-1, (-1, f)).unflatten(-3, (-1, f)).mean(dim=(-3, -1))


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_the_latent_is_the_mean_colour_of_each_square(levels: int) -> None:
    vae = enlarger(levels, scaling_factor=1.0)
    f = vae.config.factor
    images = torch.rand(2, 3, 3 * f, 5 * f) * 2 - 1
    found = vae.encode(images)
    torch.testing.assert_close(found.mean, areas(images, f), rtol=0, atol=1e-6)
    assert vae.decode(found.mean).shape == images.shape


def test_a_sample_is_the_small_image_to_the_rounding_of_a_number() -> None:
    """Before the cache and from it, where the moments are float16."""
    vae = enlarger(scaling_factor=0.18215)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    q, noise = vae.encode(images), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(q.sample(noise), q.mean, rtol=0, atol=2e-6)
    moments = torch.cat([q.mean, q.logvar], dim=1).half().float()
    again = Posterior.from_moments(moments).sample(noise)
    torch.testing.assert_close(again, q.mean, rtol=torch.finfo(torch.float16).eps, atol=2e-6)


def test_nothing_is_learned_but_the_decoder() -> None:
    vae, learned = enlarger(), VAE(replace(config(), encoder="kl"))
    names = {name for name, _ in vae.named_parameters()}
    assert names == {
        name
        for name, _ in learned.named_parameters()
        if name.startswith(("decoder.", "post_quant_conv."))
    }
    reconstruction, _ = vae(torch.rand(1, 3, 16, 16), torch.zeros(1, 3, 4, 4))
    reconstruction.square().mean().backward()  # DDP waits for every parameter's gradient
    assert all(parameter.grad is not None for parameter in vae.parameters())


def test_folding_standardises_the_small_images_and_changes_no_reconstruction() -> None:
    """Twice, as when a decoder is trained on from what a run has left."""
    vae = enlarger(scaling_factor=0.3).double()
    images = torch.rand(6, 3, 12, 20, dtype=torch.float64) ** 2
    before = vae.decode(vae.encode(images).mean)
    for part in (images[:3], images):
        z = vae.encode(part).mean
        vae.fold_latent_statistics(z.mean(dim=(0, 2, 3)), z.std(dim=(0, 2, 3), correction=0))
    after = vae.encode(images)
    std, mean = torch.std_mean(after.mean, dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-12)
    torch.testing.assert_close(std, torch.ones_like(std), rtol=0, atol=1e-12)
    torch.testing.assert_close(vae.decode(after.mean), before, rtol=1e-12, atol=1e-12)
    noise = torch.randn_like(after.mean)
    torch.testing.assert_close(after.sample(noise), after.mean, rtol=0, atol=2e-6)


def test_a_folder_round_trip_is_bit_exact(tmp_path: Path) -> None:
    vae = enlarger()
    vae.fold_latent_statistics(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7]))
    vae.save_pretrained(tmp_path)
    loaded = VAE.from_pretrained(tmp_path)
    assert loaded.config == vae.config
    assert same_weights(loaded, vae)
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(loaded.encode(images).mean, vae.encode(images).mean)


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    unet = UNet(replace(UNET, in_channels=3, out_channels=3)).eval()
    randomise(unet)
    whole = tiny_pipeline(tmp_path / "words")
    return Pipeline(
        unet=unet, vae=enlarger(2), text_encoder=whole.text_encoder, diffusion=whole.diffusion
    )


def test_a_pipeline_folder_draws_the_same_pixels(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "folder")
    again = Pipeline.from_pretrained(tmp_path / "folder")
    drawn = [
        pipe("a red circle", seed=3, steps=2, progress=False).images[0]
        for pipe in (pipeline, again)
    ]
    assert drawn[0].tobytes() == drawn[1].tobytes()
    assert pipeline.fingerprint() == again.fingerprint()


def test_diffusers_refuses_the_folder_and_adds_no_encoder(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path / "folder")
    with pytest.raises(ValueError, match="AreaAverage does not exist"):
        AutoencoderKL.from_pretrained(tmp_path / "folder" / "vae")
    with pytest.raises(ValueError, match=r"latentdiff\.models\.vae\.VAE.* cannot be loaded"):
        DiffusionPipeline.from_pretrained(tmp_path / "folder")


def test_a_single_file_is_refused_in_words(pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="encoder='downsample' has no place in a single file"):
        pipeline.save_single_file(tmp_path / "model.safetensors")
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_learned_encoder_is_written_without_a_word_of_this() -> None:
    written = VAEConfig().to_dict()
    assert "encoder" not in written
    assert written["_class_name"] == "AutoencoderKL"
    assert VAEConfig.from_dict({**written, "encoder": "kl"}) == VAEConfig()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("latent_channels", 4, "latent_channels=4 must be 3, the in_channels, with encoder='down"),
        ("_class_name", "AutoencoderKL", "_class_name='AutoencoderKL' is not supported"),
        ("encoder", "kl", "_class_name='VAE' is not supported"),
    ],
)
def test_what_does_not_fit_is_refused_by_key_and_value(key: str, value: Any, message: str) -> None:
    values = json.loads(json.dumps(config().to_dict()))
    with pytest.raises(ValueError, match=message):
        VAEConfig.from_dict({**values, key: value})


def test_folding_needs_the_convolution_of_the_decoder() -> None:
    with pytest.raises(ValueError, match="use_post_quant_conv=False must be true"):
        enlarger(use_post_quant_conv=False).fold_latent_statistics(torch.zeros(3), torch.ones(3))


def test_a_vae_without_an_encoder_cannot_be_trained() -> None:
    with pytest.raises(ValueError, match="encoder='none' must be 'kl' or 'downsample'"):
        VAEConfig(encoder="none").check_folds()


def test_an_unknown_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match="encoder='upsample' must be 'kl' or 'downsample'"):
        VAEConfig(encoder="upsample")  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "set"
    build_shapes(folder, count=40, seed=0, size=32)
    return folder


ENLARGER = ("--vae.encoder=downsample", "--vae.latent_channels=3")


@pytest.mark.processes
def test_two_processes_train_the_decoder_as_one_does(shapes: Path, tmp_path: Path) -> None:
    """On the distance alone: there is no KL."""
    records = train(shapes, tmp_path / "one", *ENLARGER)
    train_in_two(shapes, tmp_path / "two", *ENLARGER)
    assert_near(*(weights(tmp_path / run, 4, "vae") for run in ("two", "one")))
    assert all(record["loss"] == record["l1"] for record in records)
    assert not any("kl" in record for record in records)


@pytest.mark.training
def test_the_four_scripts_make_a_pipeline_of_it(shapes: Path, tmp_path: Path) -> None:
    """Through the latent check, which does not ask whether a decoder has learned."""
    train(shapes, tmp_path / "vae", *ENLARGER, "--disc_weight=0")
    data = [f"--data={shapes}", "--image_size=32", f"--vae={tmp_path / 'vae' / 'model'}"]
    judged_by = ("--min_psnr=0", "--max_colour_error=10")  # a decoder of four steps
    run_here("cache_latents", *data, *judged_by, f"--output_dir={tmp_path / 'cache'}")
    network = (
        "--unet.block_out_channels=[8,16] --unet.norm_num_groups=4 --unet.attention_head_dim=2 "
        "--unet.down_block_types=[CrossAttnDownBlock2D,DownBlock2D] --max_steps=2 --batch_size=4 "
        "--unet.up_block_types=[UpBlock2D,CrossAttnUpBlock2D] --mixed_precision=no --val_fraction=0"
    )
    run = tmp_path / "unet"
    cached = (f"--cache={tmp_path / 'cache'}", data[-1], f"--output_dir={run}")
    run_here("train_unet", *network.split(), *cached, "--text_encoder=emoji")
    pipeline = Pipeline.from_pretrained(run / "model")
    assert pipeline.vae.config.encoder == "downsample"
    (image,) = pipeline("a red circle", seed=0, steps=2, progress=False).images
    assert image.size == (32, 32)
