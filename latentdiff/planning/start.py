"""The networks that `init` names, as shapes: only configurations and headers of files are read."""

from dataclasses import dataclass
from pathlib import Path

from transformers import CLIPTextConfig

from latentdiff.formats.diffusers import (
    EMBEDDED_MODELS,
    check_pipeline_folder,
    find_model,
)
from latentdiff.formats.hub import cached
from latentdiff.formats.single_file import read_single_file_configs
from latentdiff.formats.weights import load_json
from latentdiff.models.dit import DiTConfig
from latentdiff.models.text_config import tower_config
from latentdiff.models.unet import UNetConfig
from latentdiff.models.vae import VAEConfig

SD15 = "sd15"
"""In place of a model for `init`, `vae` and `text_encoder`: the shapes of Stable Diffusion 1.x."""
# Shapes of the text tower of CLIP ViT-L/14 (Radford et al. 2021, table 20), SD 1.x's.
SD15_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "hidden_act": "quick_gelu",
}


@dataclass(frozen=True)
class Start:
    """The configurations of a model's networks."""

    network: UNetConfig | DiTConfig
    vae: VAEConfig
    text: CLIPTextConfig


def read_start(init: str | Path) -> Start:
    """The configurations of the model that a training starts from.

    `init` is as in train_unet.py, or "sd15". Nothing is fetched: raises ValueError for a hub id
    that is not in huggingface_hub's cache, and where there is no such model.
    """
    if init == SD15:
        return Start(UNetConfig(), VAEConfig(), tower_config(SD15_TEXT))
    if Path(init).is_file():
        configs = read_single_file_configs(init)
        return Start(
            UNetConfig.from_dict(configs.unet),
            VAEConfig.from_dict(configs.vae),
            tower_config(configs.text_encoder),
        )
    embedded_or_path = init in EMBEDDED_MODELS or Path(init).exists()
    folder = find_model(init) if embedded_or_path else cached(str(init))
    variants = check_pipeline_folder(folder)
    network, kind = ("unet", UNetConfig) if "unet" in variants else ("transformer", DiTConfig)
    return Start(
        kind.from_dict(load_json(folder / network / "config.json")),
        VAEConfig.from_dict(load_json(folder / "vae" / "config.json")),
        tower_config(load_json(folder / "text_encoder" / "config.json")),
    )
