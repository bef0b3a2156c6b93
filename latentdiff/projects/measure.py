"""Measures what a project's steps take on this machine, by taking a few of them on noise."""

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from tqdm.auto import tqdm

from latentdiff.models.vae import VAE
from latentdiff.planning.workload import make_workload
from latentdiff.tasks.clip.config import TrainCLIP
from latentdiff.tasks.denoiser.config import TrainUNet
from latentdiff.tasks.vae.config import TrainVAE
from latentdiff.training.accelerator import make_accelerator
from latentdiff.training.command_line import parse_config
from latentdiff.training.learner import Learner

NUM_STEPS = 3  # the first of which makes what the others find made
CONFIGS: Mapping[str, type[Any]] = {"vae": TrainVAE, "clip": TrainCLIP, "unet": TrainUNet}
ENCODED = 16  # images of the batch by which encoding is measured


def measure(project: Path, num_images: int) -> dict[str, float]:
    """Seconds that each module takes from start to end, without reading images and saving.

    The networks have the configured shapes and random weights; they are trained as in a run, by
    its optimizer, in its precision and batch size, but not compiled. Raises ValueError for
    configurations that a script would refuse.
    """
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        places = {"vae": f"{folder}/vae", "text_encoder": f"{folder}/clip"}
        image_size = 0
        for module, make in tqdm(CONFIGS.items(), desc="measuring steps", unit="network"):
            config, text = parse_config(make, ["--config", str(project / f"{module}.yaml")])
            settings: dict[str, Any] = yaml.safe_load(text)
            if module == "unet":
                settings |= {**places, "image_size": image_size}
            network, step = _step_time(config, settings)
            seconds[module] = step * config.loop.max_steps
            if isinstance(network, VAE):
                image_size = settings["image_size"]
                _write(Path(places["vae"]) / "config.json", network.config.to_dict())
                seconds["cache"] = _encoding_time(network, image_size) * num_images
            elif module == "clip":
                towers: Any = network.config
                path = Path(places["text_encoder"]) / "text_encoder" / "config.json"
                _write(path, towers.text_config.to_dict())
    return seconds


def _step_time(config: Any, settings: Mapping[str, Any]) -> tuple[nn.Module, float]:
    """A module's network and the seconds of one of its steps."""
    accelerator = make_accelerator(config.compute, config.parallel)
    workload = make_workload(
        settings,
        gpu=accelerator.device.type != "cpu",
        precision=str(accelerator.mixed_precision),
    )
    with torch.device(accelerator.device):
        learner = Learner(
            workload.model(),
            accelerator,
            optimizer=config.optimizer,
            max_steps=config.loop.max_steps,
            ema=config.ema,
        )
        frozen = list(workload.frozen())
        times = []
        for _ in range(NUM_STEPS):
            begun = time.perf_counter()
            loss = workload.loss(learner.forward_model, frozen, config.loop.batch_size)
            learner.update(loss).item()  # waits for the device
            times.append(time.perf_counter() - begun)
    return learner.model, min(times[1:])


@torch.no_grad()
def _encoding_time(vae: VAE, image_size: int) -> float:
    """Seconds in which an image is encoded."""
    images = torch.rand(ENCODED, 3, image_size, image_size, device=next(vae.parameters()).device)
    times = []
    for _ in range(2):
        begun = time.perf_counter()
        vae.encode(images).mean.sum().item()
        times.append(time.perf_counter() - begun)
    return times[1] / ENCODED


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(values))
