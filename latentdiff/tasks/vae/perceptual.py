"""LPIPS as a loss: the distance of two images in the features of an ImageNet classifier.

Zhang et al. 2018 (arXiv:1801.03924), eq. 1, as torchmetrics computes it. Nothing is downloaded:
the backbone's weights come from a file, those of LPIPS' own linear layers are in torchmetrics.
"""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from latentdiff.formats.header import read_header
from latentdiff.formats.weights import load_safetensors

Backbone = Literal["vgg", "alex"]
FIRST = "features.0.weight"
BACKBONES: dict[tuple[int, ...], Backbone] = {(64, 3, 3, 3): "vgg", (64, 3, 11, 11): "alex"}
"""By the shape of the first weight: torchvision's VGG16 and AlexNet."""
SMALLEST: dict[Backbone, int] = {"vgg": 16, "alex": 31}
"""Side of the smallest images, in pixels, whose last feature map still has one position."""


class Perceptual(nn.Module):
    """Images and what they should look like, (B, 3, H, W) in [-1, 1] -> LPIPS distances (B,).

    Frozen and in eval mode; gradients go through it to the images.
    """

    def __init__(self, path: Path, *, image_size: int) -> None:
        """`path` is a safetensors file of torchvision's VGG16 or AlexNet; `features` are enough.

        Raises ValueError if it is missing or holds anything else, and for an image_size, in pixels,
        that is too small for the network.
        """
        super().__init__()
        try:
            first = read_header(path).shapes.get(FIRST)
            if first not in BACKBONES:
                raise ValueError(
                    f"{path}: {FIRST} is {first or 'missing'}; it must be that of torchvision's "
                    "VGG16, (64, 3, 3, 3), or AlexNet, (64, 3, 11, 11)"
                )
            backbone = BACKBONES[first]
            if image_size < SMALLEST[backbone]:
                raise ValueError(
                    f"image_size={image_size} must be at least {SMALLEST[backbone]} for {path}"
                )
            self.smallest = SMALLEST[backbone]
            self.network = _load(path, backbone)
        except ValueError as error:
            raise ValueError(f"perceptual_weights: {error}") from error

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """(B, 3, H, W), (B, 3, H, W) -> (B,)."""
        # In float32: the difference of nearly equal features would vanish in bfloat16.
        with torch.autocast(images.device.type, enabled=False):
            return self.network(images.float(), targets.float()).flatten()


def _load(path: Path, backbone: Backbone) -> nn.Module:
    """torchmetrics' network, with the file's weights in its backbone."""
    # Only here: importing it takes seconds, and most runs do not need it.
    from torchmetrics.functional.image.lpips import _LPIPS

    # Its linear layers are read from torchmetrics' own folder, by torch's restricted unpickler.
    network = _LPIPS(net=backbone, pnet_rand=True)
    # torchvision's features.7.weight is slice2.7.weight there.
    names = {f"features.{name.partition('.')[2]}": name for name in network.net.state_dict()}
    tensors = load_safetensors(
        path,
        expected={name: network.net.state_dict()[key] for name, key in names.items()},
        optional=lambda name: name.startswith("classifier."),
        dtype=torch.float32,
    )
    network.net.load_state_dict({names[name]: tensor for name, tensor in tensors.items()})
    return network
