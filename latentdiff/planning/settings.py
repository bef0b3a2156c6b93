"""The configuration of a training script as planning reads it: a YAML file, not a dataclass.

Its values are checked as far as a plan needs them; the script itself checks all of them.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from latentdiff.data.cache import LatentCache
from latentdiff.data.crop_flip import CropFlip
from latentdiff.formats.yaml_text import parse_yaml
from latentdiff.models.clip import CLIPSize
from latentdiff.models.dit import DiTConfig
from latentdiff.models.lora_training import LoRAConfig
from latentdiff.models.unet import UNetConfig
from latentdiff.models.vae import VAEConfig
from latentdiff.options import expanded, former_names
from latentdiff.planning.start import read_start
from latentdiff.tasks.clip.config import TrainCLIP
from latentdiff.tasks.denoiser.config import TrainUNet
from latentdiff.tasks.distill.config import Distill
from latentdiff.tasks.vae.config import TrainVAE

NetworkConfig = UNetConfig | DiTConfig | VAEConfig | CLIPSize
NETWORKS: Mapping[str, type[NetworkConfig]] = {
    "dit": DiTConfig,
    "unet": UNetConfig,
    "vae": VAEConfig,
    "clip": CLIPSize,
}
# Keys in which the defaults of a script differ from those of its network's class.
REQUIRED = {
    "dit": (),
    "unet": ("down_block_types", "up_block_types", "block_out_channels", "layers_per_block"),
    "vae": ("block_out_channels", "layers_per_block", "norm_num_groups", "mid_block_add_attention"),
    "clip": tuple(field.name for field in fields(CLIPSize)),
}
FOLDERS = ("vae", "text_encoder", "cache", "init", "teacher")
SCRIPTS = (TrainUNet, TrainVAE, TrainCLIP, Distill)
RENAMED = {old: new for script in SCRIPTS for old, new in former_names(script).items()}


def read_settings(path: Path | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a configuration file, with what is not None of `overrides` in their place.

    Folders that are not here but beside the file, such as those of a project, are found there; for
    a VAE, text encoder or cache that is yet to be made there is the configuration that makes it.
    Raises ValueError for a file that is no configuration, or has the former name of an option, and
    for an `init` or `teacher` that must be trained first.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    settings = {} if path is None else read_yaml(path)
    if path is not None:
        folders = {name: settings.get(name) for name in FOLDERS if name not in given}
        settings |= _from_here(folders, path)
    settings = with_options(settings, given)
    settings = {key: expanded(value) for key, value in settings.items()}
    return _of_cache(settings) | settings | _of_teacher(settings)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a configuration file.

    Raises ValueError for what is none, and for the former name of an option.
    """
    try:
        settings = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must be a YAML mapping, such as a training script reads")
    for name in settings:
        if name in RENAMED:
            raise ValueError(f"{path}: {name} is named {RENAMED[name]} now")
    return settings


def _from_here(folders: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Those that are only beside the file, or will be, by the file there that makes them; named
    from the current folder."""
    found = dict[str, str]()
    for name, value in folders.items():
        if not isinstance(value, str) or Path(value).exists():
            continue
        beside = path.parent / value
        part, *inside = Path(value).parts or ("",)
        trained_by = path.parent / f"{part}.yaml"
        if beside.exists():
            found[name] = str(beside)
        elif (inside or name == "cache") and trained_by.is_file():  # a word is a name, as "emoji"
            if name in ("init", "teacher"):
                raise ValueError(
                    f"{name}={value} in {path} is not trained yet; train it first, by {trained_by}"
                )
            found[name] = str(trained_by)
    return found


def to_be_made(name: str | Path | None) -> Path | None:
    """The configuration by which a part of a project will be made, if that is what is named."""
    path = None if name is None else Path(name)
    return path if path is not None and path.suffix == ".yaml" and path.is_file() else None


def with_options(settings: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with options of a script's command line, such as `lora.rank`, in their place."""
    changed = dict(settings)
    for name, value in options.items():
        group, _, key = name.rpartition(".")
        if group:
            changed[group] = {**(changed.get(group) or {}), key: value}
        else:
            changed[name] = value
    return changed


def num_cached(settings: Mapping[str, Any]) -> int | None:
    """The number of images in the latent cache; None if there is none yet."""
    if settings.get("cache") is None or not Path(settings["cache"]).is_dir():
        return None
    return len(LatentCache(Path(settings["cache"])))


def _of_cache(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a run takes from its latent cache, made or not: size, crops, flips, masks."""
    if (config := to_be_made(settings.get("cache"))) is not None:
        names = ("image_size", *(field.name for field in fields(CropFlip)))
        return {name: value for name, value in read_yaml(config).items() if name in names}
    if settings.get("cache") is None or not Path(settings["cache"]).is_dir():
        return {}
    cache = LatentCache(Path(settings["cache"]))
    return {"image_size": cache.image_size, **vars(cache.crop_flip)}


def _of_teacher(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A student's network, VAE and text encoder, which are those of the model that it is of."""
    teacher = settings.get("teacher")
    for name in ("init", "vae", "text_encoder") if teacher is not None else ():
        if settings.get(name) is not None:
            raise ValueError(
                f"{name}={settings[name]} does not go with teacher={teacher}, whose networks a "
                "student has"
            )
    return {} if teacher is None else {"init": teacher}


def positive_int(settings: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """The setting's value; ValueError if it is missing and has no default, or is something else."""
    value = settings.get(key, default)
    if value is None:
        raise ValueError(f"{key} is missing; give it in the configuration or as --{key}")
    if type(value) is not int or value < 1:
        raise ValueError(f"{key}={value!r} must be a whole number of at least 1")
    return value


def network_config(settings: Mapping[str, Any]) -> tuple[str, NetworkConfig]:
    """Which network is trained, "dit", "unet", "vae" or "clip", and its configuration.

    A denoiser's is that of the model which `init` names, a student's that of its teacher. Raises
    ValueError, naming the key, if there is not just one, or if it lacks a key or has an unknown
    one.
    """
    kinds = [kind for kind in NETWORKS if isinstance(settings.get(kind), dict)]
    if settings.get("init") is not None and not {"vae", "clip"} & set(kinds):
        network = read_start(settings["init"]).network
        return "dit" if isinstance(network, DiTConfig) else "unet", network
    if kinds == ["dit", "unet"]:  # the script trains the DiT then, and has keys of both
        kinds = ["dit"]
    if len(kinds) != 1:
        raise ValueError(
            "the configuration must have one of unet, dit, vae and clip with the network's keys, "
            "or init; a training script with --print_config writes all"
        )
    kind = kinds[0]
    values = settings[kind]
    missing = [key for key in REQUIRED[kind] if key not in values]
    if missing:
        raise ValueError(
            f"{kind}.{missing[0]} is missing; a training script with --print_config writes all"
        )
    known = [field.name for field in fields(NETWORKS[kind])]
    for key in values:
        if key not in known:
            raise ValueError(f"{kind}.{key} is unknown; {kind} has {', '.join(known)}")
    return kind, NETWORKS[kind](**values)


def lora_config(settings: Mapping[str, Any]) -> LoRAConfig | None:
    """The LoRA that is trained, or None; ValueError for one that cannot be and unknown keys."""
    values = settings.get("lora")
    if values is None:
        return None
    known = [field.name for field in fields(LoRAConfig)]
    for key in values:
        if key not in known:
            raise ValueError(f"lora.{key} is unknown; lora has {', '.join(known)}")
    if (weights := values.get("weights")) is not None:
        raise ValueError(
            f"lora.weights={weights} must be left out for a plan, with its rank as lora.rank"
        )
    if settings.get("init") is None:
        raise ValueError("lora has no effect with init=null; leave it out, or name the model")
    kind, _ = network_config(settings)
    if kind != "unet":
        raise ValueError(
            f"lora must be null: init={settings['init']} has a {kind}, and LoRAs are of a UNet"
        )
    return LoRAConfig(**values)
