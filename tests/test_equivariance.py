"""EQ-VAE's regulariser: an equivariant VAE does not feel it, another does; and what it is drawn."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.scripts import run_here
from torch import Tensor
from torch.nn import functional as F

from latentdiff.data.shapes import build_shapes
from latentdiff.models.discriminator import SMALLEST, Discriminator
from latentdiff.models.vae import VAE, Posterior, VAEConfig
from latentdiff.options import compose
from latentdiff.tasks.vae.config import TrainVAE
from latentdiff.tasks.vae.equivariance import (
    Transformation,
    check_equivariance,
    draw_transformation,
    smallest_side,
)
from latentdiff.tasks.vae.losses import vae_loss
from latentdiff.training.checkpoint import StoredTensors

Function = Callable[[Tensor], Tensor]
TURNS = [Transformation(8, 8, turns) for turns in (1, 2, 3)]
SCALINGS = [Transformation(2, 3, 0), Transformation(5, 7, 1), Transformation(7, 2, 2)]


def loss_of(
    encode: Function, decode: Function, images: Tensor, by: Transformation | None = None
) -> Tensor:
    """The loss of a VAE without noise, with its latents and images transformed."""
    mean = encode(images)
    latents, targets = mean, images
    if by is not None:
        latents, targets = by(mean), by(images, factor=images.shape[-1] // mean.shape[-1])
    posterior = Posterior(mean, torch.zeros_like(mean))
    size = images[0].numel()
    values = vae_loss(
        decode(latents), targets, posterior, norm="l1", kl_weight=0.3, num_encoded=size
    )
    return torch.stack(values)


def pooled(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 4)


def enlarged(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=4)


@pytest.mark.parametrize("by", [*TURNS, *SCALINGS])
def test_the_identity_has_the_same_loss_with_any_transformation(by: Transformation) -> None:
    images = torch.randn(2, 3, 8, 8)

    def same(x: Tensor) -> Tensor:
        return x

    assert torch.equal(loss_of(same, same, images, by), loss_of(same, same, images))


@pytest.mark.parametrize("by", TURNS)
def test_means_of_squares_have_the_same_loss_when_they_are_turned(by: Transformation) -> None:
    images = torch.randn(2, 3, 32, 32)
    expected = loss_of(pooled, enlarged, images)
    assert expected[0] > 0.5
    torch.testing.assert_close(loss_of(pooled, enlarged, images, by), expected)


@pytest.mark.parametrize("by", SCALINGS)
def test_means_of_squares_of_one_colour_have_the_same_loss_when_they_are_scaled(
    by: Transformation,
) -> None:
    images = torch.randn(2, 3, 1, 1).expand(2, 3, 32, 32)
    expected = loss_of(pooled, enlarged, images)
    torch.testing.assert_close(loss_of(pooled, enlarged, images, by), expected)


@pytest.mark.parametrize("by", [*TURNS, *SCALINGS])
def test_pixels_packed_into_channels_are_not_equivariant(by: Transformation) -> None:
    """A perfect VAE, whose latents hide the layout of each square: its loss tells."""
    images = torch.randn(2, 3, 32, 32)

    def pack(x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, 4)

    def unpack(z: Tensor) -> Tensor:
        return F.pixel_shuffle(z, 4)

    assert loss_of(pack, unpack, images)[1] == 0
    assert loss_of(pack, unpack, images, by)[1] > 0.3


def test_the_network_decodes_the_transformed_latents() -> None:
    torch.manual_seed(0)
    vae = VAE(VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4))
    images, noise = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 8, 8)
    by = Transformation(3, 5, 1)
    found, posterior = vae(images, noise, by)
    assert found.shape == (2, 3, 10, 6)
    latents = vae.encode(images).sample(noise)
    torch.testing.assert_close(found, vae.decode(by(latents)))
    assert torch.equal(posterior.mean, vae(images, noise)[1].mean)


def test_sides_are_whole_numbers_from_a_quarter_and_turns_are_one_to_three() -> None:
    steps = range(2000)
    draws = [draw_transformation(9, 18, probability=0.5, seed=0, step=step) for step in steps]
    drawn = [draw for draw in draws if draw is not None]
    assert 900 < len(drawn) < 1100
    heights, turns = Counter(d.height for d in drawn), Counter(d.quarter_turns for d in drawn)
    assert sorted(heights) == [3, 4, 5, 6, 7, 8]
    assert sorted(turns) == [1, 2, 3]
    assert all(d.width == 2 * d.height for d in drawn)
    assert min(heights.values()) > 100
    assert draws == [draw_transformation(9, 18, probability=0.5, seed=0, step=s) for s in steps]
    for probability, number in ((0.0, 0), (1.0, 2000)):
        some = [draw_transformation(9, 9, probability=probability, seed=1, step=s) for s in steps]
        assert sum(draw is not None for draw in some) == number


@pytest.mark.parametrize("factor", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("needed", [1, 16, 24, 31])
def test_the_least_image_size_is_just_large_enough(factor: int, needed: int) -> None:
    def fits(side: int) -> bool:
        return side >= 2 and factor * smallest_side(side) >= needed

    for side in range(1, 150):
        if fits(side):
            check_equivariance(factor * side, factor, needed=needed)
        else:
            with pytest.raises(ValueError, match=f"image_size={factor * side} must be at least"):
                check_equivariance(factor * side, factor, needed=needed)


def test_the_discriminator_scores_the_smallest_images_and_no_smaller_ones() -> None:
    discriminator = Discriminator(channels=4)
    assert discriminator(torch.randn(1, 3, SMALLEST, SMALLEST)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError):
        discriminator(torch.randn(1, 3, SMALLEST - 1, SMALLEST - 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"equivariance_probability": 1.5}, r"equivariance_probability=1.5 must be in \[0, 1\]"),
        (
            {"equivariance_probability": 0.5, "init": "emoji", "decoder_only": True},
            "equivariance_probability=0.5 must be 0 with decoder_only",
        ),
    ],
)
def test_options_that_do_not_apply_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose(TrainVAE, options)


NETWORK = "--vae.block_out_channels=[8,16] --vae.norm_num_groups=4 --vae.layers_per_block=1"
SHORT = "--image_size=32 --batch_size=4 --warmup_steps=1 --cooldown_steps=0 --max_steps=4"
REST = "--log_every=1 --checkpoint_every=2 --mixed_precision=no"
ARGUMENTS = f"{NETWORK} {SHORT} {REST}".split()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "data"
    build_shapes(folder, count=20, seed=0, size=32)
    return folder


def train(images: Path, run: Path, *more: str) -> dict[str, Tensor]:
    run_here("train_vae", *ARGUMENTS, f"--data={images}", f"--output_dir={run}", *more)
    return dict(StoredTensors(run / "checkpoints" / "step-4", "vae"))


@pytest.mark.training
def test_a_training_with_it_resumes_bit_for_bit(images: Path, tmp_path: Path) -> None:
    option = "--equivariance_probability=0.5"
    drawn = [draw_transformation(16, 16, probability=0.5, seed=0, step=step) for step in range(4)]
    assert len({draw is None for draw in drawn}) == 2
    expected = train(images, tmp_path / "straight", option)
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-4")
    found = train(images, tmp_path / "resumed", option)
    assert {n: t.equal(expected[n]) for n, t in found.items()} == dict.fromkeys(expected, True)
    without = train(images, tmp_path / "without")
    assert not without["model.decoder.conv_out.weight"].equal(
        found["model.decoder.conv_out.weight"]
    )


@pytest.mark.training
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--vae.encoder=downsample", "--vae.latent_channels=3"],
            "equivariance_probability=0.5 must be 0 with vae.encoder=downsample",
        ),
        (["--disc_weight=0.5"], "image_size=32 must be at least 90 with equivariance_probability"),
    ],
)
def test_a_training_that_cannot_have_it_is_refused(
    images: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train(images, tmp_path, "--equivariance_probability=0.5", *more)
    assert message in capsys.readouterr().err
