"""Power-function averages of any length, made of a run's snapshots after training.

Karras et al. 2024 (EDM2), section 3 and appendix C. Averages are linear in their profiles (see
`ema.py`), so one that was never tracked is nearly a sum of snapshots of two that were: the sum
whose profile is nearest to its own.
"""

import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.formats.header import Header, name_repr, parse_json, read_header, short_repr
from latentdiff.formats.weights import (
    check_tensors,
    load_files,
    load_safetensors,
    replacing,
    save_safetensors,
)
from latentdiff.training.ema import power_exponent

DTYPE = torch.float16
"""Of snapshots, as in EDM2: docs/ema.md has what rounding costs beside what synthesis does."""
GOOD_ERROR = 0.05
"""A synthesis whose profile is further away than this warns."""
NEGLIGIBLE = 1e-6
"""Snapshots whose weight is less are not read: float16 alone rounds by more."""
FILES = {
    "unet": ("unet/diffusion_pytorch_model.safetensors",),
    "dit": ("transformer/diffusion_pytorch_model.safetensors",),
    "clip": ("text_encoder/model.safetensors", "clip/model.safetensors"),
}
"""By learner, where a run's model has its weights. A VAE is saved with the statistics of its
latents folded in, which would have to be measured again on the data for other weights."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Snapshot:
    """An average of a network's weights as it was after `step` updates."""

    path: Path
    step: int
    length: float
    header: Header


def save_snapshot(folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write a file of each average into `folder`; `tensors` has them by length, such as "0.05".

    The bytes depend on the arguments alone, and a file takes an older one's place as a whole: a
    resumed run that writes a snapshot again leaves what was there. Raises ValueError for weights
    that are not finite or too large for float16, OSError when a file cannot be written.
    """
    for left in folder.glob(".*.tmp"):  # of a run that was killed as it wrote
        left.unlink()
    for length, weights in tensors.items():
        rounded = {
            name: weight.detach().to("cpu", DTYPE).contiguous() for name, weight in weights.items()
        }
        for name, weight in rounded.items():
            if not weight.isfinite().all():
                raise ValueError(
                    f"step {step}: {name_repr(name)} of the average of length {length} holds "
                    f"numbers that are not finite or above {torch.finfo(DTYPE).max:.0f}, which a "
                    "snapshot cannot keep"
                )
        # A single entry: safetensors writes several in an order that changes from call to call.
        metadata = {"average": json.dumps({"length": float(length), "step": step})}
        path = folder / f"step-{step:07d}-{length}.safetensors"
        try:
            with replacing(path) as temporary:
                save_file(rounded, temporary, metadata=metadata)
        except SafetensorError as error:  # a full disk, seen from inside the library
            raise OSError(f"{path} cannot be written: {error}") from error


def find_snapshots(folder: Path) -> list[Snapshot]:
    """The snapshots in a folder, by step and length; ValueError for a file that is none."""
    found = [_read(path) for path in folder.glob("step-*.safetensors")]
    return sorted(found, key=lambda snapshot: (snapshot.step, snapshot.length))


@dataclass(frozen=True)
class Synthesis:
    """An average as a weighted sum of snapshots."""

    snapshots: list[Snapshot]
    weights: list[float]
    """One a snapshot, of sum 1; some are negative."""
    error: float
    """Distance of the sum's profile from the one asked for, relative to that one's size (L2)."""

    def tensors(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """The average's tensors of these names, in float32, one after another.

        No more is in memory than a tensor and that of one snapshot. Raises ValueError where a file
        lacks the tensor, has it in another shape or holds numbers that are not finite.
        """
        for name in names:
            total, shape = torch.zeros(()), self.snapshots[0].header.shapes.get(name, ())
            for snapshot, weight in zip(self.snapshots, self.weights, strict=True):
                part = load_files(
                    {snapshot.path: snapshot.header},
                    snapshot.path,
                    expected={name: torch.empty(shape, device="meta")},
                    optional=lambda _: True,
                    rename=None,
                    dtype=torch.float32,
                )
                total = total + weight * part[name]
            yield name, total


def synthesize(
    snapshots: Sequence[Snapshot], *, length: float, step: int | None = None
) -> Synthesis:
    """The sum of snapshots that is nearest to the average of `length` after `step` updates.

    `step` is by default the last that has snapshots. EDM2, algorithm 3: least squares between the
    profiles; that the weights' sum is 1 is a condition here, not mended afterwards.
    Warns when the profile found is far from the one asked for. Raises ValueError when there are no
    snapshots, for a length that no average has, and for a step before or after all of them.
    """
    gamma = power_exponent(length)
    if not snapshots:
        raise ValueError("there are no snapshots to make an average of")
    steps = [snapshot.step for snapshot in snapshots]
    step = max(steps) if step is None else step
    if not min(steps) <= step <= max(steps):
        raise ValueError(
            f"step={step} must be from {min(steps)} to {max(steps)}, where there are snapshots"
        )
    weights, _ = _nearest(snapshots, gamma, step)
    used = [s for s, weight in zip(snapshots, weights, strict=True) if abs(weight) >= NEGLIGIBLE]
    weights, error = _nearest(used, gamma, step)
    if error > GOOD_ERROR:
        warnings.warn(
            f"the average of length {length} at step {step} is missed by {error:.0%}: a step that "
            "has snapshots, more of them, or a length between those that were kept comes nearer",
            stacklevel=2,
        )
    return Synthesis(used, weights.tolist(), error)


def write_model(model: Path, out: Path, files: Sequence[str], synthesis: Synthesis) -> None:
    """Copy a run's folder `model` to `out`, with the synthesised weights in these of its files.

    Everything else, precisions too, is as in `model`; `out` is there whole or not at all. Raises
    ValueError when `model` is not there, when `out` is, and when the snapshots are not of the
    network in `model`.
    """
    if not model.is_dir():
        raise ValueError(f"{model}: no such folder; a run writes its model at every checkpoint")
    if out.exists():
        raise ValueError(f"{out} is there already; give a new name")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".ema-") as folder:
        copy = Path(folder) / out.name
        shutil.copytree(model, copy)
        for name in files:
            _replace_weights(copy / name, synthesis)
        os.replace(copy, out)


def _read(path: Path) -> Snapshot:
    header = read_header(path)
    try:
        average = parse_json(header.metadata.get("average", "").encode())
        return Snapshot(path, int(average["step"]), float(average["length"]), header)
    except (ValueError, TypeError, KeyError) as error:
        said = short_repr(header.metadata)
        raise ValueError(f"{path}: is not a snapshot of an average: it says {said}") from error


def _replace_weights(path: Path, synthesis: Synthesis) -> None:
    header, tensors = read_header(path), load_safetensors(path)
    weights = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
    for name, tensor in synthesis.tensors(weights):
        if tensor.shape != tensors[name].shape:
            raise ValueError(
                f"{path.name}: {name_repr(name)} is {tuple(tensors[name].shape)} in the model and "
                f"{tuple(tensor.shape)} in its snapshots"
            )
        check_tensors({name: tensor}, Path(path.name), tensors[name].dtype)
        tensors[name] = tensor.to(tensors[name].dtype)
    save_safetensors(tensors, path, metadata=header.metadata)


def _nearest(snapshots: Sequence[Snapshot], gamma: float, step: int) -> tuple[Floats, float]:
    """Weights of sum 1 whose sum of profiles is nearest to the wanted one, and its distance."""
    steps = np.array([snapshot.step for snapshot in snapshots], dtype=np.float64)
    gammas = np.array([power_exponent(snapshot.length) for snapshot in snapshots])
    wanted = np.array([step], dtype=np.float64), np.array([gamma])
    between = _inner_products(steps, gammas, steps, gammas)
    towards = _inner_products(steps, gammas, *wanted)[:, 0]
    square = _inner_products(*wanted, *wanted)[0, 0]
    # Early profiles are high and narrow: scaled to length 1, they leave the system well posed.
    scale = np.diag(between) ** -0.5
    both = np.stack([towards * scale, scale], axis=1)
    free, even = (np.linalg.solve(between * np.outer(scale, scale), both) * scale[:, None]).T
    weights = free + (1 - free.sum()) / even.sum() * even  # Lagrange
    distance = weights @ between @ weights - 2 * weights @ towards + square
    return weights, math.sqrt(max(0.0, distance / square))


def _inner_products(t: Floats, gamma: Floats, u: Floats, delta: Floats) -> Floats:
    """Integrals of the products of profiles (t, gamma) with (u, delta): EDM2, equation 151.

    Up to min(t, u) the product is (gamma + 1)(delta + 1) tau^(gamma + delta), over
    t^(gamma + 1) u^(delta + 1); beyond it is 0.
    """
    t, gamma = t[:, None], gamma[:, None]
    shorter, longer = np.minimum(t, u), np.maximum(t, u)
    falls = np.where(t < u, delta, gamma)  # the exponent of the profile that is still rising
    return (gamma + 1) * (delta + 1) / (gamma + delta + 1) * (shorter / longer) ** falls / longer
