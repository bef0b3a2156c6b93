"""`latentdiff env`: versions and devices, for a bug report."""

import argparse
import os
import platform
from importlib import metadata

import latentdiff

PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "safetensors",
    "huggingface_hub",
    "pillow",
    "accelerate",
    "datasets",
    "diffusers",
    "open_clip_torch",
    "peft",
)


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser("env", help="versions and devices, for a bug report")
    parser.set_defaults(run=_env, parser=parser)


def _env(arguments: argparse.Namespace) -> None:
    import torch

    print(f"latentdiff {latentdiff.__version__}")
    print(f"Python {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        try:
            print(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"{package} is not installed")
    print(f"CPU: {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        print("accelerator: none")
        return
    for index in range(torch.accelerator.device_count()):
        name = torch.get_device_module(accelerator).get_device_name(index)
        print(f"accelerator: {accelerator.type}:{index}, {name}")
