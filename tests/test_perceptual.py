"""LPIPS, against torchmetrics' own, and what its files must hold."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from support.backbones import features, random_weights, write_backbone
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from latentdiff.formats.weights import save_safetensors
from latentdiff.tasks.vae.perceptual import SMALLEST, Perceptual


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("weights") / "alexnet.safetensors", "alexnet")


@pytest.mark.full_size
@pytest.mark.parametrize(("name", "net_type"), [("alexnet", "alex"), ("vgg16", "vgg")])
def test_distances_are_torchmetrics_own(
    name: str, net_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its public class, which is given the same weights where it would download others."""
    backbone = features(name)
    backbone.load_state_dict(random_weights(name), assign=True)
    monkeypatch.setattr(torchvision.models, name, lambda **_: SimpleNamespace(features=backbone))
    theirs = LearnedPerceptualImagePatchSimilarity(net_type=net_type)  # pyright: ignore[reportArgumentType]
    monkeypatch.undo()
    ours = Perceptual(write_backbone(tmp_path / "weights", name), image_size=40)
    one, other = (2 * torch.rand(3, 3, 40, 40) - 1 for _ in range(2))
    found = ours(one, other)
    assert found.shape == (3,)
    assert found.min() > 0
    assert found.mean().equal(theirs(one, other))
    assert ours(one, one).equal(torch.zeros(3))


def test_the_network_is_frozen_and_its_gradient_reaches_the_image(alexnet: Path) -> None:
    network = Perceptual(alexnet, image_size=32)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    image, target = (2 * torch.rand(2, 3, 32, 32) - 1 for _ in range(2))
    image.requires_grad_(True)
    distance = network(image, target)
    assert distance.equal(network(image, target))  # LPIPS has dropout, of its own training
    with torch.autocast("cpu", torch.bfloat16):
        assert distance.equal(network(image, target))
    distance.sum().backward()
    assert image.grad is not None
    assert image.grad.abs().amax(dim=(1, 2, 3)).min() > 0


@pytest.mark.parametrize("smallest", SMALLEST.values())
def test_the_smallest_images_leave_one_place(smallest: int) -> None:
    name = {"vgg": "vgg16", "alex": "alexnet"}[
        next(k for k, v in SMALLEST.items() if v == smallest)
    ]
    last = list(features(name))[:-1]  # LPIPS looks before the last pooling

    def side(size: int) -> int:
        x = torch.empty(1, 3, size, size, device="meta")
        for layer in last:
            x = layer(x)
        return x.shape[-1]

    assert side(smallest) == 1
    with pytest.raises(RuntimeError, match="too small"):
        side(smallest - 1)


def test_a_file_that_cannot_be_the_backbone_is_refused_in_a_sentence(
    alexnet: Path, tmp_path: Path
) -> None:
    def refused(path: Path, message: str, size: int = 32) -> None:
        with pytest.raises(ValueError, match=message):
            Perceptual(path, image_size=size)

    refused(tmp_path / "none", "perceptual_weights: .*none: no such file")
    refused(alexnet, "image_size=30 must be at least 31", 30)
    pickled = tmp_path / "vgg16.pth"
    torch.save({"features.0.weight": torch.zeros(1)}, pickled)
    refused(pickled, "perceptual_weights: .* pickled checkpoint, .*latentdiff convert")
    other = tmp_path / "other"
    save_safetensors({"conv1.weight": torch.zeros(64, 3, 7, 7)}, other)
    refused(other, "features.0.weight is missing; it must be that of torchvision's VGG16")
    save_safetensors({"features.0.weight": torch.zeros(64, 3, 11, 11)}, other)
    refused(other, "perceptual_weights: .*does not fit")
