"""Networks to and from a single file; the file itself is formats/single_file.py's."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.formats.clip_tokenizer import END, clip_tokenizer
from latentdiff.formats.hub import fetch_tokenizer
from latentdiff.formats.ldm.compatibility import SD2_TOWER, differences
from latentdiff.formats.ldm.modelspec import TOKENIZER_FILES
from latentdiff.formats.open_clip import TEXT_MODEL
from latentdiff.formats.single_file import SingleFile
from latentdiff.formats.weights import check_shapes
from latentdiff.models.dit import DiT
from latentdiff.models.text import TextEncoder, empty_tower, fill_tower, save_tokenizer
from latentdiff.models.text_config import check_tokenizer, load_tokenizer
from latentdiff.models.unet import UNet
from latentdiff.models.vae import VAE


def networks_from_single_file(
    file: SingleFile, *, tokenizer: str | Path | None = None
) -> tuple[UNet, VAE, TextEncoder]:
    """UNet, VAE and text encoder of a single file; their weights are the file's, not copies.

    tokenizer: a folder with a CLIP tokenizer, or a hub id; by default the one that the file holds,
    or else CLIP's own. Raises ValueError if configs and weights do not fit each other, or if there
    is no such tokenizer.
    """
    unet = _network(UNet, file.unet_config, file.unet)
    vae = _network(VAE, file.vae_config, file.vae)
    tower = fill_tower(empty_tower(file.text_config), file.text_encoder)
    if tokenizer is not None:
        folder = Path(tokenizer)
        folder = folder if folder.is_dir() else fetch_tokenizer(str(folder))
        loaded = load_tokenizer(_tokenizer_folder(folder), tower.config)
    elif file.tokenizer is None:
        # SD 2.x was trained with open_clip's padding, token 0.
        pad_token = END if differences(file.text_config, SD2_TOWER) else "!"
        length = tower.config.max_position_embeddings
        loaded = clip_tokenizer(length, pad_token=pad_token)
        check_tokenizer(loaded, tower.config, where=CLIP_TOKENIZER)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            for name, text in file.tokenizer.items():
                if name in TOKENIZER_FILES:  # never a path of the file's choice
                    (Path(temporary) / name).write_text(text, encoding="utf-8")
            loaded = load_tokenizer(Path(temporary), tower.config)
    return unet, vae, TextEncoder(tower, loaded)


CLIP_TOKENIZER = (
    "CLIP's tokenizer, as the file holds none (give its own by tokenizer=, --tokenizer)"
)


def _tokenizer_folder(folder: Path) -> Path:
    """The folder of a tokenizer, or the one in a pipeline's; transformers reads any other as an
    empty tokenizer, to which every prompt is the same. Raises ValueError for it."""
    for place in (folder, folder / "tokenizer"):
        if any((place / name).is_file() for name in ("vocab.json", "tokenizer.json")):
            return place
    raise ValueError(
        f"tokenizer={folder} holds none: give the folder of a vocab.json and a merges.txt, or a "
        "pipeline's folder"
    )


def single_file_from_networks(
    unet: UNet | DiT, vae: VAE, text_encoder: TextEncoder, scheduler_config: dict[str, Any]
) -> SingleFile:
    """What `formats.single_file.write_single_file` writes of these networks.

    Raises ValueError for networks that LDM has no names for: a VAE whose encoder is not learned, a
    DiT, and a UNet with pooled text.
    """
    if vae.config.encoder != "kl":
        raise ValueError(
            f"a VAE with encoder={vae.config.encoder!r} has no place in a single file, whose "
            "readers expect a learned encoder; save a folder, which only latentdiff reads"
        )
    if not isinstance(unet, UNet):
        raise ValueError(
            "a DiT has no place in a single file, whose readers expect a UNet; save a folder, "
            "which only latentdiff reads"
        )
    for key in ("addition_embed_type", "class_embed_type"):
        if (value := getattr(unet.config, key)) is not None:
            raise ValueError(
                f"a UNet with {key}={value!r} has no place in a single file, whose readers expect "
                "one of SD 1.x or 2.x; save a folder"
            )
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(text_encoder.tokenizer, Path(folder))
        paths = [path for name in TOKENIZER_FILES if (path := Path(folder) / name).is_file()]
        tokenizer = {path.name: path.read_text(encoding="utf-8") for path in paths}
    return SingleFile(
        unet=unet.state_dict(),
        vae=vae.state_dict(),
        text_encoder={
            TEXT_MODEL + name.removeprefix(TEXT_MODEL): tensor
            for name, tensor in text_encoder.model.state_dict().items()
        },
        unet_config=unet.config.to_dict(),
        vae_config=vae.config.to_dict(),
        text_config=json.loads(text_encoder.model.config.to_json_string(use_diff=False)),
        scheduler_config=scheduler_config,
        tokenizer=tokenizer,
    )


def _network(cls: Any, config: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    with torch.device("meta"):
        network = cls(cls.config_class.from_dict(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_shapes(f"the {cls.__name__} of the file", network.state_dict(), shapes)
    network.load_state_dict(tensors, assign=True)
    return network.eval()
