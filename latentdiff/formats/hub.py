"""Pipelines on the Hugging Face Hub: what is fetched of one, and from the cache when offline.

Only JSON, the tokenizer's text files and safetensors are asked for: never pickles or Python files,
never the weights of a safety checker.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from latentdiff.formats.shards import PICKLES, describe_variants, find_variants

TOKENIZER_PATTERNS = ["vocab.json", "merges.txt", "tokenizer*.json", "special_tokens_map.json"]
# Of the files of a pipeline, all that are read but weights.
NOT_WEIGHTS = ["model_index.json", "*/*.json", "tokenizer/*.txt"]


def fetch(
    hub_id: str,
    find_stems: Callable[[Path], Mapping[str, str]],
    *,
    revision: str | None = None,
    variant: str | None = None,
) -> Path:
    """Fetch a pipeline of the Hub into huggingface_hub's cache; its folder there.

    find_stems: what the weights of each part are called, `diffusion_pytorch_model` for `unet`, in
    a folder that has model_index.json at least; it is fetched first, as the parts follow from it.
    revision: a branch, tag or commit; without it, the main branch.
    variant: such as `fp16`; the parts that have none come with their plain weights.
    What is in the cache is not fetched again, and serves when the hub cannot be reached.
    Raises ValueError, which says what `hub_id` is or lacks, where there is no such pipeline.
    """
    stems = find_stems(_snapshot(hub_id, revision, ["model_index.json"]))
    folder = _snapshot(hub_id, revision, patterns(stems, variant))
    lacking = _lacking(folder, stems, variant)
    if variant is not None and 0 < len(lacking) < len(stems):
        folder = _snapshot(hub_id, revision, patterns({p: stems[p] for p in lacking}, None))
        lacking = []
    if lacking:
        raise ValueError(_refusal(_listed(hub_id, revision) or _names(folder), stems, variant))
    return folder


def fetch_tokenizer(hub_id: str) -> Path:
    """Fetch the tokenizer at the root of a Hub repository, such as CLIP's; its folder.

    Cached as `fetch` is. Raises ValueError where there is none.
    """
    try:
        return _snapshot(hub_id, None, TOKENIZER_PATTERNS)
    except ValueError as error:
        raise ValueError(f"tokenizer={hub_id!r} {error}; name a folder that holds one") from error


def fetch_towers(hub_id: str) -> Path:
    """Fetch a CLIP that lies at the root of a Hub repository, or a text encoder with its tokenizer.

    Cached as `fetch` is; the folder may hold neither. Raises ValueError, which says what `hub_id`
    is, where there is no such repository.
    """
    both = ["config.json", "preprocessor_config.json", "model.safetensors.index.json"]
    both += ["model.safetensors", "model-?????-of-?????.safetensors", *TOKENIZER_PATTERNS]
    return _snapshot(hub_id, None, both + patterns({"text_encoder": "model"}, None))


def patterns(stems: Mapping[str, str], variant: str | None) -> list[str]:
    """Of a repository only what is read: the weights of one variant, whole or in shards."""
    dotted = "" if variant is None else f".{variant}"
    number = "-?????-of-?????"
    endings = {
        f"{dotted}.safetensors",
        f"{dotted}{number}.safetensors",
        f"{number}{dotted}.safetensors",
    }
    weights = [f"{part}/{stem}{ending}" for part, stem in stems.items() for ending in endings]
    return NOT_WEIGHTS + weights


def _lacking(folder: Path, stems: Mapping[str, str], variant: str | None) -> list[str]:
    """The parts that do not have their weights in a folder."""
    return [
        part
        for part, stem in stems.items()
        if variant not in find_variants([p.name for p in (folder / part).glob("*")], stem)
    ]


def _refusal(names: Iterable[str], stems: Mapping[str, str], variant: str | None) -> str:
    """What is said of a repository with these files that lacks the weights asked for."""
    inside = {
        part: [name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")]
        for part in stems
    }
    there = {found for part, stem in stems.items() for found in find_variants(inside[part], stem)}
    if there:
        asked = "plain weights" if variant is None else f"weights of variant={variant!r}"
        return f"has no {asked}; variants found: {describe_variants(there)}"
    if any(name.endswith(PICKLES) for part in stems for name in inside[part]):
        return (
            "has its weights as pickles, which can run code when they are opened; fetch it with "
            "`hf download` and give that to `latentdiff convert --unsafe_pickle`"
        )
    return f"has no weights of a pipeline, in folders named {', '.join(stems)}"


def _names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*")]


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


def _listed(hub_id: str, revision: str | None) -> list[str]:
    """All files of a repository, or none when the hub cannot be asked."""
    from huggingface_hub import list_repo_files

    with suppress(Exception):  # whatever it is, the answer is only less helpful without the list
        return list_repo_files(hub_id, revision=revision)
    return []
