"""What parity tests share: weights, gradients, a measure of difference, the libraries' log."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}


@torch.no_grad()
def fill(network: nn.Module) -> None:
    """Random numbers on top of every parameter: norms at 1 and biases at 0 hide what is swapped."""
    for parameter in network.parameters():
        parameter += 0.2 * torch.randn_like(parameter)


def gradients(output: Tensor, network: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Of a random linear function of `output`, by every input and every parameter."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    named = {f"input {i}": tensor for i, tensor in enumerate(inputs)}
    named |= dict(network.named_parameters())
    found = torch.autograd.grad(
        (output * weights.to(output.dtype)).sum(), list(named.values()), materialize_grads=True
    )
    return dict(zip(named, found, strict=True))


def difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest difference, each tensor's relative to its own largest number.

    Tensors below a thousandth of the largest are measured by that: some gradients are zero but for
    rounding, such as those of a bias that the norm after it takes away.
    """
    assert ours.keys() == theirs.keys()
    ours, theirs = ({n: t.detach() for n, t in ts.items()} for ts in (ours, theirs))
    floor = 1e-3 * max(float(tensor.abs().max()) for tensor in theirs.values())
    return max(
        float((ours[name] - tensor).abs().max()) / max(float(tensor.abs().max()), floor)
        for name, tensor in theirs.items()
    )


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def same_weights(ours: nn.Module, theirs: nn.Module) -> bool:
    a, b = ours.state_dict(), theirs.state_dict()
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


@contextmanager
def no_warning_logged() -> Iterator[None]:
    """Fail if diffusers or transformers log a warning; they don't pass them on to the root."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    messages = [record.getMessage() for record in records]
    assert not messages, messages
