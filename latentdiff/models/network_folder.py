"""The folder of a UNet, VAE or DiT: `config.json` and safetensors, named as diffusers names them.

`UNet.from_pretrained` and `UNet.save_pretrained` are these two functions, as are those of VAE and
DiT. Such a class has `config_class`, the dataclass of its configuration, and `config`.
"""

import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from latentdiff.formats.diffusers import DIFFUSERS_VERSION, STEMS
from latentdiff.formats.sharded_weights import load_weights
from latentdiff.formats.weights import load_json, save_json, save_safetensors, to_write

N = TypeVar("N", bound=nn.Module)
STEM = STEMS["unet"]  # of the names of weight files
# The attention of a VAE's mid block before diffusers 0.17: the files of SD 1.5 and 2.1 have it.
_FORMER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_FORMER_NAME = re.compile(
    r"(?<=\.mid_block\.attentions\.0\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)"
)


def load_network(
    cls: type[N],
    folder: Path | str,
    *,
    variant: str | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> N:
    """Read a network from its folder, in eval mode.

    variant: which weights, such as "fp16", instead of the plain ones. dtype: what weights of any
    precision become; None leaves them as they are in the file. Raises ValueError when a file is
    missing or the weights do not fit the configuration.
    """
    path = Path(folder) / "config.json"
    values = load_json(path)
    network_class: Any = cls  # nn.Module knows no config_class
    try:
        config = network_class.config_class.from_dict(values)
        with torch.device("meta"):
            network = network_class(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    tensors = load_weights(
        path.parent,
        STEM,
        variant=variant,
        expected=network.state_dict(),
        rename=_current_name,
        dtype=dtype,
    )
    network.load_state_dict(tensors, assign=True)
    return network.eval()


def save_network(
    network: nn.Module, folder: Path | str, *, dtype: torch.dtype | None = None
) -> None:
    """Write `config.json` and the weights, converted to `dtype` if one is given.

    Raises ValueError, before anything is written, for weights that are not finite or too large for
    `dtype`.
    """
    path = Path(folder) / f"{STEM}.safetensors"
    tensors = to_write(network.state_dict(), path, dtype)
    config: Any = network.config
    values = {**config.to_dict(), "_diffusers_version": DIFFUSERS_VERSION}
    save_json(values, path.with_name("config.json"))
    save_safetensors(tensors, path)


def _current_name(name: str) -> str:
    """The name since diffusers 0.17 of a tensor of any release's file."""
    return _FORMER_NAME.sub(lambda match: _FORMER_NAMES[match[1]], name)
