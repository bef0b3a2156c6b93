"""LoRAs on a UNet and its text tower: several at once, of any kind, each with its scale.

formats/lora.py reads the files, adapters.py puts peft's layers on, dora.py makes those of DoRA.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from latentdiff.diffusion import Diffusion
from latentdiff.formats.header import short_repr
from latentdiff.formats.lora import read_lora
from latentdiff.formats.lora_layers import AdapterLayer, LoRALayer, kind, shape_of
from latentdiff.formats.weights import check_numbers
from latentdiff.models import adapters
from latentdiff.models.dit import DiT
from latentdiff.models.dora import decomposed
from latentdiff.models.unet import UNet


class LoRAs:
    """The LoRAs that are loaded into a UNet and a text tower, by name.

    They change what the two networks compute from `load` on; with no LoRA, or with all scales at
    0, the networks compute bit for bit what they did before. peft and diffusers must be installed
    (`pip install "latentdiff[lora]"`); without them `load` raises ModuleNotFoundError.
    """

    def __init__(self, unet: UNet | DiT, text_encoder: nn.Module, diffusion: Diffusion) -> None:
        self.unet = unet
        self.text_encoder = text_encoder
        self._diffusion = diffusion
        self._scales: dict[str, float] = {}
        self._students: dict[str, Diffusion] = {}
        self.revision = 0
        """How often they were changed: what was computed of another is of other weights."""

    @property
    def scales(self) -> dict[str, float]:
        """Scale of each loaded LoRA, in the order of loading."""
        return dict(self._scales)

    @property
    def diffusion(self) -> Diffusion:
        """The model's own, or with a student's LoRA that is on, the student's."""
        on = (student for name, student in self._students.items() if self._scales[name] != 0)
        return next(on, self._diffusion)

    def load(self, path: Path | str, *, name: str | None = None, scale: float = 1.0) -> str:
        """Load a LoRA file into the networks, in addition to others; returns its name.

        name: for `set_scales`; by default the file's name without extension.
        scale: multiplies the change; 1 is as trained, 0 is off, any finite number is allowed.
        Raises ValueError if the file is not a LoRA, or one for other networks, if the name is
        taken, and for a student's LoRA on a student; nothing has changed then.
        """
        import peft  # noqa: F401 - before anything is changed

        path = Path(path)
        if not isinstance(self.unet, UNet):
            raise ValueError(f"{path} cannot be loaded: LoRAs are for a UNet, and this is a DiT")
        name = path.stem if name is None else name
        if not name or name in self._scales:
            raise ValueError(f"name={name!r} must be new; loaded are {list(self._scales)}")
        _check_scale(scale)
        file = read_lora(path, layers_per_block=self.unet.config.layers_per_block)
        check_layers(path, "UNet", self.unet, file.unet)
        check_layers(path, "text encoder", self.text_encoder, file.text_encoder)
        student, steps = None, file.distilled_steps
        if steps is not None:
            if self._students or self._diffusion.distilled_steps is not None:
                raise ValueError(
                    f"{path} makes a model a student of {steps} steps, and this is one already: "
                    "load it into the model that it was distilled from"
                )
            student = self._diffusion.student(steps)
        parts = (
            (self.unet, *_split(path, self.unet, file.unet)),
            (self.text_encoder, *_split(path, self.text_encoder, file.text_encoder)),
        )
        for network, layers, gains in parts:
            adapters.add(network, layers, gains, _adapter(len(self._scales)))
        self._scales[name] = float(scale)
        if student is not None:
            self._students[name] = student
        self._apply()
        return name

    def set_scales(self, scales: Mapping[str, float]) -> None:
        """Give loaded LoRAs other scales; those that are not named get 0.

        Raises ValueError for a name that is not loaded, or a scale that is not finite.
        """
        for name, scale in scales.items():
            if name not in self._scales:
                raise ValueError(f"no LoRA {name!r} is loaded; loaded are {list(self._scales)}")
            _check_scale(scale)
        self._scales = {name: float(scales.get(name, 0)) for name in self._scales}
        self._apply()

    def unload(self) -> None:
        """Remove all LoRAs: the networks are as before, bit for bit.

        Raises ValueError if none is loaded, as after `fuse`, which cannot be undone.
        """
        self._check_any("unload")
        for network in (self.unet, self.text_encoder):
            adapters.take_off(network)
        self._scales, self._students = {}, {}
        self.revision += 1

    @torch.no_grad()
    def fuse(self) -> None:
        """Add all LoRAs, with their scales, to the weights: the networks are as fast as without.

        The original weights are gone then; only loading the model anew brings them back.
        Raises ValueError if none is loaded, or if a weight would not be finite; nothing has
        changed then.
        """
        self._check_any("fuse")
        active = self._active()
        for network in (self.unet, self.text_encoder):
            for layer_name, layer in adapters.wrapped(network).items():
                weight = adapters.fused_weight(layer, active)
                if not torch.isfinite(weight).all():
                    raise ValueError(
                        f"the LoRAs {list(self._scales)} cannot be fused: the weight of "
                        f"{layer_name} would be too large for {weight.dtype}"
                    )
        for network in (self.unet, self.text_encoder):
            adapters.fuse(network, active)
        self._diffusion = self.diffusion  # which the weights are of from now on
        self._scales, self._students = {}, {}
        self.revision += 1

    @contextmanager
    def merged(self, network: nn.Module) -> Iterator[bool]:
        """Have all LoRAs in the weights of a network that has them, and no wrappers, until left.

        Yields whether they change it.
        """
        with adapters.merged(network, self._active()) as changed:
            yield changed

    def _active(self) -> list[str]:
        """peft's names of the LoRAs whose scale is not 0."""
        return [_adapter(i) for i, scale in enumerate(self._scales.values()) if scale != 0]

    def _apply(self) -> None:
        scales = {_adapter(i): scale for i, scale in enumerate(self._scales.values())}
        for network in (self.unet, self.text_encoder):
            adapters.set_scales(network, scales)
        self.revision += 1

    def _check_any(self, verb: str) -> None:
        if not self._scales:
            raise ValueError(
                f"there is no LoRA to {verb}: none was loaded, or they were fused into the "
                "weights already, which only loading the model anew undoes"
            )


def _adapter(i: int) -> str:
    """peft's name of the i-th LoRA: a module's name, which cannot be any text."""
    return f"adapter{i}"


def _check_scale(scale: float) -> None:
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"scale={scale!r} must be a finite number")


def check_layers(
    path: Path, title: str, network: nn.Module, layers: Mapping[str, AdapterLayer]
) -> None:
    """Raise ValueError, naming the first, unless each layer is in the network with its widths.

    Its numbers, too, must be within the range of the network's precision.
    """
    weights = adapters.weights(network)
    absent = [name for name in layers if name not in weights]
    if absent:
        raise ValueError(
            f"{path}: {len(absent)} of its {len(layers)} layers for the {title}, first "
            f"{short_repr(absent[0])}, are not in this model: the LoRA is for another architecture"
        )
    wrong = [name for name, layer in layers.items() if not _fits(layer, weights[name])]
    if wrong:
        raise ValueError(
            f"{path}: {len(wrong)} of its {len(layers)} layers for the {title}, first {wrong[0]}, "
            f"have other widths than this model: {_shapes(layers[wrong[0]])} for a weight of "
            f"{tuple(weights[wrong[0]].shape)}"
        )
    for name, layer in layers.items():
        for tensor in _tensors(layer).values():
            _check_numbers(path, name, tensor, weights[name].dtype)


def _split(
    path: Path, network: nn.Module, layers: Mapping[str, AdapterLayer]
) -> tuple[dict[str, AdapterLayer], dict[str, Tensor]]:
    """The changes of a network's layers, none with a magnitude, and the gains that come of those.

    Raises ValueError for numbers beyond the range of the network's precision.
    """
    weights, without, gains = adapters.weights(network), dict(layers), {}
    for name, layer in layers.items():
        if layer.magnitude is not None:
            without[name], gains[name] = decomposed(layer, weights[name].detach())
            for tensor in (*_tensors(without[name]).values(), gains[name]):
                _check_numbers(path, name, tensor, weights[name].dtype)
    return without, gains


def _check_numbers(path: Path, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    try:
        check_numbers(name, tensor, dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _fits(layer: AdapterLayer, weight: Tensor) -> bool:
    change, (out, channels, *kernel) = shape_of(layer), weight.shape
    if layer.magnitude is not None:
        ones = [1] * len(kernel)
        if list(layer.magnitude.shape) not in ([out, 1, *ones], [1, channels, *ones]):
            return False
    if isinstance(layer, LoRALayer) or len(change) == 4:
        return change == tuple(weight.shape)
    return change == (out, weight[0].numel())


def _tensors(layer: AdapterLayer) -> dict[str, Tensor]:
    tensors = (
        {"down": layer.down, "up": layer.up} if isinstance(layer, LoRALayer) else layer.tensors
    )
    return dict(tensors) | ({} if layer.magnitude is None else {"magnitude": layer.magnitude})


def _shapes(layer: AdapterLayer) -> str:
    shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in _tensors(layer).items())
    return f"{kind(layer)} of {shapes}"
