"""SHA-256 hashes of networks, by which caches and images name those that they were made with."""

import hashlib
import json
from typing import Any

from torch import Tensor, nn

from latentdiff.models.vae import VAE

DECODING = {"out_channels", "up_block_types", "use_post_quant_conv", "sample_size", "force_upcast"}
"""Keys of a VAE's configuration that do not affect its latents."""


def fingerprint(network: nn.Module, config: dict[str, Any]) -> str:
    """SHA-256 of a network's configuration and of its weights, converted to float32."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def encoder_fingerprint(vae: VAE) -> str:
    """The fingerprint of a VAE's encoder: latents stay valid when only the decoder changes."""
    config = {key: value for key, value in vae.config.to_dict().items() if key not in DECODING}
    encoder = nn.ModuleDict({"encoder": vae.encoder, "quant_conv": vae.quant_conv})
    return fingerprint(encoder, config)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().float().cpu().contiguous().numpy().tobytes()
