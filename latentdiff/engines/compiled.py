"""A network's forward pass, compiled by torch for drawing, in place of the plain one.

What is compiled is a copy with LoRAs in its weights, in channels_last memory and, on a CPU, frozen:
weights are constants, packed as the kernels read them. The network itself stays as it is, so that
it is saved, identified and changed as before; a change is seen at the next call.
"""

import copy
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.models.dit import DiT
from latentdiff.models.lora import LoRAs
from latentdiff.models.unet import UNet
from latentdiff.models.vae import VAE

MOST_SHAPES = 64
"""Of a network, each compiled by itself: torch's own limit is 8, and then it computes plainly."""


class Compiled:
    """Compiles the denoiser and the decoder of a pipeline from its construction on.

    Each size and number of images is compiled when it first occurs, which takes a minute or more;
    torch keeps the machine code on disk, which saves later processes half of that: graphs with
    packed weights, which it cannot store, are made anew. Outputs have no gradient. Raises
    ValueError where there is no C++ compiler for a CPU.
    """

    def __init__(self, unet: UNet | DiT, vae: VAE, loras: LoRAs) -> None:
        if next(unet.parameters()).device.type == "cpu":
            _check_compiler()
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "latentdiff" / "compiled"))
        self._networks = (
            Forward("denoiser", unet, loras),
            Forward("VAE's decoder", vae.decoder),
        )
        for forward in self._networks:
            forward.network.forward = forward

    @contextmanager
    def warming(self) -> Iterator[None]:
        """Compile without saying so, as it was asked for."""
        for forward in self._networks:
            forward.says = False
        try:
            yield
        finally:
            for forward in self._networks:
                forward.says = True


class Forward:
    """The forward pass of one network, compiled for each shape of its arguments.

    Arguments are tensors, or nested sequences of them, as the network's own.
    """

    def __init__(self, name: str, network: nn.Module, loras: LoRAs | None = None) -> None:
        self.name, self.network, self.loras = name, network, loras
        self.says = True
        """Whether a warning says that a shape is compiled."""
        self._lock = threading.Lock()
        self._state: tuple[Any, ...] | None = None
        self._compiled: Callable[..., Tensor] = network.forward
        self._shapes = set[Any]()

    @torch.no_grad()
    def __call__(self, x: Tensor, *rest: Any) -> Tensor:
        """The network's result."""
        x, rest = _channels_last(x), tuple(map(_plain, rest))
        with self._lock:
            state, shapes = self._current_state(), _shapes((x, *rest))
            changed = state != self._state
            if changed:
                self._state, self._shapes = state, set()
            if shapes not in self._shapes and self.says:
                size = " x ".join(map(str, x.shape))
                warnings.warn(
                    f"compiling the {self.name} for latents of {size}: a minute or more, or "
                    "half of that where it was compiled before",
                    stacklevel=2,
                )
            self._shapes.add(shapes)
            with _compiling(frozen=x.device.type == "cpu"):
                if changed:
                    self._compiled = self._compile()
                return self._compiled(x, *rest)

    def _current_state(self) -> tuple[Any, ...]:
        """What changes with the weights: torch counts changes in place, and `LoRAs` its own."""
        weights = [weight for weight in self.network.parameters() if not weight.is_inference()]
        changes = 0 if self.loras is None else self.loras.revision
        versions = sum(weight._version for weight in weights)
        return versions, changes, weights[0].dtype, weights[0].device

    def _compile(self) -> Callable[..., Tensor]:
        """The forward pass of a copy of the network as it is now, to be compiled when called."""
        with nullcontext() if self.loras is None else self.loras.merged(self.network):
            copied = copy.deepcopy(self.network, {id(self): self})
        del copied.forward  # which is this object
        copied.requires_grad_(False)
        copied.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return torch.compile(copied.forward, dynamic=False)


@contextmanager
def _compiling(*, frozen: bool) -> Iterator[None]:
    """The settings of torch's compiler, and no warnings that are for its developers.

    `freezing` must hold while torch traces the network too: an option of torch.compile alone leaves
    the weights arguments, which then are not packed.
    """
    with warnings.catch_warnings(action="ignore"):
        import torch._dynamo.config as tracing  # importing it takes seconds
        import torch._inductor.config as making

        with tracing.patch(recompile_limit=MOST_SHAPES), making.patch(freezing=frozen):
            yield


def _check_compiler() -> None:
    with warnings.catch_warnings(action="ignore"):  # of torch's own code
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            "compile: torch makes C++ for a CPU and found no compiler; install g++, such as by "
            "apt install g++, or name one in the environment variable CXX"
        ) from error


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _plain(value: Any) -> Any:
    """Nested sequences as tuples, which a compiler takes for what they hold alone."""
    return value if isinstance(value, Tensor) else tuple(map(_plain, value))


def _shapes(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, Tensor) else tuple(map(_shapes, value))
