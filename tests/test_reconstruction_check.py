"""The reconstruction check: a VAE that blurs or discolours is refused, a good one passes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.scripts import run_here
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.data.config import DataConfig
from latentdiff.data.latent_check import some_images
from latentdiff.data.opening import open_images
from latentdiff.data.reconstruction_check import (
    Reconstruction,
    ReconstructionLimits,
    reconstruction,
    reconstruction_faults,
)
from latentdiff.data.shapes import build_shapes
from latentdiff.models.vae import VAE

LIMITS = ReconstructionLimits()
EMOJI = Path(__file__).parent.parent / "latentdiff" / "pretrained" / "emoji" / "vae"


class Damaged(nn.Module):
    """What follows a decoder's last convolution, to spoil what it makes."""

    def __init__(self, convolution: nn.Module, damage: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.convolution, self.damage = convolution, damage

    def forward(self, x: Tensor) -> Tensor:
        return self.damage(self.convolution(x))


def half_grey(x: Tensor) -> Tensor:
    return 0.5 * x + 0.5 * x.mean(dim=1, keepdim=True)


def mixed(x: Tensor) -> Tensor:
    """As a red of (212, 60, 49) came back as (158, 114, 53): much of red becomes green."""
    red, green, blue = x.unbind(1)
    return torch.stack([0.65 * red + 0.35 * green, 0.65 * green + 0.35 * red, blue], 1)


def blurred(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 17, stride=1, padding=8, count_include_pad=False)


def vae(damage: Callable[[Tensor], Tensor] | None = None) -> VAE:
    model: Any = VAE.from_pretrained(EMOJI).eval()
    if damage is not None:
        model.decoder.conv_out = Damaged(model.decoder.conv_out, damage)
    return model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    build_shapes(folder, count=12, seed=0, size=64)
    return folder


@pytest.fixture(scope="module")
def images(data: Path) -> list[Tensor]:
    return list(some_images(open_images(DataConfig(data=str(data), image_size=64, num_workers=0))))


def measured(model: VAE, images: list[Tensor]) -> Reconstruction:
    return reconstruction(model, images, batch_size=5)


def test_a_good_vae_passes(images: list[Tensor]) -> None:
    found = measured(vae(), images)
    assert found.num_images == len(images)
    assert found.psnr > 30
    assert found.colour_error < 0.1
    assert reconstruction_faults(found, LIMITS) == []


@pytest.mark.parametrize(
    ("damage", "words", "allows"),
    [
        (half_grey, "discoloured: the colours come back wrong by 5", {"max_colour_error": 1.0}),
        (mixed, "discoloured: ", {"max_colour_error": 1.0}),
        (blurred, "blurred: ", {"min_psnr": 0.0, "max_colour_error": 1.0}),
    ],
)
def test_each_damage_is_named_and_can_be_allowed(
    images: list[Tensor],
    damage: Callable[[Tensor], Tensor],
    words: str,
    allows: dict[str, float],
) -> None:
    """The check before caching said nothing of a red that came back as olive."""
    found = measured(vae(damage), images)
    faults = reconstruction_faults(found, LIMITS)
    assert any(words in fault for fault in faults), (found, faults)
    assert all(f"--{name} " in "; ".join(faults) for name in list(allows)[:1])
    assert reconstruction_faults(found, ReconstructionLimits(**allows)) == []


def test_blur_alone_is_no_error_of_colour_and_grey_images_have_none(images: list[Tensor]) -> None:
    slight = measured(vae(lambda x: F.avg_pool2d(x, 3, stride=1, padding=1)), images)
    assert slight.psnr < measured(vae(), images).psnr - 3
    assert slight.colour_error < LIMITS.max_colour_error / 2
    grey = [one.float().mean(0, keepdim=True).expand(3, -1, -1).to(torch.uint8) for one in images]
    assert measured(vae(half_grey), grey).colour_error == 0


def test_limits_are_numbers_from_0() -> None:
    for values in ({"min_psnr": -1.0}, {"max_colour_error": float("nan")}):
        with pytest.raises(ValueError, match=r"must be at least 0"):
            ReconstructionLimits(**values)


@torch.no_grad()
def test_the_script_refuses_says_and_goes_on_when_told(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = vae()
    out = model.decoder.conv_out
    for part in (out.weight, out.bias):
        part.copy_(0.5 * part + 0.5 * part.mean(dim=0, keepdim=True))
    model.save_pretrained(tmp_path / "vae")
    args = [f"--data={data}", "--image_size=64", f"--vae={tmp_path / 'vae'}", "--num_workers=0"]
    args.append(f"--output_dir={tmp_path / 'cache'}")
    with pytest.raises(SystemExit) as stop:
        run_here("cache_latents", *args)
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert "dB PSNR; their colours are off by" in said.out
    assert "is not fit to train on: discoloured: the colours come back wrong by" in said.err
    assert not (tmp_path / "cache" / "header.json").exists()
    run_here("cache_latents", *args, "--max_colour_error=10")
    assert (tmp_path / "cache" / "header.json").is_file()
