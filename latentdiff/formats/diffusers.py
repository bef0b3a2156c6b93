"""Diffusers pipeline folders: find one, check it, read and write what belongs to no component.

The layout is that of Stable Diffusion 1.x and 2.x on the Hugging Face Hub. The networks read and
write their own subfolders; no class that a folder names is ever imported or run.
"""

from pathlib import Path
from typing import Any

from latentdiff.formats.header import name_repr, pickle_message, short_repr
from latentdiff.formats.hub import fetch
from latentdiff.formats.sharded_weights import (
    PICKLE_SUFFIXES,
    describe_variants,
    find_variants,
    missing_weights_message,
)
from latentdiff.formats.weights import load_json, save_json

# The release of diffusers whose layout we write; diffusers expects the key when it reads.
DIFFUSERS_VERSION = "0.42.1"
EMBEDDED_MODELS = ("emoji",)  # shipped with the package under latentdiff/pretrained/

# The components that have weights, and the stems of their files' names; `find_stems` gives those of
# a folder, which may hold a DiT.
STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
# model_index.json names classes; a folder is read only if ours compute the same as those. The
# scheduler's class is checked by Diffusion, which reads the scheduler's own file.
_PIPELINE_CLASSES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
)
# A class that diffusers does not have, so that it refuses the folder: of a pipeline with a DiT, or
# with a UNet whose class embedding is computed from the text.
_OWN_PIPELINE = "LatentDiffPipeline"
_DIT = ["latentdiff.models.dit", "DiT"]
# A VAE whose decoder enlarges small images; diffusers has none, and refuses this entry.
ENLARGING_VAE = ["latentdiff.models.vae", "VAE"]
_DENOISER_CLASSES = {"unet": ["diffusers", "UNet2DConditionModel"], "transformer": _DIT}
_COMPONENT_CLASSES = {
    "vae": (["diffusers", "AutoencoderKL"], ENLARGING_VAE),
    "text_encoder": (["transformers", "CLIPTextModel"],),
    "tokenizer": (["transformers", "CLIPTokenizer"], ["transformers", "CLIPTokenizerFast"]),
}
# Components that a published folder may hold besides; none of their files is opened.
_UNREAD_CLASSES = {
    "safety_checker": (
        ["stable_diffusion", "StableDiffusionSafetyChecker"],
        ["diffusers.pipelines.stable_diffusion.safety_checker", "StableDiffusionSafetyChecker"],
    ),
    "feature_extractor": (
        ["transformers", "CLIPFeatureExtractor"],
        ["transformers", "CLIPImageProcessor"],
        ["transformers", "CLIPImageProcessorFast"],
        ["transformers", "CLIPImageProcessorPil"],
    ),
    "image_encoder": (["transformers", "CLIPVisionModelWithProjection"],),
}
_REMOTE_CODE = ("auto_map", "custom_pipeline", "trust_remote_code")
_FILES = (  # beside the weights; of each line, one file must exist
    ("vae/config.json",),
    ("text_encoder/config.json",),
    ("tokenizer/vocab.json", "tokenizer/tokenizer.json"),
    ("tokenizer/merges.txt", "tokenizer/tokenizer.json"),
    ("scheduler/scheduler_config.json",),
)


def find_model(
    name_or_path: str | Path, *, revision: str | None = None, variant: str | None = None
) -> Path:
    """Find the folder of a model: the embedded "emoji", a folder, or a Hugging Face Hub id.

    A hub id is fetched once into huggingface_hub's cache, and from there afterwards when the hub
    cannot be reached; `revision` is a branch, tag or commit of it, `variant` chooses its weights.
    Only safetensors, JSON and text files are fetched. Raises ValueError if there is no such model,
    and for a `revision` of one that is not on the hub.
    """
    path = Path(name_or_path)
    if name_or_path in EMBEDDED_MODELS:
        path = Path(__file__).parent.parent / "pretrained" / name_or_path
    if path.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} is of a model on the Hugging Face Hub; "
                f"model={str(name_or_path)!r} is on this machine"
            )
        return path
    allowed = (
        f"allowed are {', '.join(EMBEDDED_MODELS)} (embedded), an existing folder, "
        "or the owner/name of a pipeline on the Hugging Face Hub"
    )
    if path.is_file() and path.suffix.lower() in PICKLE_SUFFIXES:
        raise ValueError(pickle_message(path))
    if path.suffix.lower() in (".safetensors", *PICKLE_SUFFIXES) and not path.exists():
        raise ValueError(f"model={str(path)!r}: no such file; {allowed}, or a .safetensors file")
    if isinstance(name_or_path, Path) or path.exists():
        raise ValueError(f"model={str(path)!r} is not a folder; {allowed}")
    try:
        return fetch(name_or_path, find_stems, revision=revision, variant=variant)
    except ValueError as error:
        raise ValueError(f"model={name_or_path!r} {error}; {allowed}") from error


LORA = "lora.safetensors"
"""The one file in the `model/` of a run that trained a LoRA."""


def check_pipeline_folder(folder: Path, *, variant: str | None = None) -> dict[str, str | None]:
    """Check a pipeline folder and return the variant of weights to read for each component.

    A component that lacks the variant is read from its plain weights, as in diffusers. Raises
    ValueError, naming what is missing or unknown, unless every component's files exist and the
    class names in model_index.json are supported.
    """
    folder = Path(folder)
    denoiser, stems = _denoiser(folder), find_stems(folder)
    files = {name: sorted(path.name for path in (folder / name).glob("*")) for name in stems}
    variants = {name: find_variants(files[name], stem) for name, stem in stems.items()}
    missing = [
        alternatives[0]
        for alternatives in (("model_index.json",), (f"{denoiser}/config.json",), *_FILES)
        if not any((folder / file).is_file() for file in alternatives)
    ]
    without = [name for name in stems if not variants[name]]
    if any(file.lower().endswith(PICKLE_SUFFIXES) for name in without for file in files[name]):
        name = next(name for name in without if files[name])
        raise ValueError(missing_weights_message(folder / name, stems[name], variant, files[name]))
    missing += [f"{name}/{stems[name]}.safetensors" for name in without]
    if "model_index.json" in missing:
        for near, what in (
            (folder / "model", "a run"),
            (folder / "unet" / "model", "a project"),
            (folder.parent, "one component"),
        ):
            if (near / "model_index.json").is_file():
                raise ValueError(f"{folder} is the folder of {what}; the pipeline is {near}")
        for near in (folder, folder / "model"):
            if (lora := near / LORA).is_file():
                raise ValueError(
                    f"{folder} holds a LoRA, which is loaded on top of the model that it was "
                    f"trained on: --lora {lora}"
                )
    if missing:
        raise ValueError(f"{folder} is not a whole pipeline folder; missing: {', '.join(missing)}")
    _check_classes(folder, denoiser)

    if variant is not None and not any(variant in names for names in variants.values()):
        available = describe_variants(v for names in variants.values() for v in names)
        raise ValueError(f"{folder} has no weights of {variant=}; variants found: {available}")
    chosen = {name: variant if variant in variants[name] else None for name in stems}
    for name, v in chosen.items():
        if v not in variants[name]:
            raise ValueError(missing_weights_message(folder / name, stems[name], v, files[name]))
    return chosen


def find_stems(folder: Path) -> dict[str, str]:
    """The stem of each component's weight files: `STEMS`, with our DiT in the UNet's place."""
    denoiser = _denoiser(folder)
    return {denoiser if name == "unet" else name: stem for name, stem in STEMS.items()}


def _denoiser(folder: Path) -> str:
    """Which component denoises: `unet`, or `transformer` where model_index.json names our DiT."""
    path = folder / "model_index.json"
    is_dit = path.is_file() and load_json(path).get("transformer") == _DIT
    return "transformer" if is_dit else "unet"


def _check_classes(folder: Path, denoiser: str) -> None:
    """Raise ValueError, naming the entry, for a class in model_index.json that is not supported."""
    path = folder / "model_index.json"
    index = load_json(path)
    for field in _REMOTE_CODE:
        if field in index:
            raise ValueError(f"{path}: {field} asks for code from elsewhere, which never runs here")
    nothing = [None, None]
    expected = {
        "_class_name": (*_PIPELINE_CLASSES, _OWN_PIPELINE),
        denoiser: (_DENOISER_CLASSES[denoiser],),
        **_COMPONENT_CLASSES,
    }
    for field, classes in _UNREAD_CLASSES.items():
        if index.get(field) is not None:
            expected[field] = (nothing, *classes)
    for field, allowed in expected.items():
        if index.get(field) not in allowed:
            raise ValueError(
                f"{path}: {field} is {short_repr(index.get(field))}; "
                f"allowed: {' or '.join(map(str, allowed))}"
            )
    for field in index.keys() - expected.keys():
        value = index[field]
        is_ours = field == "scheduler" and isinstance(value, list) and value[:1] == ["diffusers"]
        if isinstance(value, list | dict) and value != nothing and not is_ours:
            raise ValueError(
                f"{path}: {name_repr(field)} is {short_repr(value)}, which is not read here"
            )


def save_model_index(folder: Path, *, scheduler_class: str, denoiser: str = "unet") -> None:
    """Write model_index.json in the form of SD 2.1-base, which diffusers opens without a warning.

    It is the last file of a folder to be written: the pipeline's class follows from the config of
    the `denoiser`, which is `unet` or, with a DiT, `transformer`. `scheduler_class` is the
    `_class_name` in scheduler/scheduler_config.json.
    """
    folder = Path(folder)
    configs = {name: load_json(folder / name / "config.json") for name in (denoiser, "vae")}
    network = configs[denoiser]
    # 4 of latents, 1 of the mask and 4 of the masked image's latents (runwayml's inpainting).
    inpaints = network["in_channels"] == 2 * configs["vae"]["latent_channels"] + 1
    pipeline = "StableDiffusionInpaintPipeline" if inpaints else "StableDiffusionPipeline"
    if denoiser != "unet" or network["class_embed_type"] is not None:
        pipeline = _OWN_PIPELINE
    enlarges = configs["vae"]["_class_name"] != "AutoencoderKL"
    index = {
        "_class_name": pipeline,
        "_diffusers_version": DIFFUSERS_VERSION,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler_class],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        denoiser: _DENOISER_CLASSES[denoiser],
        "vae": ENLARGING_VAE if enlarges else ["diffusers", "AutoencoderKL"],
    }
    save_json(index, folder / "model_index.json")


def load_scheduler_config(folder: Path) -> dict[str, Any]:
    """Read scheduler/scheduler_config.json of a pipeline folder."""
    return load_json(Path(folder) / "scheduler" / "scheduler_config.json")


def save_scheduler_config(config: dict[str, Any], folder: Path) -> None:
    """Write scheduler/scheduler_config.json of a pipeline folder."""
    path = Path(folder) / "scheduler" / "scheduler_config.json"
    save_json({**config, "_diffusers_version": DIFFUSERS_VERSION}, path)


def find_component(name_or_path: str | Path, component: str) -> Path:
    """Find the folder of one component, in a pipeline or in the `model/` of a training run.

    For the text encoder that is the folder with `text_encoder/` and `tokenizer/`, for the others
    the one with `config.json`. Raises ValueError if there is no such model.
    """
    folder = find_model(name_or_path)
    inside = component != "text_encoder" and (folder / component).is_dir()
    return folder / component if inside else folder
