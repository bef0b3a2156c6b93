"""Models and LoRAs that visitors may choose: by name only, from what the server was started with.

A name is looked up among those of the folder and never made into a path, so that none leads out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from latentdiff.formats.header import short_repr
from latentdiff.formats.lora import is_lora


@dataclass(frozen=True)
class Choices:
    """What the server was started with: the first model, and folders that hold more."""

    model: str = "emoji"
    """A name, folder, file or hub id, as `latentdiff generate --model` takes it."""
    models_folder: Path | None = None
    loras_folder: Path | None = None

    @property
    def first(self) -> str:
        """The name of the first model."""
        return Path(self.model).name

    def models(self) -> dict[str, str]:
        """Where each model is, by its name: the first one, then those of the folder."""
        found = {
            path.name: str(path)
            for path in _children(self.models_folder)
            if (path / "model_index.json").is_file() or (_is_file(path) and not is_lora(path))
        }
        return {self.first: self.model} | {n: p for n, p in found.items() if n != self.first}

    def loras(self) -> dict[str, str]:
        """Where each LoRA is, by its name."""
        paths = _children(self.loras_folder)
        return {path.stem: str(path) for path in paths if _is_file(path) and is_lora(path)}


def chosen(option: str, name: str, offered: Mapping[str, str]) -> str:
    """Where the thing of that name is; ValueError, with the names there are, if it is none."""
    if name not in offered:
        known = ", ".join(offered) or "none: the server was started without a folder of them"
        raise ValueError(f"{option}={short_repr(name)} is unknown; known are {known}")
    return offered[name]


def _children(folder: Path | None) -> list[Path]:
    return [] if folder is None else sorted(folder.iterdir())


def _is_file(path: Path) -> bool:
    return path.suffix == ".safetensors" and path.is_file()
