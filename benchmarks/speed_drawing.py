"""The tables of drawing: an image end to end, a forward pass of the UNet, a start from nothing."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from speed_tables import Table, Variant
from timing import native
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.pipeline import Pipeline

PROMPT = "a cat"
GUIDANCE = 4.0
SD15 = UNetConfig(
    sample_size=64,
    down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    block_out_channels=(320, 640, 1280, 1280),
    layers_per_block=2,
    attention_head_dim=8,
    use_linear_projection=False,
)
NOT_INSTALLED = "{} is not installed"
OPENVINO = {"bf16": "bf16", "float32": "f32"}
"""Its words for the precisions."""


def images_tables(
    model: str, *, steps: int, batches: Sequence[int], device: torch.device
) -> Iterator[Table]:
    """A model's images, end to end, in batches."""
    with peers.model_folder(model) as folder:
        for batch in batches:
            yield images_table(folder, batch, steps=steps, device=device)


def images_table(folder: Path, batch: int, *, steps: int, device: torch.device) -> Table:
    """The same noise, prompt, steps and sampler (DPM-Solver++ 2M) in all of them."""
    reference = Pipeline.from_pretrained(folder, dtype=torch.float32, device=device)
    size = (reference.vae.config.latent_channels, *(reference.unet.config.sample_size,) * 2)
    noise = torch.cat([_noise(seed, size) for seed in range(batch)])

    def ours(pipe: Pipeline, *, compiled: bool = False, batched: bool = False) -> Variant:
        pipe.batched = batched  # as the others are; else these images are drawn one by one

        def call() -> np.ndarray:
            if compiled and pipe.compiled is None:
                pipe.compile(num_images=batch, guidance_scale=GUIDANCE)
            output = pipe(
                PROMPT,
                num_images=batch,
                seed=0,
                steps=steps,
                guidance_scale=GUIDANCE,
                sampler="dpmpp_2m",
                progress=False,
            )
            return np.stack([np.asarray(image) for image in output.images])

        return Variant(call)

    def theirs(pipe: Any) -> Variant:
        def call() -> np.ndarray:
            output = pipe(
                PROMPT,
                latents=noise.to(device, pipe.dtype),
                num_images_per_prompt=batch,
                num_inference_steps=steps,
                guidance_scale=GUIDANCE,
            )
            return np.stack([np.asarray(image) for image in output.images])

        return Variant(call)

    precision, dtype = native(device)
    together = "" if batch == 1 else ", batched"
    variants = {
        "ours, float32": replace(ours(reference), reference=True),
        "diffusers, float32": theirs(peers.pipeline(folder, torch.float32, device)),
    }
    if precision != "float32":
        variants["ours"] = ours(Pipeline.from_pretrained(folder, dtype=dtype, device=device))
        variants[f"diffusers, {precision}"] = theirs(peers.pipeline(folder, dtype, device))
    variants["diffusers, compiled"] = theirs(peers.best_pipeline(folder, dtype, device))
    # After diffusers': what torch compiles after frozen weights is slower (docs/speed.md).
    variants[f"ours, compiled{together}"] = ours(
        Pipeline.from_pretrained(folder, dtype=dtype, device=device), compiled=True, batched=True
    )
    name = "ours, float32" if precision == "float32" else "ours"
    table = Table(f"images of {steps} steps, {batch} at once", variants, name, error=_far)
    table.images = batch
    if device.type != "cpu":
        return table
    if peers.installed("openvino"):
        in_openvino = Pipeline.from_pretrained(folder, dtype=dtype, engine="openvino")
        variants[f"ours, OpenVINO{together}"] = ours(in_openvino, batched=True)
        variants["diffusers, OpenVINO"] = theirs(
            peers.openvino_pipeline(folder, batch=batch, precision=OPENVINO[precision])
        )
    else:
        table.notes["OpenVINO"] = NOT_INSTALLED.format("openvino")
    if peers.installed("onnxruntime", "onnx"):
        in_onnx = peers.onnx_pipeline(folder, batch=batch)
        variants["diffusers, ONNX Runtime, float32"] = theirs(in_onnx)
    else:
        table.notes["diffusers, ONNX Runtime"] = NOT_INSTALLED.format("onnxruntime or onnx")
    return table


def _noise(seed: int, size: tuple[int, ...]) -> Tensor:
    """What our pipeline starts an image of this seed with."""
    return torch.randn((1, *size), generator=torch.Generator().manual_seed(seed))


def _far(found: np.ndarray, reference: np.ndarray) -> float:
    """Mean square of the difference of images in [0, 1]: 1e-4 is 40 dB."""
    difference = found.astype(np.float64) - reference
    return float(np.mean(np.square(difference / 255)))


def unet_table(size: str, *, batch: int, device: torch.device) -> Table:
    """A forward pass for `batch` images under guidance: twice as many rows."""
    unet = made_up_unet() if size == "sd15" else Pipeline.from_pretrained(size, device="cpu").unet
    if not isinstance(unet, UNet):
        raise ValueError(f"--size {size} must be a model with a UNet: diffusers' is compared")
    config = unet.config
    side, tokens = config.sample_size or 64, 77 if size == "sd15" else 32
    torch.manual_seed(0)
    examples = (
        torch.randn(2 * batch, config.in_channels, side, side, device=device),
        torch.full((2 * batch,), 500.0, device=device),
        torch.randn(2 * batch, tokens, config.cross_attention_dim, device=device),
    )
    precision, dtype = native(device)
    halves = tuple(one.to(dtype) if one.ndim > 1 else one for one in examples)
    unet = unet.to(device).eval().requires_grad_(False)
    variants = {
        "ours, float32": Variant(_call(unet, examples), reference=True),
        "diffusers, float32": Variant(_call(peers.eager(_theirs(unet)), examples)),
    }
    with FlopCounterMode(display=False) as counter:
        unet(*examples)
    name = "ours, float32"
    if precision != "float32":
        name = "ours"
        variants[name] = Variant(_call(_ours(unet, dtype), halves))
        in_half = peers.eager(_theirs(unet).to(dtype))
        variants[f"diffusers, {precision}"] = Variant(_call(in_half, halves))
    variants["diffusers, compiled"] = Variant(_call(peers.best(_theirs(unet).to(dtype)), halves))
    table = Table(f"forward pass of {size}, {2 * batch} rows", variants, name, error=_relative)
    table.flop, table.images = counter.get_total_flops(), batch
    if device.type != "cpu":
        return table
    if peers.installed("openvino"):
        in_openvino = peers.unet_in_openvino(_theirs(unet), examples, precision=OPENVINO[precision])
        variants["diffusers, OpenVINO"] = Variant(_call(in_openvino, examples))
    else:
        table.notes["diffusers, OpenVINO"] = NOT_INSTALLED.format("openvino")
    if peers.installed("onnxruntime", "onnx"):
        variants["diffusers, ONNX Runtime, float32"] = Variant(
            _call(peers.unet_in_onnx(_theirs(unet), examples), examples)
        )
    else:
        table.notes["diffusers, ONNX Runtime"] = NOT_INSTALLED.format("onnxruntime or onnx")
    return table


def made_up_unet() -> UNet:
    """A UNet of SD 1.5's shape with weights that are made up."""
    torch.manual_seed(0)
    return UNet(SD15)


def _theirs(unet: UNet) -> Any:
    return peers.unet_as_theirs(unet).to(next(unet.parameters()).device)


def _ours(unet: UNet, dtype: torch.dtype) -> UNet:
    """A copy as the pipeline computes with it."""
    copy = UNet(unet.config).to(next(unet.parameters()).device, dtype)
    copy.load_state_dict(unet.state_dict())
    return copy.eval().requires_grad_(False)


def _call(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    return lambda: function(*inputs)


def _relative(found: Tensor, reference: Tensor) -> float:
    """Largest difference beside the largest number."""
    return float((found.float() - reference).abs().max() / reference.abs().max())


def startup_table(model: str) -> Table:
    """Processes of their own, from the command line to the end."""

    def run(*arguments: str) -> Callable[[], None]:
        def call() -> None:
            with tempfile.TemporaryDirectory() as folder:
                command = [part.replace("OUT", folder) for part in arguments]
                subprocess.run(command, check=True, capture_output=True)

        return call

    python = sys.executable
    latentdiff = str(Path(python).with_name("latentdiff"))
    draw = (latentdiff, "generate", PROMPT, "--model", model, "--seed", "0", "--out", "OUT")
    variants = {
        'latentdiff generate "a cat"': Variant(run(*draw)),
        "its imports": Variant(run(python, "-c", "import latentdiff.cli.drawing")),
        "latentdiff --help": Variant(run(latentdiff, "--help")),
        "import torch": Variant(run(python, "-c", "import torch")),
        "python": Variant(run(python, "-c", "pass")),
    }
    return Table("start", variants, 'latentdiff generate "a cat"')
