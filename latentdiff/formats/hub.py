"""Fetch models from the Hugging Face Hub, or from its cache when offline.

Only JSON, the tokenizer's text files and safetensors are downloaded: never pickles or Python files,
never the weights of a safety checker.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from latentdiff.formats.sharded_weights import PICKLE_SUFFIXES, describe_variants, find_variants

TOKENIZER_PATTERNS = ["vocab.json", "merges.txt", "tokenizer*.json", "special_tokens_map.json"]
# The files of a pipeline that are read, but for its weights.
CONFIG_PATTERNS = ["model_index.json", "*/*.json", "tokenizer/*.txt"]


def fetch(
    hub_id: str,
    find_stems: Callable[[Path], Mapping[str, str]],
    *,
    revision: str | None = None,
    variant: str | None = None,
) -> Path:
    """Fetch a pipeline from the Hub into huggingface_hub's cache; returns its folder there.

    find_stems: gives the stem of each component's weight files, `diffusion_pytorch_model` for
    `unet`, from a folder with model_index.json, which is fetched first.
    revision: a branch, tag or commit; without it, the main branch.
    variant: such as `fp16`; components without it come with their plain weights.
    What is in the cache is not fetched again, and is used when the Hub cannot be reached.
    Raises ValueError, saying what is wrong with `hub_id`, where there is no such pipeline.
    """
    stems = find_stems(_snapshot(hub_id, revision, ["model_index.json"]))
    folder = _snapshot(hub_id, revision, patterns(stems, variant))
    missing = _without_weights(folder, stems, variant)
    if variant is not None and 0 < len(missing) < len(stems):
        folder = _snapshot(hub_id, revision, patterns({c: stems[c] for c in missing}, None))
        missing = []
    if missing:
        names = _list_remote(hub_id, revision) or _list_local(folder)
        raise ValueError(_missing_message(names, stems, variant))
    return folder


def cached(hub_id: str) -> Path:
    """The folder of a Hub repository in huggingface_hub's cache; nothing is fetched.

    Raises ValueError where it is not there.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"model={hub_id!r} is neither a file, a folder nor a model in the cache of the Hugging "
            "Face Hub, which alone is looked in here"
        ) from error


def fetch_tokenizer(hub_id: str) -> Path:
    """Fetch the tokenizer at the root of a Hub repository, such as CLIP's; returns its folder.

    The cache is used as in `fetch`. Raises ValueError where there is none.
    """
    try:
        return _snapshot(hub_id, None, TOKENIZER_PATTERNS)
    except ValueError as error:
        raise ValueError(f"tokenizer={hub_id!r} {error}; name a folder that holds one") from error


def fetch_clip(hub_id: str) -> Path:
    """Fetch a CLIP at the root of a Hub repository, or a text encoder with its tokenizer.

    The cache is used as in `fetch`; the folder that is returned may hold neither. Raises
    ValueError, saying what is wrong with `hub_id`, where there is no such repository.
    """
    clip = ["config.json", "preprocessor_config.json", "model.safetensors.index.json"]
    clip += ["model.safetensors", "model-?????-of-?????.safetensors", *TOKENIZER_PATTERNS]
    return _snapshot(hub_id, None, clip + patterns({"text_encoder": "model"}, None))


def patterns(stems: Mapping[str, str], variant: str | None) -> list[str]:
    """Patterns of the files to fetch: the weights of one variant, sharded or not, and configs."""
    dotted = "" if variant is None else f".{variant}"
    number = "-?????-of-?????"
    endings = {
        f"{dotted}.safetensors",
        f"{dotted}{number}.safetensors",
        f"{number}{dotted}.safetensors",
    }
    weights = [f"{name}/{stem}{ending}" for name, stem in stems.items() for ending in endings]
    return CONFIG_PATTERNS + weights


def _without_weights(folder: Path, stems: Mapping[str, str], variant: str | None) -> list[str]:
    """The components whose weights are not in a folder."""
    return [
        component
        for component, stem in stems.items()
        if variant not in find_variants([p.name for p in (folder / component).glob("*")], stem)
    ]


def _missing_message(names: list[str], stems: Mapping[str, str], variant: str | None) -> str:
    """The error message for a repository with these files and without the weights asked for."""
    files = {
        component: [name.partition("/")[2] for name in names if name.startswith(f"{component}/")]
        for component in stems
    }
    variants = {
        v for component, stem in stems.items() for v in find_variants(files[component], stem)
    }
    if variants:
        asked = "plain weights" if variant is None else f"weights of variant={variant!r}"
        return f"has no {asked}; variants found: {describe_variants(variants)}"
    if any(name.endswith(PICKLE_SUFFIXES) for component in stems for name in files[component]):
        return (
            "has its weights as pickles, which can run code when they are opened; fetch it with "
            "`hf download` and give that to `latentdiff convert --unsafe_pickle`"
        )
    return f"has no weights of a pipeline, in folders named {', '.join(stems)}"


def _snapshot(hub_id: str, revision: str | None, patterns: list[str]) -> Path:
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
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except HFValidationError:
        reason = "is neither a file, a folder nor a hub id"
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
    raise ValueError(reason)


def _list_local(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*")]


def _list_remote(hub_id: str, revision: str | None) -> list[str]:
    """All files of a repository, or none when the Hub cannot be reached."""
    from huggingface_hub import list_repo_files

    with suppress(Exception):  # without the list, the error message is only less helpful
        return list_repo_files(hub_id, revision=revision)
    return []
