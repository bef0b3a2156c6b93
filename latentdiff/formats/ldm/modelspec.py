"""Metadata of a single file: Stability AI's ModelSpec, and an entry of ours with the configs."""

import base64
import datetime
import hashlib
import json
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from latentdiff.formats.header import parse_json
from latentdiff.formats.ldm.inferred_config import ModelConfigs

OUR_KEY = "latentdiff"
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
)
# What of a file's metadata is written anew with each file of ours; all else is passed on.
RENEWED = {
    OUR_KEY,
    "format",
    *(f"modelspec.{key}" for key in ("title", "date", "sai_model_spec", "architecture")),
    *(f"modelspec.{key}" for key in ("implementation", "resolution", "prediction_type")),
    "modelspec.hash_sha256",
}
MAX_TEXT_BYTES = 32_000_000  # of our entry, unpacked; CLIP's tokenizer has 2 MB

# Of the dtypes that weights have, the order in which safetensors writes them.
_DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)


def modelspec(
    configs: ModelConfigs, inherited: Mapping[str, str], *, title: str, is_sd: bool
) -> dict[str, str]:
    """ModelSpec 1.0.0 (github.com/Stability-AI/ModelSpec), with the values of kohya's trainer.

    inherited: metadata that the model was read with; author, licence, … are passed on.
    title: for a model that has none yet. is_sd: whether it has the shape of SD 1.x or 2.x.
    """
    unet, vae = configs.unet, configs.vae
    prediction = configs.scheduler["prediction_type"]
    if not is_sd:
        architecture = "latentdiff"
    elif unet["in_channels"] == 9:
        architecture = f"stable-diffusion-v{2 if unet['use_linear_projection'] else 1}-inpainting"
    elif unet["use_linear_projection"]:
        size = "768-v" if prediction == "v_prediction" else "512"
        architecture = f"stable-diffusion-v2-{size}"
    else:
        architecture = "stable-diffusion-v1"
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    side = vae["sample_size"] if unet["sample_size"] is None else unet["sample_size"] * factor
    return {
        "modelspec.title": title,
        "modelspec.date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **inherited,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else prediction,
    }


def tensor_hash(tensors: Mapping[str, Tensor]) -> str:
    """ModelSpec's hash: SHA-256 of all that follows the header of a safetensors file."""
    sha256 = hashlib.sha256()
    for name in sorted(tensors, key=lambda name: (_DTYPES.index(tensors[name].dtype), name)):
        numbers = tensors[name].contiguous().reshape(-1).view(torch.uint8)
        sha256.update(numbers.numpy().data)
    return f"0x{sha256.hexdigest()}"


def pack_configs(configs: ModelConfigs, tokenizer: Mapping[str, str] | None) -> str:
    """The value of our metadata entry: JSON, compressed, as CLIP's tokenizer alone has 2 MB."""
    content = {
        "unet": configs.unet,
        "vae": configs.vae,
        "text_encoder": configs.text_encoder,
        "scheduler": configs.scheduler,
        "tokenizer": tokenizer,
    }
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode("ascii")


def unpack_configs(entry: str) -> tuple[ModelConfigs, dict[str, str] | None]:
    """The arguments of `pack_configs`; ValueError for an entry that it did not make."""
    try:
        decompressor = zlib.decompressobj()
        text = decompressor.decompress(base64.b64decode(entry, validate=True), MAX_TEXT_BYTES)
        content = parse_json(text)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"its metadata's {OUR_KEY} cannot be read ({error})") from error
    keys = ("unet", "vae", "text_encoder", "scheduler")
    if not isinstance(content, dict) or not all(isinstance(content.get(k), dict) for k in keys):
        raise ValueError(f"its metadata's {OUR_KEY} lacks one of {', '.join(keys)}")
    tokenizer = content.get("tokenizer")
    if tokenizer is not None and not (
        isinstance(tokenizer, dict)
        and tokenizer.keys() <= set(TOKENIZER_FILES)
        and all(isinstance(text, str) for text in tokenizer.values())
    ):
        raise ValueError(f"its metadata's {OUR_KEY} holds a tokenizer that is none")
    return ModelConfigs(*(content[key] for key in keys)), tokenizer
