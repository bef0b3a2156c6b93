"""A network and its folder: configuration dataclass <-> `config.json`, weights <-> safetensors."""

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from latentdiff.formats.weights import load_json, load_safetensors, save_json, save_safetensors

T = TypeVar("T")
WEIGHTS = "diffusion_pytorch_model.safetensors"
# The release of diffusers whose configuration keys we write; it asks for the key when it reads.
DIFFUSERS_VERSION = "0.42.1"


def config_from_dict(
    cls: type[T], values: dict[str, Any], *, fixed: dict[str, Any], absent: dict[str, Any]
) -> T:
    """Build the dataclass `cls` from a diffusers configuration.

    `fixed` holds the keys that have one supported value, `absent` what diffusers takes for keys
    that are missing, where that differs from our default. Raises ValueError naming key and value
    for a fixed key with another value and for keys that nobody knows.
    """
    names = {field.name for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    known = {name: value for name, value in absent.items() if name not in values}
    for key, value in values.items():
        if key in names:
            known[key] = value
        elif key in fixed:
            if _plain(value) != _plain(fixed[key]):
                raise ValueError(f"{key}={value!r} is not supported, only {fixed[key]!r}")
        elif not key.startswith("_"):
            raise ValueError(f"unknown configuration key {key}={value!r}")
    return cls(**known)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def load_network(cls: type[Any], config_cls: type[Any], folder: Path) -> Any:
    """Build a network from its folder, in float32 and eval mode.

    Raises ValueError when a file is missing or the weights are not those of the configuration.
    """
    config = config_cls.from_dict(load_json(folder / "config.json"))
    tensors = load_safetensors(folder / WEIGHTS)
    with torch.device("meta"):
        network = cls(config)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        wrong = sorted(
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        )
        first = wrong[0]
        raise ValueError(
            f"{folder / WEIGHTS} does not fit its config.json in {len(wrong)} tensors, first "
            f"{first}: {found.get(first, 'missing')} in the file, "
            f"{expected.get(first, 'none')} by the configuration"
        )
    floats = {name: tensor.float() for name, tensor in tensors.items()}
    network.load_state_dict(floats, assign=True)
    return network.eval()


def save_network(
    network: nn.Module, config: dict[str, Any], folder: Path, *, dtype: torch.dtype | None
) -> None:
    """Write `config.json` and the weights, converted to `dtype` if one is given."""
    folder.mkdir(parents=True, exist_ok=True)
    save_json({**config, "_diffusers_version": DIFFUSERS_VERSION}, folder / "config.json")
    tensors = {
        name: tensor.detach().to(device="cpu", dtype=dtype).contiguous()
        for name, tensor in network.state_dict().items()
    }
    save_safetensors(tensors, folder / WEIGHTS, metadata={"format": "pt"})
