"""The components of a pipeline, read from and written to disk: a diffusers folder or a single file.

`pipeline.Pipeline` composes them.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from latentdiff.device import Target, find_device
from latentdiff.diffusion import Diffusion
from latentdiff.formats.diffusers import (
    check_pipeline_folder,
    find_model,
    load_scheduler_config,
    save_model_index,
    save_scheduler_config,
)
from latentdiff.formats.hub_upload import push_folder
from latentdiff.formats.lora import check_without_loras
from latentdiff.formats.model_card import front_matter, usage
from latentdiff.formats.single_file import read_single_file, write_single_file
from latentdiff.formats.weights import check_numbers, check_tensors
from latentdiff.models.dit import DiT
from latentdiff.models.fingerprint import fingerprint
from latentdiff.models.single_file_networks import (
    networks_from_single_file,
    single_file_from_networks,
)
from latentdiff.models.text import TextEncoder
from latentdiff.models.unet import UNet
from latentdiff.models.vae import VAE


class Components(NamedTuple):
    """The three networks of a pipeline and its diffusion process."""

    unet: UNet | DiT
    vae: VAE
    text_encoder: TextEncoder
    diffusion: Diffusion


def check_shapes(
    unet: UNet | DiT, vae: VAE, text_encoder: TextEncoder, diffusion: Diffusion
) -> None:
    """Raise ValueError unless the networks fit each other."""
    channels, text = vae.config.latent_channels, text_encoder.width
    if unet.config.in_channels not in (channels, 2 * channels + 1):
        raise ValueError(
            f"in_channels={unet.config.in_channels} of the UNet must be {channels}, the VAE's "
            f"latent_channels, or {2 * channels + 1}, with mask and masked image"
        )
    factor, variance = (2, "learned") if diffusion.learned_variance else (1, "not learned")
    if unet.config.out_channels != factor * channels:
        raise ValueError(
            f"out_channels={unet.config.out_channels} of the UNet must be {factor * channels}: "
            f"the VAE has latent_channels={channels}, and the scheduler says that the variance "
            f"is {variance}"
        )
    if unet.config.cross_attention_dim != text:
        raise ValueError(
            f"cross_attention_dim={unet.config.cross_attention_dim} of the UNet must be "
            f"{text}, the width of the text encoder"
        )


def load_folder(
    name: str | Path, *, revision: str | None, variant: str | None, dtype: torch.dtype | None
) -> Components:
    """Read a diffusers folder, local or on the hub: see `Pipeline.from_pretrained`."""
    folder = find_model(name, revision=revision, variant=variant)
    variants = check_pipeline_folder(folder, variant=variant)
    network, subfolder = (UNet, "unet") if "unet" in variants else (DiT, "transformer")
    return Components(
        network.from_pretrained(folder / subfolder, variant=variants[subfolder], dtype=dtype),
        VAE.from_pretrained(folder / "vae", variant=variants["vae"], dtype=dtype),
        TextEncoder.from_pretrained(folder, variant=variants["text_encoder"], dtype=dtype),
        Diffusion.from_scheduler_config(load_scheduler_config(folder)),
    )


def check_single_file(name: str | Path, **given: str | None) -> None:
    """Raise ValueError for an option of folders that is given for a single file."""
    for option, value in given.items():
        if value is not None:
            raise ValueError(f"{option}={value!r} is not of a single file, which {name} is")


def load_single_file(
    path: str | Path,
    *,
    config: str | Path | None,
    tokenizer: str | Path | None,
    ema: bool,
    dtype: torch.dtype | None,
) -> Components:
    """Read a .safetensors file with LDM's names: see `Pipeline.from_single_file`."""
    file = read_single_file(path, config=config, ema=ema, dtype=dtype)
    unet, vae, text_encoder = networks_from_single_file(file, tokenizer=tokenizer)
    return Components(
        unet, vae, text_encoder, Diffusion.from_scheduler_config(file.scheduler_config)
    )


def move(networks: Sequence[nn.Module], targets: Sequence[Target]) -> None:
    """Move networks to devices and dtypes.

    Raises ValueError, before the first is moved, for weights that are too large for a dtype, and
    for a device that cannot be used.
    """
    for dtype in [target for target in targets if isinstance(target, torch.dtype)]:
        for network in networks:
            for name, tensor in network.state_dict().items():
                check_numbers(name, tensor, dtype)
    found = [find_device(one) if isinstance(one, str | int) else one for one in targets]
    for network in networks:
        for target in found:
            network.to(target)


def save_folder(components: Components, folder: str | Path, *, dtype: torch.dtype | None) -> None:
    """Write a diffusers folder: see `Pipeline.save_pretrained`."""
    _check_without_loras(components)
    folder = Path(folder)
    subfolder = "unet" if isinstance(components.unet, UNet) else "transformer"
    networks = {
        subfolder: components.unet,
        "vae": components.vae,
        "text_encoder": components.text_encoder.model,
    }
    for name, network in networks.items():  # all, before the first of them is written
        check_tensors(network.state_dict(), folder / name, dtype)
    components.unet.save_pretrained(folder / subfolder, dtype=dtype)
    components.vae.save_pretrained(folder / "vae", dtype=dtype)
    components.text_encoder.save_pretrained(folder, dtype=dtype)
    scheduler = components.diffusion.to_scheduler_config()
    save_scheduler_config(scheduler, folder)
    # model_index.json comes last, so that a folder that has one is complete.
    save_model_index(folder, scheduler_class=scheduler["_class_name"], denoiser=subfolder)


def push(components: Components, repo_id: str, *, private: bool, token: str | None) -> str:
    """Upload a diffusers folder with a short card: see `Pipeline.push_to_hub`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_folder(components, folder, dtype=None)
        card = f"{front_matter('pipeline')}# {repo_id}\n\n{usage('pipeline', repo_id)}"
        (folder / "README.md").write_text(card, encoding="utf-8")
        return push_folder(folder, repo_id, private=private, token=token)


def save_single_file(
    components: Components,
    path: str | Path,
    *,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str] | None,
) -> list[str]:
    """Write a .safetensors file with LDM's names: see `Pipeline.save_single_file`."""
    _check_without_loras(components)
    unet, vae, text_encoder, diffusion = components
    file = single_file_from_networks(unet, vae, text_encoder, diffusion.to_scheduler_config())
    file.metadata = dict(metadata or {})
    return write_single_file(file, path, dtype=dtype)


def components_fingerprint(components: Components) -> str:
    """SHA-256 of the three networks and the noise schedule: the same in any precision."""
    unet, vae, text_encoder, diffusion = components
    fingerprints = [
        fingerprint(unet, unet.config.to_dict()),
        fingerprint(vae, vae.config.to_dict()),
        fingerprint(text_encoder.model, {}),
        json.dumps(diffusion.to_scheduler_config(), sort_keys=True),
    ]
    return hashlib.sha256("".join(fingerprints).encode()).hexdigest()


def _check_without_loras(components: Components) -> None:
    for network in (components.unet, components.text_encoder):
        check_without_loras(network)
