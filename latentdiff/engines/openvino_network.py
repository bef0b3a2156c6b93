"""A network's function computed by OpenVINO: converted, compiled for each shape, and kept on disk.

OpenVINO's own converter reads torch's trace of the function. What is converted is for any shapes;
what is compiled is for one, because a network of fixed shapes is faster.
"""

import functools
import hashlib
import json
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from latentdiff.engines import converted
from latentdiff.models.fingerprint import fingerprint
from latentdiff.models.lora import LoRAs

PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}
PACKAGES = ("openvino", "torch", "transformers")  # a release of which may convert otherwise
PROCESSOR = ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")
XML, BIN, BLOB = "model.xml", "model.bin", "model.blob"  # what is converted; and compiled
MODELS = Path(__file__).parents[1] / "models"
MOST_SHAPES = 8
"""The compiled forms of a network that are kept in memory, each with weights of its own."""
Form = None | tuple["Form", ...]
"""How tensors are nested: None is a tensor."""


@dataclass(frozen=True)
class Function:
    """What is converted: a function of tensors by the weights of a network."""

    name: str
    network: nn.Module
    compute: Callable[..., Tensor]
    config: dict[str, Any]
    loras: LoRAs | None = None
    """The LoRAs that may be on the network."""
    prepare: Callable[..., Sequence[Any]] | None = None
    """What torch makes of the arguments first."""

    def merged(self) -> AbstractContextManager[bool]:
        """Have the LoRAs in the network's weights, until left; yields whether there are any."""
        return nullcontext(False) if self.loras is None else self.loras.merged(self.network)

    def entry_name(self, form: Form, arrays: Sequence[np.ndarray]) -> str:
        """Of what the converted network follows from: weights, configuration, code and packages."""
        weights = fingerprint(self.network, json.loads(json.dumps(self.config, default=str)))
        versions = [metadata.version(package) for package in PACKAGES]
        return f"{self.name}-{_hash(weights, form, kind(arrays), versions, _code())}"

    def convert(self, form: Form, arrays: Sequence[np.ndarray]) -> Any:
        """A model of OpenVINO for inputs of this form, of any shapes."""
        import openvino

        tensors = tuple(torch.from_numpy(array) for array in arrays)
        traceable = Traceable(self.network, self.compute, form)
        with torch.no_grad(), warnings.catch_warnings():
            # torch.jit.trace is deprecated, and is what the converter reads; and what transformers
            # asks of Python values is the same in every run.
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(traceable, tensors, strict=False, check_trace=False)
            return openvino.convert_model(traced, example_input=tensors)


class Network:
    """A network's function, computed by OpenVINO.

    Arguments are tensors, or nested sequences of them, of any shapes: each new shape is compiled,
    because a network of fixed shapes is faster. The result is one tensor, in float32.
    """

    def __init__(self, function: Function, dtype: torch.dtype, folders: Sequence[Path]) -> None:
        self.function, self.dtype, self.folders = function, dtype, folders
        self._weights = [p for p in function.network.parameters() if not p.is_inference()]
        self._state = self._current_state()
        self._models: dict[Any, Any] = {}
        self._requests: dict[Any, Any] = {}
        self._lock = threading.Lock()

    def __call__(self, *inputs: Any) -> Tensor:
        """The function's result, (B, …)."""
        prepare = self.function.prepare
        tensors, form = flatten(inputs if prepare is None else prepare(*inputs))
        with self._lock:
            state = self._current_state()
            if state != self._state:
                self._state, self._models, self._requests = state, {}, {}
            key = (form, *((tensor.shape, tensor.dtype) for tensor in tensors))
            if key not in self._requests:
                if len(self._requests) == MOST_SHAPES:
                    del self._requests[next(iter(self._requests))]
                compiled = self._compile(form, [_array(tensor) for tensor in tensors])
                self._requests[key] = Request(compiled.create_infer_request(), len(tensors))
            return self._requests[key](tensors)

    def _current_state(self) -> tuple[int, ...]:
        """What changes with the weights: torch counts changes in place, and `LoRAs` its own."""
        loras = self.function.loras
        changes = 0 if loras is None else loras.revision
        return sum(weight._version for weight in self._weights), changes

    def _compile(self, form: Form, arrays: list[np.ndarray]) -> Any:
        """OpenVINO's network for these shapes, compiled or read as it was compiled before."""
        import openvino

        key = form, kind(arrays)
        model = self._models.get(key)
        if model is None or (isinstance(model, Path) and not model.exists()):  # or deleted since
            model = self._models[key] = self._find_or_convert(form, arrays)
        options = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[self.dtype],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            # Threads that are pinned to cores wait for those of other processes there.
            "ENABLE_CPU_PINNING": False,
        }
        if not isinstance(model, Path):
            return core().compile_model(_of_shapes(model.clone(), arrays), "CPU", options)
        # OpenVINO's own cache takes for bfloat16 what was compiled for float32 (2026.4.1), so that
        # its name here is of all that it follows from.
        processor = [str(core().get_property("CPU", name)) for name in PROCESSOR]
        shapes = [array.shape for array in arrays]
        name = f"{converted.COMPILED}-{_hash(model.name, shapes, options, processor)}"
        entry = converted.find([model.parent], name)
        if entry is not None:
            blob = openvino.tensor_from_file(str(entry / BLOB))
            return core().import_model(blob, "CPU", options)
        network = core().read_model(model / XML)
        compiled = core().compile_model(_of_shapes(network, arrays), "CPU", options)
        if (model / BIN).stat().st_size > converted.MOST_BYTES:
            return compiled  # it would not be kept: its file has the weights in it too
        blob = compiled.export_model().getvalue()
        if converted.make_room(model.parent, len(blob)):
            converted.store([model.parent], name, lambda entry: _write(entry / BLOB, blob))
        return compiled

    def _find_or_convert(self, form: Form, arrays: list[np.ndarray]) -> Any:
        """The network for any shapes: its entry on disk, or the model itself if it has none."""
        import openvino

        with self.function.merged() as changed:
            if changed:
                return self.function.convert(form, arrays)
            name = self.function.entry_name(form, arrays)
            entry = converted.find(self.folders, name)
            if entry is not None:
                return entry
            model = self.function.convert(form, arrays)
            entry = converted.store(
                self.folders,
                name,
                lambda entry: openvino.save_model(model, entry / XML, compress_to_fp16=False),
            )
        if entry is None:
            warnings.warn(
                f"{self.folders[-1]} cannot be written, so that the networks that OpenVINO "
                "computes are converted anew at each start",
                stacklevel=2,
            )
        return model if entry is None else entry


class Request:
    """A compiled network with its inputs, of which those that change are bound before a call.

    Of a sampling step these are x and what the time adds, not the text's keys and values. An input
    stays that is the same tensor, unchanged in place, as at the call before.
    """

    def __init__(self, request: Any, num_inputs: int) -> None:
        self._request = request
        self._bound: list[tuple[Tensor, int, np.ndarray] | None] = [None] * num_inputs

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """The network's result, which is the caller's own."""
        import openvino

        for i, tensor in enumerate(tensors):
            bound = self._bound[i]
            # Tensors of torch.inference_mode do not count their changes.
            version = -1 if tensor.is_inference() else tensor._version
            if bound is None or bound[0] is not tensor or bound[1] != version or version < 0:
                array = _array(tensor)  # which must be kept: OpenVINO reads it where it is
                self._request.set_input_tensor(i, openvino.Tensor(array, shared_memory=True))
                self._bound[i] = tensor, version, array
        self._request.infer()
        return torch.from_numpy(self._request.get_output_tensor().data.copy())


class Traceable(nn.Module):
    """A function of nested tensors as a module of flat ones, which a converter can trace."""

    def __init__(self, network: nn.Module, function: Callable[..., Tensor], form: Form) -> None:
        super().__init__()
        self.network = network  # whose weights the function uses
        self.function, self.form = function, form

    def forward(self, *tensors: Tensor) -> Tensor:
        """The function of the tensors as they are nested."""
        return self.function(*nested(iter(tensors), self.form))


def flatten(value: Any) -> tuple[list[Tensor], Form]:
    """The tensors of a tensor or of nested sequences, in order, and how they were nested."""
    if isinstance(value, Tensor):
        return [value], None
    parts = [flatten(one) for one in value]
    return [tensor for tensors, _ in parts for tensor in tensors], tuple(form for _, form in parts)


def nested(tensors: Any, form: Form) -> Any:
    """Tensors, from an iterator, nested as in a form, in tuples: the inverse of `flatten`."""
    return next(tensors) if form is None else tuple(nested(tensors, one) for one in form)


def kind(arrays: Sequence[np.ndarray]) -> tuple[Any, ...]:
    """What a trace is for: dimensions, numbers, and how many rows each array has to the first's.

    Code may ask whether two have as many, as where one row is meant for all.
    """
    rows = len(arrays[0])
    return tuple((array.ndim, array.dtype.name, len(array) / rows) for array in arrays)


def _of_shapes(model: Any, arrays: Sequence[np.ndarray]) -> Any:
    model.reshape({port: list(a.shape) for port, a in zip(model.inputs, arrays, strict=True)})
    return model


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _hash(*what: Any) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:32]


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous().numpy()


@functools.cache
def _code() -> str:
    """SHA-256 of the code of the networks: with another, they may be converted to others."""
    files = sorted(MODELS.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@functools.cache
def core() -> Any:
    """OpenVINO, without the part that reports its use to its makers over the network.

    OpenVINO takes a stand-in where that part is not installed. Raises ModuleNotFoundError where
    OpenVINO itself is not.
    """
    reporting = "openvino_telemetry"
    hidden = reporting not in sys.modules
    if hidden:
        sys.modules[reporting] = None  # pyright: ignore[reportArgumentType] - as Python has it
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'engine="openvino" needs the package openvino: pip install "latentdiff[openvino]"',
            name="openvino",
        ) from error
    finally:
        if hidden:
            del sys.modules[reporting]
    return openvino.Core()
