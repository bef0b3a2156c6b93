"""What a single file says of itself: Stability AI's ModelSpec, and an entry of our own."""

import base64
import datetime
import hashlib
import json
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from latentdiff.formats.header import parse_json
from latentdiff.formats.ldm.guesses import Configurations

OURS = "latentdiff"  # the key of our entry
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
)
MAX_TEXT_BYTES = 32_000_000  # of our entry, unpacked; CLIP's tokenizer has 2 MB

# Of the dtypes that weights have, the order in which safetensors writes them.
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def modelspec(
    model: Configurations, known: Mapping[str, str], *, title: str, is_sd: bool
) -> dict[str, str]:
    """ModelSpec 1.0.0 (github.com/Stability-AI/ModelSpec), with the values of kohya's trainer.

    known: metadata that the model was read with; its author, licence, … go on with it.
    title: the model's, if it has none yet. is_sd: whether it has the shape of SD 1.x or 2.x.
    """
    unet, vae = model.unet, model.vae
    prediction = model.scheduler["prediction_type"]
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
        **known,
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


def pack(model: Configurations, tokenizer: Mapping[str, str] | None) -> str:
    """Our entry: JSON, compressed, because the tokenizer of CLIP alone has 2 MB."""
    content = {
        "unet": model.unet,
        "vae": model.vae,
        "text_encoder": model.text_encoder,
        "scheduler": model.scheduler,
        "tokenizer": tokenizer,
    }
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode("ascii")


def unpack(entry: str) -> tuple[Configurations, dict[str, str] | None]:
    """What `pack` was given; ValueError for an entry that it did not make."""
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(base64.b64decode(entry, validate=True), MAX_TEXT_BYTES)
        content = parse_json(text)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"its metadata's {OURS} cannot be read ({error})") from error
    parts = ("unet", "vae", "text_encoder", "scheduler")
    if not isinstance(content, dict) or not all(isinstance(content.get(p), dict) for p in parts):
        raise ValueError(f"its metadata's {OURS} lacks one of {', '.join(parts)}")
    tokenizer = content.get("tokenizer")
    if tokenizer is not None and not (
        isinstance(tokenizer, dict)
        and tokenizer.keys() <= set(TOKENIZER_FILES)
        and all(isinstance(text, str) for text in tokenizer.values())
    ):
        raise ValueError(f"its metadata's {OURS} holds a tokenizer that is none")
    return Configurations(*(content[part] for part in parts)), tokenizer
