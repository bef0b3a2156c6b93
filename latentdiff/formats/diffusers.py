"""A diffusers pipeline folder, both ways: where it is, whether it is whole, what it says it is.

The form is that of Stable Diffusion 1.x and 2.x on the Hugging Face Hub. The modules read and
write their own subfolders; nothing named in a folder is ever imported or run.
"""

from pathlib import Path
from typing import Any

from latentdiff.formats.header import named, refuse_pickle, shown
from latentdiff.formats.hub import fetch
from latentdiff.formats.shards import PICKLES, describe_variants, find_variants, refuse_missing
from latentdiff.formats.weights import load_json, save_json

# The release of diffusers whose form we write; it asks for the key when it reads.
DIFFUSERS_VERSION = "0.42.1"
EMBEDDED_MODELS = ("emoji",)  # shipped with the package under latentdiff/pretrained/

# The parts that have weights, and what the names of their files begin with; of a DiT's folder
# `find_stems` says it.
STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
# model_index.json names classes; a folder is read only if they are the ones that ours equal. The
# scheduler's class is checked by Diffusion, which reads the scheduler's own file.
_PIPELINE_CLASSES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
)
# What diffusers has no pipeline for, and so refuses by this name: a DiT, whose class it has not
# either, and a UNet that is told of the text as diffusers' UNet is of a class.
_OWN_PIPELINE = "LatentDiffPipeline"
_DIT = ["latentdiff.models.dit", "DiT"]
# A decoder that enlarges small images, by where its class is: diffusers has none, and says so.
ENLARGING_VAE = ["latentdiff.models.vae", "VAE"]
_DENOISER_CLASSES = {"unet": ["diffusers", "UNet2DConditionModel"], "transformer": _DIT}
_COMPONENT_CLASSES = {
    "vae": (["diffusers", "AutoencoderKL"], ENLARGING_VAE),
    "text_encoder": (["transformers", "CLIPTextModel"],),
    "tokenizer": (["transformers", "CLIPTokenizer"], ["transformers", "CLIPTokenizerFast"]),
}
# What a published folder may hold besides; nothing of it is opened.
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
_FILES = (  # beside the weights; each a file that must be there in any one of these forms
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
    Only safetensors, JSON and text files are fetched. Raises ValueError if there is no such model.
    """
    if name_or_path in EMBEDDED_MODELS:
        return Path(__file__).parent.parent / "pretrained" / name_or_path
    path = Path(name_or_path)
    if path.is_dir():
        return path
    allowed = (
        f"allowed are {', '.join(EMBEDDED_MODELS)} (embedded), an existing folder, "
        "or the owner/name of a pipeline on the Hugging Face Hub"
    )
    if path.is_file() and path.suffix.lower() in PICKLES:
        raise ValueError(refuse_pickle(path))
    if isinstance(name_or_path, Path) or path.exists():
        raise ValueError(f"model={str(path)!r} is not a folder; {allowed}")
    try:
        return fetch(name_or_path, find_stems, revision=revision, variant=variant)
    except ValueError as error:
        raise ValueError(f"model={name_or_path!r} {error}; {allowed}") from error


def check_pipeline_folder(folder: Path, *, variant: str | None = None) -> dict[str, str | None]:
    """Find the weights of a pipeline folder: of which variant each part is to be read.

    A part that lacks the variant is read from its plain weights, as diffusers does. Raises
    ValueError, naming what is missing or unknown, unless the folder is a pipeline that we read:
    checked are the presence of every part's files and the class names in model_index.json.
    """
    folder = Path(folder)
    denoiser, stems = _denoiser(folder), find_stems(folder)
    names = {part: sorted(path.name for path in (folder / part).glob("*")) for part in stems}
    found = {part: find_variants(names[part], stem) for part, stem in stems.items()}
    missing = [
        forms[0]
        for forms in (("model_index.json",), (f"{denoiser}/config.json",), *_FILES)
        if not any((folder / name).is_file() for name in forms)
    ]
    empty = [part for part, variants in found.items() if not variants]
    if any(name.lower().endswith(PICKLES) for part in empty for name in names[part]):
        part = next(part for part in empty if names[part])
        raise ValueError(refuse_missing(folder / part, stems[part], variant, names[part]))
    missing += [f"{part}/{stems[part]}.safetensors" for part in empty]
    if missing:
        raise ValueError(f"{folder} is not a whole pipeline folder; missing: {', '.join(missing)}")
    _check_classes(folder, denoiser)

    if variant is not None and not any(variant in variants for variants in found.values()):
        there = describe_variants(name for variants in found.values() for name in variants)
        raise ValueError(f"{folder} has no weights of {variant=}; variants found: {there}")
    chosen = {part: variant if variant in found[part] else None for part in stems}
    for part, name in chosen.items():
        if name not in found[part]:
            raise ValueError(refuse_missing(folder / part, stems[part], name, names[part]))
    return chosen


def find_stems(folder: Path) -> dict[str, str]:
    """What the weights of each part are called: `STEMS`, with our DiT in the UNet's place."""
    denoiser = _denoiser(folder)
    return {denoiser if part == "unet" else part: stem for part, stem in STEMS.items()}


def _denoiser(folder: Path) -> str:
    """Which part denoises: `unet`, unless model_index.json names our DiT."""
    path = folder / "model_index.json"
    is_dit = path.is_file() and load_json(path).get("transformer") == _DIT
    return "transformer" if is_dit else "unet"


def _check_classes(folder: Path, denoiser: str) -> None:
    """Raise ValueError, naming the entry of model_index.json, where it is not one of ours."""
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
                f"{path}: {field} is {shown(index.get(field))}; "
                f"allowed: {' or '.join(map(str, allowed))}"
            )
    for field in index.keys() - expected.keys():
        value = index[field]
        is_ours = field == "scheduler" and isinstance(value, list) and value[:1] == ["diffusers"]
        if isinstance(value, list | dict) and value != nothing and not is_ours:
            raise ValueError(f"{path}: {named(field)} is {shown(value)}, which is not read here")


def save_model_index(folder: Path, *, scheduler_class: str, denoiser: str = "unet") -> None:
    """Write model_index.json in the form of SD 2.1-base, which diffusers opens without a warning.

    The last file of a folder: the class of pipeline follows from the `denoiser`, which is there
    already: `unet` or, with a DiT, `transformer`. `scheduler_class` is the `_class_name` in
    scheduler/scheduler_config.json.
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
    """Read scheduler/scheduler_config.json: diffusers' words for noise schedule and prediction."""
    return load_json(Path(folder) / "scheduler" / "scheduler_config.json")


def save_scheduler_config(config: dict[str, Any], folder: Path) -> None:
    """Write scheduler/scheduler_config.json of a pipeline folder."""
    path = Path(folder) / "scheduler" / "scheduler_config.json"
    save_json({**config, "_diffusers_version": DIFFUSERS_VERSION}, path)


def find_part(name_or_path: str | Path, part: str) -> Path:
    """Find the folder to read one module from: of a pipeline, or of a training run's `model/`.

    For the text encoder that is the folder with `text_encoder/` and `tokenizer/`, for the others
    the one with `config.json`. Raises ValueError if there is no such model.
    """
    folder = find_model(name_or_path)
    return folder / part if part != "text_encoder" and (folder / part).is_dir() else folder
