"""The scripts of train/ as modules, and the configuration classes that they read."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
CONFIGS = {
    "train_clip": "TrainCLIP",
    "train_vae": "TrainVAE",
    "cache_latents": "CacheLatents",
    "train_unet": "TrainUNet",
}
"""The scripts, and the configuration that each imports or defines."""


def script(name: str) -> ModuleType:
    """train/<name>.py, imported once."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "train" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def config_class(name: str) -> Any:
    """The dataclass that train/<name>.py is configured by."""
    return getattr(script(name), CONFIGS[name])
