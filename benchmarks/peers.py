"""diffusers' pipeline and networks as fast as they get: eager, compiled, in OpenVINO, in ONNX.

All hold the weights of one of our models, so that what they draw can be compared.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.utils import logging
from torch import Tensor, nn

from latentdiff.models.unet import UNet

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(B, C, H, W), (B,), (B, L, D) -> (B, C, H, W)."""


def unet_as_theirs(unet: UNet) -> UNet2DConditionModel:
    """diffusers' UNet with our weights."""
    theirs = UNet2DConditionModel.from_config(unet.config.to_dict())
    theirs.load_state_dict(unet.state_dict())
    return theirs.eval().requires_grad_(False)


def eager(unet: UNet2DConditionModel) -> Call:
    """As it is."""
    return lambda x, t, context: unet(x, t, context, return_dict=False)[0]


def best(unet: UNet2DConditionModel) -> Call:
    """Every recipe of its documentation: fused projections, channels_last, compiled whole."""
    unet.fuse_qkv_projections()
    unet = unet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    unet.compile(dynamic=False, fullgraph=True)
    return eager(unet)


class _Plain(nn.Module):
    """A UNet that takes and returns tensors alone, as converters ask for."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return self.unet(x, timestep, context, return_dict=False)[0]


def in_openvino(
    network: nn.Module, examples: tuple[Tensor, ...], *, precision: str
) -> Callable[..., Tensor]:
    """A network by OpenVINO's own converter, in the shapes of the examples; "f32" or "bf16"."""
    import openvino

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of sizes, which are fixed
        model = openvino.convert_model(network, example_input=examples)
    sizes = zip(model.inputs, examples, strict=True)
    model.reshape({given: list(example.shape) for given, example in sizes})
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    compiled = openvino.Core().compile_model(model, "CPU", hints)
    return lambda *inputs: torch.from_numpy(compiled([one.numpy() for one in inputs])[0])


def unet_in_openvino(
    unet: UNet2DConditionModel, examples: tuple[Tensor, ...], *, precision: str
) -> Call:
    """diffusers' UNet in OpenVINO."""
    return in_openvino(_Plain(unet), examples, precision=precision)


def in_onnx(network: nn.Module, examples: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """A network in ONNX Runtime, in the shapes of the examples.

    In float32: its CPU kernels have no bf16. The exporter is torch's older one, as the other needs
    one more package and comes to the same operators.
    """
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing, and that this exporter is the older one
        path = Path(folder) / "network.onnx"
        torch.onnx.export(network, examples, str(path), dynamo=False, opset_version=17)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Its threads spin after a run, beside what is timed next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def call(*inputs: Tensor) -> Tensor:
        arrays = [one.numpy() for one in inputs]
        return torch.from_numpy(session.run(None, dict(zip(names, arrays, strict=True)))[0])

    return call


def unet_in_onnx(unet: UNet2DConditionModel, examples: tuple[Tensor, ...]) -> Call:
    """diffusers' UNet in ONNX Runtime."""
    return in_onnx(_Plain(unet), examples)


def installed(*packages: str) -> bool:
    """Whether all of them can be imported."""
    return all(find_spec(package) is not None for package in packages)


def pipeline(folder: Path, dtype: torch.dtype, device: torch.device) -> StableDiffusionPipeline:
    """diffusers' pipeline of a model folder, without bars."""
    logging.set_verbosity_error()
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def best_pipeline(
    folder: Path, dtype: torch.dtype, device: torch.device
) -> StableDiffusionPipeline:
    """The same by every recipe of its documentation; compiled at its first call."""
    pipe = pipeline(folder, dtype, device)
    pipe.fuse_qkv_projections()
    for network in (pipe.unet, pipe.vae):
        network.to(memory_format=torch.channels_last)
    pipe.unet.compile(dynamic=False, fullgraph=True)
    pipe.vae.decode = torch.compile(pipe.vae.decode, dynamic=False, fullgraph=True)
    set_timesteps = pipe.scheduler.set_timesteps

    def begin_at_0(*args: Any, **kwargs: Any) -> None:  # which saves a search at the first step
        set_timesteps(*args, **kwargs)
        pipe.scheduler.set_begin_index(0)

    pipe.scheduler.set_timesteps = begin_at_0
    return pipe


def openvino_pipeline(folder: Path, *, batch: int, precision: str) -> StableDiffusionPipeline:
    """diffusers' loop around UNet and VAE decoder in OpenVINO, in fixed shapes."""

    def convert(network: nn.Module, examples: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        return in_openvino(network, examples, precision=precision)

    return _converted_pipeline(folder, batch, convert)


def onnx_pipeline(folder: Path, *, batch: int) -> StableDiffusionPipeline:
    """The same in ONNX Runtime, in float32."""
    return _converted_pipeline(folder, batch, in_onnx)


def _converted_pipeline(
    folder: Path, batch: int, convert: Callable[..., Callable[..., Tensor]]
) -> StableDiffusionPipeline:
    pipe = pipeline(folder, torch.float32, torch.device("cpu"))
    channels, side = pipe.unet.config.in_channels, pipe.unet.config.sample_size
    latents = torch.randn(2 * batch, channels, side, side)
    tokens = pipe.tokenizer.model_max_length
    context = torch.randn(2 * batch, tokens, pipe.unet.config.cross_attention_dim)
    unet = convert(_Plain(pipe.unet), (latents, torch.zeros(2 * batch), context))
    decoder = convert(_Decoder(pipe.vae), (latents[:batch],))

    def unet_forward(x: Tensor, t: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Any:
        return (unet(x, t.float().expand(len(x)).contiguous(), encoder_hidden_states),)

    pipe.unet.forward = unet_forward
    pipe.vae.decode = lambda z, **_: (decoder(z),)
    return pipe


class _Decoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor) -> Tensor:
        return self.vae.decode(z, return_dict=False)[0]


@contextmanager
def model_folder(model: str) -> Iterator[Path]:
    """A model as a folder that diffusers opens, in float32."""
    from latentdiff.pipeline import Pipeline

    with tempfile.TemporaryDirectory() as folder:
        Pipeline.from_pretrained(model, device="cpu").save_pretrained(folder)
        yield Path(folder)
