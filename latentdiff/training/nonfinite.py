"""Find the first module of a network whose output, or input, is not finite."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def first_nonfinite_module(networks: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Hook the forward passes; the yielded list receives a phrase for the first such module.

    The host reads each tensor that passes through, which is slow: this is for a step that is known
    to be bad and is repeated.
    """
    phrases: list[str] = []
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def before(_: nn.Module, inputs: Any) -> None:
            if not phrases and not _finite(inputs):
                phrases.append(f"the input of {name}")

        def after(_: nn.Module, inputs: Any, output: Any) -> None:
            if not phrases and not _finite(output):
                phrases.append(f"the output of {name} ({type(module).__name__})")

        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after))

    for name, network in networks.items():
        for path, module in network.named_modules():
            watch(f"{name}.{path}" if path else name, module)
    try:
        with torch.compiler.set_stance("force_eager"):  # hooks would cause a recompilation
            yield phrases
    finally:
        for handle in handles:
            handle.remove()


def _finite(value: Any) -> bool:
    """Whether all numbers in tensors, or in tuples, lists and mappings of them, are finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, Mapping):
        return all(_finite(item) for item in value.values())
    if isinstance(value, tuple | list):
        return all(_finite(item) for item in value)
    return True
