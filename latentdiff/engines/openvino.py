"""OpenVINO in torch's place: the same networks, converted by its own converter.

Only what a network's `forward` computes is replaced. Weights, configurations and LoRAs stay those
of torch, so that a pipeline draws, saves and is identified as before; a change of them is seen at
the next call, and converted. Inputs and outputs are float32 in every precision.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.engines import converted
from latentdiff.engines.openvino_network import Function, Network, core
from latentdiff.models.dit import FREQUENCIES, DiT
from latentdiff.models.layers import timestep_embedding
from latentdiff.models.lora import LoRAs
from latentdiff.models.text import TextEncoder
from latentdiff.models.unet import UNet
from latentdiff.models.vae import VAE, Encoder


def precision(dtype: torch.dtype | str | None) -> torch.dtype:
    """The dtype that OpenVINO computes in on this processor: bfloat16 or float32.

    Raises ValueError for another, and ModuleNotFoundError where OpenVINO is not installed.
    """
    cpu, fast = core(), torch.float32
    if "BF16" in cpu.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        if dtype == torch.bfloat16:
            return torch.bfloat16
        if cpu.get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name() == "bf16":
            fast = torch.bfloat16
    if dtype in ("auto", torch.float32):
        return fast if dtype == "auto" else torch.float32
    raise ValueError(
        f"dtype={str(dtype).removeprefix('torch.')}: OpenVINO computes in float32, and in bfloat16 "
        "on a processor that has it"
    )


class OpenVINO:
    """Computes the networks of a pipeline from its construction on, each image as torch would.

    They are converted when they are first called, which takes seconds to minutes, and kept beside
    `model`, a folder, file or name, or in the user's cache (`converted.folders`); what LoRAs have
    changed is not kept. `dtype` is `precision`'s. Outputs have no gradient.
    """

    def __init__(
        self,
        unet: UNet | DiT,
        vae: VAE,
        text_encoder: TextEncoder,
        loras: LoRAs,
        *,
        dtype: torch.dtype,
        model: str | Path,
    ) -> None:
        self.dtype = dtype
        folders = converted.folders(model)
        tower = text_encoder.model

        def replace(owner: Any, method: str, name: str, network: nn.Module, **options: Any) -> None:
            function = Function(name, network, getattr(owner, method), **options)
            setattr(owner, method, Network(function, dtype, folders))

        replace(
            *(unet, "forward", "unet", unet),
            config=unet.config.to_dict(),
            loras=loras,
            prepare=sinusoids(unet),
        )
        replace(
            *(text_encoder, "states", "text_encoder", tower),
            config={**tower.config.to_dict(), "L": text_encoder.tokenizer.model_max_length},
            loras=loras,
        )
        replace(vae.decoder, "forward", "vae_decoder", vae.decoder, config=vae.config.to_dict())
        if isinstance(vae.encoder, Encoder):  # the others hardly compute
            replace(vae.encoder, "forward", "vae_encoder", vae.encoder, config=vae.config.to_dict())

    def check_target(self, target: str | torch.device | torch.dtype) -> None:
        """Raise ValueError for what these networks cannot be moved to: all but the CPU."""
        if isinstance(target, torch.dtype):
            wanted, here = (str(dtype).removeprefix("torch.") for dtype in (target, self.dtype))
            raise ValueError(
                f"to({wanted}): this pipeline computes in {here} with OpenVINO; load it anew with "
                f"dtype=torch.{wanted}"
            )
        if torch.device(target).type != "cpu":
            raise ValueError(
                f"to({str(target)!r}): OpenVINO computes on the CPU here; load the pipeline anew "
                'with engine="torch"'
            )


def sinusoids(unet: UNet | DiT) -> Callable[..., Sequence[Any]]:
    """What makes a denoiser's timestep, of its arguments, the sinusoids that it is embedded as.

    OpenVINO rounds inputs to bfloat16 too, in which 999 and 1000 are one number. What is no
    timestep, but was made of it for the whole run, stays.
    """
    if isinstance(unet, DiT):
        embed = functools.partial(timestep_embedding, dim=FREQUENCIES)
    else:
        embed = functools.partial(
            timestep_embedding,
            dim=unet.config.block_out_channels[0],
            flip_sin_to_cos=unet.config.flip_sin_to_cos,
            freq_shift=unet.config.freq_shift,
        )

    def prepare(x: Tensor, timestep: Any, context: Any) -> Sequence[Any]:
        return x, embed(timestep) if isinstance(timestep, Tensor) else timestep, context

    return prepare
