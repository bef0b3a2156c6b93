"""A network and its folder: configuration dataclass <-> `config.json`, weights <-> safetensors."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from latentdiff.formats.diffusers import DIFFUSERS_VERSION
from latentdiff.formats.weights import load_json, load_safetensors, save_json, save_safetensors

T = TypeVar("T")
WEIGHTS = "diffusion_pytorch_model.safetensors"


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


def check_counts(config: Any, *names: str) -> None:
    """Raise ValueError, naming key and value, unless these keys are whole numbers from 1 up.

    diffusers takes a list, one number a block, for some of them; SD 1.x and 2.x have none.
    """
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number, 1 or more")


def check_fit(path: Path, *, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming the first tensor, unless all names and shapes are as expected."""
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    given = {name: tuple(tensor.shape) for name, tensor in found.items()}
    wrong = sorted(
        name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name)
    )
    if wrong:
        raise ValueError(
            f"{path} does not fit its config.json in {len(wrong)} tensors, first {wrong[0]}: "
            f"{given.get(wrong[0], 'missing')} in the file, "
            f"{wanted.get(wrong[0], 'none')} by the configuration"
        )


def load_network(cls: type[Any], config_cls: type[Any], folder: Path) -> Any:
    """Build a network from its folder, in float32 and eval mode.

    Raises ValueError when a file is missing or the weights are not those of the configuration.
    """
    config = config_cls.from_dict(load_json(folder / "config.json"))
    tensors = load_safetensors(folder / WEIGHTS)
    with torch.device("meta"):
        network = cls(config)
    check_fit(folder / WEIGHTS, expected=network.state_dict(), found=tensors)
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
