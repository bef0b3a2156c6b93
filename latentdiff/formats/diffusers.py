"""A diffusers pipeline folder, both ways: where it is, whether it is whole, what it says it is.

The form is that of Stable Diffusion 1.x and 2.x on the Hugging Face Hub. The modules read and
write their own subfolders; nothing named in a folder is ever imported or run.
"""

from pathlib import Path
from typing import Any

from latentdiff.formats.weights import load_json, save_json

# The release of diffusers whose form we write; it asks for the key when it reads.
DIFFUSERS_VERSION = "0.42.1"
EMBEDDED_MODELS = ("emoji",)  # shipped with the package under latentdiff/pretrained/

# model_index.json names classes; a folder is read only if they are the ones that ours equal. The
# scheduler's class is checked by Diffusion, which reads the scheduler's own file.
_PIPELINE_CLASSES = ("StableDiffusionPipeline",)
_COMPONENT_CLASSES = {
    "unet": (["diffusers", "UNet2DConditionModel"],),
    "vae": (["diffusers", "AutoencoderKL"],),
    "text_encoder": (["transformers", "CLIPTextModel"],),
    "tokenizer": (["transformers", "CLIPTokenizer"], ["transformers", "CLIPTokenizerFast"]),
}
_FILES = (  # each a file that a pipeline must have, in any one of these forms
    ("unet/config.json",),
    ("unet/diffusion_pytorch_model.safetensors",),
    ("vae/config.json",),
    ("vae/diffusion_pytorch_model.safetensors",),
    ("text_encoder/config.json",),
    ("text_encoder/model.safetensors",),
    ("tokenizer/vocab.json", "tokenizer/tokenizer.json"),
    ("tokenizer/merges.txt", "tokenizer/tokenizer.json"),
    ("scheduler/scheduler_config.json",),
)
# Of a hub repository only what a pipeline needs: no pickles, safety checkers or fp16 twins.
_HUB_PATTERNS = [
    "model_index.json",
    "*/*.json",
    "tokenizer/*.txt",
    *(name for names in _FILES for name in names if name.endswith(".safetensors")),
]


def find_model(name_or_path: str | Path, *, revision: str | None = None) -> Path:
    """Find the folder of a model: the embedded "emoji", a folder, or a Hugging Face Hub id.

    A hub id is fetched once into huggingface_hub's cache, and from there afterwards when the hub
    cannot be reached; `revision` is a branch, tag or commit of it. Only safetensors, JSON and
    text files are fetched. Raises ValueError if there is no such model.
    """
    if name_or_path in EMBEDDED_MODELS:
        return Path(__file__).parent.parent / "pretrained" / name_or_path
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    allowed = (
        f"allowed are {', '.join(EMBEDDED_MODELS)} (embedded), an existing folder, "
        "or the owner/name of a pipeline on the Hugging Face Hub"
    )
    if isinstance(name_or_path, Path) or Path(name_or_path).exists():
        raise ValueError(f"model={str(name_or_path)!r} is not a folder; {allowed}")
    return _fetch(name_or_path, revision, allowed)


def _fetch(hub_id: str, revision: str | None, allowed: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = hub_id if revision is None else f"{hub_id} at revision {revision}"
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=_HUB_PATTERNS))
    except HFValidationError:
        reason = "is neither a folder nor a hub id"
    except GatedRepoError:
        reason = "asks for its licence to be accepted and for `hf auth login`"
    except RepositoryNotFoundError:
        reason = "is neither a folder nor a public repository on the Hugging Face Hub"
    except RevisionNotFoundError:
        reason = f"has no revision {revision!r} on the Hugging Face Hub"
    except (LocalEntryNotFoundError, OSError):
        reason = (
            f"is no folder, and {where} could not be fetched from the Hugging Face Hub "
            "(no connection?) and is not in its cache"
        )
    raise ValueError(f"model={hub_id!r} {reason}; {allowed}")


def check_pipeline_folder(folder: Path) -> None:
    """Raise ValueError, naming what is missing or unknown, unless `folder` is a pipeline we read.

    Checked are the presence of every module's files and the class names in model_index.json.
    """
    folder = Path(folder)
    missing = [
        names[0]
        for names in (("model_index.json",), *_FILES)
        if not any((folder / name).is_file() for name in names)
    ]
    if missing:
        raise ValueError(f"{folder} is not a whole pipeline folder; missing: {', '.join(missing)}")

    index = load_json(folder / "model_index.json")
    expected = {"_class_name": _PIPELINE_CLASSES, **_COMPONENT_CLASSES}
    for field, allowed in expected.items():
        if index.get(field) not in allowed:
            raise ValueError(
                f"{folder}/model_index.json: {field} is {index.get(field)}; "
                f"allowed: {' or '.join(map(str, allowed))}"
            )


def save_model_index(folder: Path, *, scheduler_class: str) -> None:
    """Write model_index.json in the form of SD 2.1-base, which diffusers opens without a warning.

    `scheduler_class` is the `_class_name` in scheduler/scheduler_config.json.
    """
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler_class],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    save_json(index, Path(folder) / "model_index.json")


def load_scheduler_config(folder: Path) -> dict[str, Any]:
    """Read scheduler/scheduler_config.json: diffusers' words for noise schedule and prediction."""
    return load_json(Path(folder) / "scheduler" / "scheduler_config.json")


def save_scheduler_config(config: dict[str, Any], folder: Path) -> None:
    """Write scheduler/scheduler_config.json of a pipeline folder."""
    save_json(config, Path(folder) / "scheduler" / "scheduler_config.json")


def find_part(name_or_path: str | Path, part: str) -> Path:
    """Find the folder to read one module from: of a pipeline, or of a training run's `model/`.

    For the text encoder that is the folder with `text_encoder/` and `tokenizer/`, for the others
    the one with `config.json`. Raises ValueError if there is no such model.
    """
    folder = find_model(name_or_path)
    return folder / part if part != "text_encoder" and (folder / part).is_dir() else folder
