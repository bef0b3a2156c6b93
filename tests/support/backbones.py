"""The networks that LPIPS looks through, with random weights, as files such as torchvision's."""

from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from latentdiff.formats.weights import save_safetensors


def features(name: str) -> nn.Module:
    """The convolutions of torchvision's "alexnet" or "vgg16", on the meta device."""
    with torch.device("meta"):  # the other layers would take half a gigabyte
        return getattr(torchvision.models, name)().features


def random_weights(name: str, *, seed: int = 0) -> dict[str, Tensor]:
    """Weights of `features` that keep the size of what goes through them (He et al. 2015)."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {key: tensor.shape for key, tensor in features(name).state_dict().items()}
    return {
        key: torch.randn(shape, generator=draw)
        * ((2 / shape[1:].numel()) ** 0.5 if len(shape) > 1 else 0.1)
        for key, shape in shapes.items()
    }


def write_backbone(path: Path, name: str, *, seed: int = 0) -> Path:
    """Write them under the names that they have in torchvision's own files."""
    tensors = random_weights(name, seed=seed)
    save_safetensors({f"features.{key}": tensor for key, tensor in tensors.items()}, path)
    return path
