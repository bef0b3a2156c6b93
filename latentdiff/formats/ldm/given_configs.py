"""What is known of a single file's model besides its tensors: given, packed in it, or beside it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentdiff.formats.ldm.inferred_config import ModelConfigs
from latentdiff.formats.ldm.modelspec import OUR_KEY, TOKENIZER_FILES, unpack_configs
from latentdiff.formats.ldm.yaml_config import load_ldm_config
from latentdiff.formats.weights import load_json


@dataclass(frozen=True)
class GivenConfigs:
    """What need not be inferred; what nothing says is None."""

    configs: ModelConfigs | None = None
    """Complete ones."""
    tokenizer: dict[str, str] | None = None
    ldm_config: dict[str, dict[str, Any]] | None = None
    """What `load_ldm_config` read."""
    beside: Path | None = None
    """Where that was, if it was not asked for by name."""


def given_configs(
    path: Path, config: str | Path | None, metadata: Mapping[str, str]
) -> GivenConfigs:
    """Find what is known of the model in the file `path`.

    `config`, an LDM YAML file or a diffusers folder, goes before our entry in the metadata, and
    that before a YAML file of the same name beside the file, which A1111 reads too
    (modules/sd_models_config.py). Raises ValueError where one of these is not what it should be.
    """
    if config is not None:
        return _asked_for(Path(config))
    if OUR_KEY in metadata:
        configs, tokenizer = unpack_configs(metadata[OUR_KEY])
        return GivenConfigs(configs, tokenizer)
    beside = path.with_suffix(".yaml")
    if not beside.is_file():
        return GivenConfigs()
    try:
        return GivenConfigs(ldm_config=load_ldm_config(beside), beside=beside)
    except ValueError as error:
        raise ValueError(
            f"{error}; beside a model, such a file describes it: rename it if it is something "
            "else, or give config="
        ) from error


def _asked_for(config: Path) -> GivenConfigs:
    if config.is_file():
        return GivenConfigs(ldm_config=load_ldm_config(config))
    if not config.is_dir():
        raise ValueError(
            f"config={str(config)!r} must be an LDM YAML file or a diffusers folder that is there"
        )
    configs = ModelConfigs(
        unet=load_json(config / "unet" / "config.json"),
        vae=load_json(config / "vae" / "config.json"),
        text_encoder=load_json(config / "text_encoder" / "config.json"),
        scheduler=load_json(config / "scheduler" / "scheduler_config.json"),
    )
    files = [config / "tokenizer" / name for name in TOKENIZER_FILES]
    tokenizer = {file.name: file.read_text(encoding="utf-8") for file in files if file.is_file()}
    return GivenConfigs(configs, tokenizer or None)
