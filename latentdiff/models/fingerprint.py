"""What weights are, in 64 letters: caches and images name the networks they were made with."""

import hashlib
import json
from typing import Any

from torch import Tensor, nn

from latentdiff.models.vae import VAE

DECODING = {"out_channels", "up_block_types", "use_post_quant_conv", "sample_size", "force_upcast"}
"""Keys of a VAE's configuration that its latents do not depend on."""


def fingerprint(network: nn.Module, config: dict[str, Any]) -> str:
    """SHA-256 of a network's configuration and weights, as they are in float32."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def encoder_fingerprint(vae: VAE) -> str:
    """The same of what makes a VAE's latents alone: they stay valid when its decoder changes."""
    config = {key: value for key, value in vae.config.to_dict().items() if key not in DECODING}
    parts = nn.ModuleDict({"encoder": vae.encoder, "quant_conv": vae.quant_conv})
    return fingerprint(parts, config)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().float().cpu().contiguous().numpy().tobytes()
