"""The latent check before a cache: sound latents pass, each fault is named, nothing is written."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.scripts import run_here
from torch import Tensor

from latentdiff.data.config import DataConfig
from latentdiff.data.dataset import CaptionedImages
from latentdiff.data.latent_check import check_latents, faults, some_images
from latentdiff.data.latent_statistics import LatentStatistics
from latentdiff.data.reconstruction_check import ReconstructionLimits
from latentdiff.data.samples import Sample
from latentdiff.data.shapes import build_shapes
from latentdiff.data.stream import StreamedImages
from latentdiff.formats.diffusers import find_component
from latentdiff.images import to_floats
from latentdiff.models.vae import VAE, VAEConfig

TINY = VAEConfig(
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    mid_block_add_attention=False,
    sample_size=16,
)


def rectangles(count: int, *, side: int = 16) -> Tensor:
    """Images (N, 3, side, side) uint8 of one rectangle each, of any colour on any colour."""
    pixels = torch.zeros(count, 3, side, side, dtype=torch.uint8)
    for image in pixels:
        colours = torch.randint(0, 256, (2, 3, 1, 1), dtype=torch.uint8)
        top, left = torch.randint(0, side // 2, (2,)).tolist()
        height, width = torch.randint(4, side // 2, (2,)).tolist()
        image[:] = colours[0]
        image[:, top : top + height, left : left + width] = colours[1]
    return pixels


def measured(vae: VAE, images: Iterable[Tensor]) -> LatentStatistics:
    return LatentStatistics.of(vae, images, batch_size=24)


def standardised(vae: VAE, images: Tensor) -> VAE:
    found = measured(vae, images)
    vae.fold_latent_statistics(found.mean, found.variance.sqrt())
    return vae.eval()


@pytest.fixture(scope="module")
def trained() -> VAE:
    """As train_vae.py leaves one, after seconds."""
    torch.manual_seed(0)
    vae = VAE(TINY)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    for _ in range(40):
        images = to_floats(rectangles(16))
        reconstruction, posterior = vae(images, torch.randn(16, 4, 8, 8))
        kl = posterior.kl().mean() / images[0].numel()
        loss = (reconstruction - images).abs().mean() + 1e-3 * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return standardised(vae, rectangles(64))


def copied(vae: VAE) -> VAE:
    other = VAE(vae.config).eval()
    other.load_state_dict(vae.state_dict())
    return other


@torch.no_grad()
def collapsed(vae: VAE, channel: int) -> VAE:
    """Of one channel the posterior is N(0, 1) whatever the image."""
    vae, C = copied(vae), vae.config.latent_channels
    for row in (channel, C + channel):
        vae.quant_conv.get_parameter("weight")[row] = 0.0
        vae.quant_conv.get_parameter("bias")[row] = 0.0
    unscaled = -2 * torch.tensor(vae.config.scaling_factor).log()
    vae.quant_conv.get_parameter("bias")[C + channel] = unscaled
    return vae


def test_the_statistics_are_those_of_latents_as_they_are_drawn(trained: VAE) -> None:
    images = rectangles(64)
    found = measured(trained, images)
    with torch.no_grad():
        q = trained.encode(to_floats(images))
        drawn = torch.stack([q.sample(torch.randn_like(q.mean)) for _ in range(8)])
    torch.testing.assert_close(found.mean, drawn.mean(dim=(0, 1, 3, 4)), rtol=0, atol=0.02)
    torch.testing.assert_close(found.variance, drawn.var(dim=(0, 1, 3, 4)), rtol=0.02, atol=0)
    torch.testing.assert_close(found.largest, q.mean.abs().amax(dim=(0, 2, 3)))
    by_place = q.mean.var(dim=0).mean(dim=(1, 2))
    torch.testing.assert_close(found.active, by_place)


def test_a_trained_vae_passes(trained: VAE) -> None:
    assert faults(measured(trained, rectangles(64)), {}) == []


@pytest.mark.parametrize("channel", [0, 2])
def test_a_collapsed_channel_is_named_with_what_was_measured(trained: VAE, channel: int) -> None:
    (sentence,) = faults(measured(collapsed(trained, channel), rectangles(64)), {})
    assert sentence.startswith("posterior collapse: ")
    assert f" in channel {channel} (" in sentence
    assert sentence.count(" (") == 1
    both = collapsed(collapsed(trained, channel), 3)
    (sentence,) = faults(measured(both, rectangles(64)), {})
    assert f" in channel {channel} (" in sentence
    assert ", channel 3 (" in sentence


def test_a_channel_that_varies_over_places_alone_has_collapsed(trained: VAE) -> None:
    """A pattern that every image has says nothing about any of them."""
    same = rectangles(1).expand(64, -1, -1, -1)
    (sentence,) = faults(measured(trained, same), {})
    assert all(f"channel {channel} (" in sentence for channel in range(4))


def test_the_fractions_do_not_depend_on_the_scale_of_the_latents(trained: VAE) -> None:
    """So that a VAE from elsewhere, whose latents are not quite standard, is judged by the same."""
    images, other = rectangles(64), copied(trained)
    other.fold_latent_statistics(torch.full((4,), 0.3), torch.tensor([0.5, 0.8, 1.5, 2.0]))
    a, b = measured(trained, images), measured(other, images)
    torch.testing.assert_close(a.active / a.variance, b.active / b.variance)
    torch.testing.assert_close(a.far, b.far)


@pytest.mark.parametrize(("scale", "word"), [(300.0, "unbounded"), (0.01, "vanishing")])
def test_latents_of_another_scale_than_noise_are_refused(
    trained: VAE, scale: float, word: str
) -> None:
    other = copied(trained)
    other.fold_latent_statistics(torch.zeros(4), torch.full((4,), 1 / scale))
    (sentence,) = faults(measured(other, rectangles(64)), {})
    assert sentence.startswith(f"{word} latents: their deviation from 0 is ")
    found = float(sentence.split(" is ")[1].split(",")[0])
    assert found == pytest.approx(scale, rel=0.1)


def test_a_few_values_that_hold_the_variance_are_refused() -> None:
    """Unit variance hides them: here all other values are the same."""
    config = replace(TINY, block_out_channels=(8,), encoder="downsample", latent_channels=3)
    images = torch.zeros(64, 3, 16, 16, dtype=torch.uint8)
    assert faults(measured(standardised(VAE(config), rectangles(64)), rectangles(64)), {}) == []
    images[torch.arange(64), :, torch.randint(16, (64,)), torch.randint(16, (64,))] = 255
    (sentence,) = faults(measured(standardised(VAE(config), images), images), {})
    assert sentence.startswith("unbounded latents: too large a fraction of the variance")
    assert all(f"channel {channel} (1)" in sentence for channel in range(3))


def test_latents_that_are_not_finite_are_refused(trained: VAE) -> None:
    broken = copied(trained)
    with torch.no_grad():
        broken.quant_conv.get_parameter("bias")[0] = torch.inf
    assert faults(measured(broken, rectangles(8)), {}) == ["some latents are not finite"]


def test_a_discriminator_that_has_won_is_refused_and_another_is_not(trained: VAE) -> None:
    latents = measured(trained, rectangles(64))
    won = {"disc_loss": 0.02, "disc_real": 3.0, "disc_fake": -2.5, "reconstruction": "l1"}
    (sentence,) = faults(latents, won)
    assert sentence.startswith("saturated discriminator: its loss ended at 0.02, ")
    assert "scores of 3 for images and -2.5 for" in sentence
    even = {"disc_loss": 0.98, "disc_real": 0.1, "disc_fake": -0.05}
    assert faults(latents, even) == faults(latents, {"reconstruction": "l1"}) == []


@pytest.mark.parametrize("loss", [0.01, float("nan")])
def test_a_loss_is_judged_without_the_scores_and_one_that_is_no_number_is_refused(
    trained: VAE, loss: float
) -> None:
    """The first was a KeyError, and the second passed."""
    (sentence,) = faults(measured(trained, rectangles(64)), {"disc_loss": loss})
    assert sentence.startswith(f"saturated discriminator: its loss ended at {loss}, where ")
    assert "scores" not in sentence


@pytest.mark.parametrize(("kind", "fraction"), [("posterior collapse", 0.0), ("unbounded", 0.5)])
def test_the_advice_for_latents_that_nothing_learns_is_not_to_train_otherwise(
    trained: VAE, kind: str, fraction: float
) -> None:
    found = measured(trained, rectangles(64))
    if kind == "unbounded":
        found = replace(found, far=torch.full((4,), fraction))
    else:
        found = replace(found, active=torch.full((4,), fraction))
    for learned in (True, False):
        (sentence,) = faults(found, {}, learned=learned)
        assert sentence.startswith(kind)
        assert ("kl_weight" in sentence) == learned
        assert ("it is the images" in sentence) != learned


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "set"
    build_shapes(folder, count=48, seed=0, size=32)
    return folder


def images(shapes: Path, size: int) -> CaptionedImages:
    return CaptionedImages(DataConfig(data=str(shapes), image_size=size, num_workers=0))


def test_the_embedded_vae_and_small_images_pass_on_shapes(shapes: Path, tmp_path: Path) -> None:
    folder = find_component("emoji", "vae")
    options: dict[str, Any] = {"batch_size": 16, "refuse": True}
    check_latents(VAE.from_pretrained(folder), images(shapes, 32), folder, **options)
    small = VAE(replace(TINY, encoder="downsample", latent_channels=3))
    pixels = torch.stack([images(shapes, 32).image(i) for i in range(0, 40, 2)])
    options["limits"] = ReconstructionLimits(min_psnr=0, max_colour_error=10)  # no decoder yet
    check_latents(standardised(small, pixels), images(shapes, 32), tmp_path, **options)


@dataclass
class Counted:
    """Images whose colour is their number, in order."""

    count: int
    config = DataConfig(data="none", image_size=8, num_workers=0)
    fingerprint = ""

    @property
    def num_samples(self) -> int:
        return self.count

    def chunks(
        self, size: int, wanted: Callable[[int], bool]
    ) -> Iterator[tuple[int, Iterable[Sample]]]:
        for number, start in enumerate(range(0, self.count, size)):
            if wanted(number):
                ids = range(start, min(start + size, self.count))
                yield number, (self.sample(i) for i in ids)

    def sample(self, i: int) -> Sample:
        return Sample(str(i), Image.new("RGB", (8, 8), (i // 256, i % 256, 0)), [], b"")


@pytest.mark.parametrize("count", [0, 2, 100, 256, 5000])
def test_what_is_measured_is_from_all_over_the_set(count: int) -> None:
    colours = [image[:2, 0, 0].tolist() for image in some_images(Counted(count))]
    seen = [256 * high + low for high, low in colours]
    assert len(seen) == min(count, 256)
    assert seen == sorted(set(seen))
    gaps = [b - a for a, b in pairwise([-1, *seen, count])]
    assert max(gaps) <= max(1, count // 12)


def test_of_a_stream_the_first_images_are_measured(shapes: Path) -> None:
    whole = images(shapes, 32)
    stream = StreamedImages(replace(whole.config, stream=True))
    found, expected = list(some_images(stream)), list(some_images(whole))
    assert len(found) == len(whole)
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_bad_and_small_images_are_not_measured(shapes: Path, tmp_path: Path) -> None:
    """They are left out of the cache, which counts and names them."""
    copy = tmp_path / "set"
    shutil.copytree(shapes, copy)
    files = sorted((copy / "train").rglob("*.png"))
    files[3].write_bytes(b"no image")
    Image.new("RGB", (9, 7)).save(files[5])
    assert len(list(some_images(images(copy, 32)))) == len(images(shapes, 32)) - 2


@pytest.mark.parametrize("name", ["cache_latents", "train_unet"])
def test_the_scripts_refuse_in_words_and_write_nothing(
    name: str, shapes: Path, tmp_path: Path, trained: VAE, capsys: pytest.CaptureFixture[str]
) -> None:
    collapsed(trained, 2).save_pretrained(tmp_path / "vae")
    (tmp_path / "vae" / "training.json").write_text(
        json.dumps({"disc_loss": 0.0, "disc_real": 4.0, "disc_fake": -4.0})
    )
    args = [f"--data={shapes}", "--image_size=32", f"--vae={tmp_path / 'vae'}", "--batch_size=8"]
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        run_here(name, *args, f"--output_dir={out}", "--num_workers=0")
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert "posterior collapse: " in message
    assert "in channel 2 (" in message
    assert "; saturated discriminator: " in message
    assert "--check_latents false goes on" in message
    assert not list(out.rglob("*.npy"))
    assert not list(out.rglob("header.json"))


def test_without_the_check_it_warns_and_goes_on_and_what_is_finished_is_not_judged(
    shapes: Path, tmp_path: Path, trained: VAE
) -> None:
    collapsed(trained, 2).save_pretrained(tmp_path / "vae")
    args = [f"--data={shapes}", "--image_size=32", f"--vae={tmp_path / 'vae'}", "--num_workers=0"]
    args.append(f"--output_dir={tmp_path / 'cache'}")
    with pytest.warns(UserWarning, match=r"not fit to train on: posterior collapse.*channel 2 \("):
        run_here("cache_latents", *args, "--check_latents=false")
    assert (tmp_path / "cache" / "header.json").is_file()
    run_here("cache_latents", *args)
