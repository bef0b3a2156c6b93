"""What weights are, in 64 letters: caches and pictures name the networks they were made with."""

import hashlib
import json
from typing import Any

from torch import Tensor, nn


def fingerprint(network: nn.Module, config: dict[str, Any]) -> str:
    """SHA-256 of a network's configuration and weights, as they are in float32."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().float().cpu().contiguous().numpy().tobytes()
