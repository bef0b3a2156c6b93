"""A LoRA in training: the network that is trained, and the file that it becomes."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from latentdiff.data.cache import LatentCache
from latentdiff.formats.diffusers import LORA
from latentdiff.formats.ldm.compatibility import is_sd_shape
from latentdiff.formats.ldm.inferred_config import ModelConfigs
from latentdiff.formats.ldm.modelspec import modelspec
from latentdiff.formats.lora import LoRAFile, read_lora
from latentdiff.formats.lora_layers import AdapterLayer, LoRALayer, kind
from latentdiff.formats.lora_writing import write_lora
from latentdiff.formats.weights import check_tensors
from latentdiff.loading import Components
from latentdiff.models.lora import check_layers
from latentdiff.models.lora_training import (
    TEXT_LAYERS,
    LoRAConfig,
    add_known_lora,
    add_lora,
    trained_lora,
    unet_pattern,
)
from latentdiff.models.text import TextEncoder
from latentdiff.models.unet import UNet
from latentdiff.tasks.denoiser.config import TrainUNet

MAX_COUNTED = 100_000  # images whose captions are counted for the metadata
MAX_TAGS = 1000


class UNetWithText(nn.Module):
    """A UNet and its text tower as one network, whose context is token ids."""

    def __init__(self, unet: UNet, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, x: Tensor, timestep: Tensor, ids: Tensor) -> Tensor:
        """(B, C, H, W), (B,) and token ids (B, L) -> (B, C, H, W)."""
        return self.unet(x, timestep, self.text_encoder(ids))


def lora_network(
    model: Components, config: LoRAConfig, *, seed: int, precision: str
) -> UNet | UNetWithText:
    """The network with a LoRA, new or of `lora.weights`, and if the LoRA is of the text tower too,
    the tower in it as well.

    What is frozen, the VAE too, is converted to bfloat16 or float16 where the run computes in it.
    Raises ValueError for weights that are too large for float16, and as `add_lora` and
    `read_weights` do.
    """
    unet, tower = model.unet, cast(nn.Module, model.text_encoder.model)
    assert isinstance(unet, UNet)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    if dtype is not None:
        for name, network in (("UNet", unet), ("text encoder", tower)):
            check_tensors(network.state_dict(), Path(f"the {name} of init"), dtype)
            network.to(dtype)
    if dtype == torch.bfloat16:  # SD 1.x's VAE overflows in float16
        model.vae.to(dtype)
    if config.weights is None:
        return with_lora(unet, tower, config, seed=seed)
    of_unet, of_text = read_weights(Path(config.weights), unet, tower)
    add_known_lora(unet, of_unet, config)
    if not of_text:
        return unet.train()
    add_known_lora(tower, of_text, config)
    return UNetWithText(unet, tower).train()


def with_lora(
    unet: UNet, tower: nn.Module, config: LoRAConfig, *, seed: int
) -> UNet | UNetWithText:
    """`lora_network` with a new LoRA, whatever the precision."""
    unet.requires_grad_(False)
    if config.layers:
        add_lora(unet, config, unet_pattern(config), seed=seed)
    if not config.text_encoder:
        return unet.train()
    add_lora(tower, config, TEXT_LAYERS, seed=seed + 1)
    return UNetWithText(unet, tower).train()


def read_weights(
    path: Path, unet: UNet, tower: nn.Module
) -> tuple[dict[str, LoRALayer], dict[str, LoRALayer]]:
    """The layers of a LoRA to go on from: of the UNet, and of the text tower.

    Raises ValueError for a file of another kind or for other networks.
    """
    path = path / LORA if path.is_dir() else path
    try:
        file = read_lora(path, layers_per_block=unet.config.layers_per_block)
        check_layers(path, "UNet", unet, file.unet)
        check_layers(path, "text encoder", tower, file.text_encoder)
    except ValueError as error:
        raise ValueError(f"lora.weights: {error}") from error
    return _plain(path, file.unet), _plain(path, file.text_encoder)


def _plain(path: Path, layers: Mapping[str, AdapterLayer]) -> dict[str, LoRALayer]:
    found = {}
    for name, layer in layers.items():
        if not isinstance(layer, LoRALayer) or layer.magnitude is not None:
            raise ValueError(
                f"lora.weights={path}: {name} is changed by a {kind(layer)}, which is not trained "
                "here; a plain LoRA is"
            )
        found[name] = layer
    return found


def drawing_networks(network: Any, text_encoder: TextEncoder) -> tuple[UNet, TextEncoder]:
    """UNet and text encoder as a pipeline takes them, of what `lora_network` made or a copy."""
    if isinstance(network, UNetWithText):
        tower: Any = network.text_encoder
        return network.unet, TextEncoder(tower, text_encoder.tokenizer)
    return network, text_encoder


def save_lora(
    network: nn.Module,
    folder: Path,
    config: LoRAConfig,
    metadata: dict[str, str],
    distilled_steps: int | None,
) -> None:
    """Write the trained LoRA of a network as one file; `distilled_steps` are a student's."""
    text: dict[str, Any] = {}
    unet = network
    if isinstance(network, UNetWithText):
        unet, tower = network.unet, network.text_encoder
        text = trained_lora(tower)
    folder.mkdir(parents=True, exist_ok=True)
    file = LoRAFile(trained_lora(unet), text, distilled_steps)
    write_lora(file, folder / LORA, names=config.names, metadata=metadata)


def lora_metadata(
    model: Components, config: TrainUNet, cache: LatentCache, *, base: str
) -> dict[str, str]:
    """What the file says of its training, in kohya's and ModelSpec's words; `base` is the
    fingerprint of the network that it is for."""
    assert config.init is not None
    diffusion = model.diffusion
    configs = ModelConfigs(
        model.unet.config.to_dict(),
        model.vae.config.to_dict(),
        model.text_encoder.model.config.to_dict(),
        diffusion.to_scheduler_config(),
    )
    is_sd = is_sd_shape(configs.unet, configs.vae, configs.text_encoder)
    second = is_sd and configs.unet["use_linear_projection"]
    size, optimizer = cache.image_size, config.optimizer
    spec = modelspec(configs, {}, title=config.loop.output_dir.name, is_sd=is_sd)
    spec |= {
        "modelspec.architecture": f"{spec['modelspec.architecture']}/lora",
        "modelspec.resolution": f"{size}x{size}",
    }
    entries: dict[str, Any] = {
        "ss_output_name": config.loop.output_dir.name,
        "ss_base_model_version": f"sd_v{2 if second else 1}" if is_sd else "latentdiff",
        "ss_v2": second,
        "ss_sd_model_name": Path(config.init).name,
        "ss_resolution": f"({size}, {size})",
        "ss_num_train_images": len(cache),
        "ss_total_batch_size": config.loop.batch_size,
        "ss_max_train_steps": config.loop.max_steps,
        "ss_learning_rate": optimizer.learning_rate,
        "ss_optimizer": optimizer.optimizer,
        "ss_seed": config.loop.seed,
        "ss_caption_dropout_rate": config.caption_dropout,
        "ss_tag_frequency": json.dumps({"captions": tag_counts(cache)}, ensure_ascii=False),
        "latentdiff.base_fingerprint": base,
    }
    if Path(config.init).is_file():
        entries["ss_new_sd_model_hash"] = _sha256(Path(config.init))
    return spec | {name: str(value) for name, value in entries.items()}


def tag_counts(cache: LatentCache) -> dict[str, int]:
    """The parts of the captions between commas, and how often each is there; the commonest."""
    counts = Counter[str]()
    for captions in islice(cache.captions, MAX_COUNTED):
        for caption in dict.fromkeys(captions):
            counts.update(tag.strip() for tag in caption.split(",") if tag.strip())
    return dict(counts.most_common(MAX_TAGS))


@cache
def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
