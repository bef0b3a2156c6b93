"""The tables of training: a step of the UNet, a step of the VAE, images to latents."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image
from speed_tables import Table, Variant
from timing import native
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from latentdiff.data.cache_writer import write_cache
from latentdiff.data.config import DataConfig
from latentdiff.data.opening import open_images
from latentdiff.models.precision import computes_bf16
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.models.vae import VAE
from latentdiff.models.vae_config import VAEConfig
from latentdiff.options import compose
from latentdiff.training.accelerator import ComputeConfig
from latentdiff.training.ema import EMAConfig
from latentdiff.training.learner import Learner
from latentdiff.training.optimizer import OptimizerConfig

TOKENS, WIDTH = 32, 256
"""Of the drawings' text encoder."""
CHANNELS, SIDE = 16, 8
"""Of their latents."""
IMAGES = 256
CONFIGS = Path(__file__).parent.parent / "configs" / "drawings"


def unet_step_table(*, batch_size: int, device: torch.device) -> Table:
    """A step of the drawings' UNet: the flow's squared error, gradients clipped, EMA."""
    options = yaml.safe_load((CONFIGS / "unet.yaml").read_text())["unet"]
    options |= {"in_channels": CHANNELS, "out_channels": CHANNELS, "sample_size": SIDE}
    config = compose(UNetConfig, options | {"cross_attention_dim": WIDTH})
    torch.manual_seed(0)
    batch = (
        torch.randn(batch_size, CHANNELS, SIDE, SIDE, device=device),
        1000 * torch.rand(batch_size, device=device),
        torch.randn(batch_size, TOKENS, WIDTH, device=device),
    )

    def theirs() -> nn.Module:
        return _UNet(UNet2DConditionModel.from_config(config.to_dict()))

    def ours() -> nn.Module:
        return UNet(config)

    return _table(f"UNet, batch {batch_size}", ours, theirs, batch, batch[0], device)


def vae_step_table(*, batch_size: int, device: torch.device) -> Table:
    """A step of the drawings' VAE: squared error of the reconstruction, without LPIPS."""
    options = yaml.safe_load((CONFIGS / "vae.yaml").read_text())["vae"]
    config = compose(VAEConfig, options)
    torch.manual_seed(0)
    images = torch.rand(batch_size, 3, 64, 64, device=device) * 2 - 1

    def theirs() -> nn.Module:
        return _VAE(AutoencoderKL.from_config(config.to_dict()))

    def ours() -> nn.Module:
        return _VAE(VAE(config))

    return _table(f"VAE, batch {batch_size}", ours, theirs, (images,), images, device)


def _table(
    name: str,
    ours: Callable[[], nn.Module],
    theirs: Callable[[], nn.Module],
    inputs: tuple[Tensor, ...],
    target: Tensor,
    device: torch.device,
) -> Table:
    def our(**options: Any) -> Variant:
        return Variant(_our_step(ours().to(device), inputs, target, **options))

    def their(**options: Any) -> Variant:
        return Variant(_their_step(theirs().to(device), inputs, target, **options))

    precision, _ = native(device)
    half = precision != "float32"
    variants = {
        "ours, compiled": our(compiled=True),
        "ours": our(),
        "ours, compiled, Muon": our(compiled=True, optimizer="muon"),
        "diffusers' script": their(),
        f"diffusers, {precision}, compiled, fused": their(bf16=half, best=True),
    }
    if half:
        variants[f"diffusers, {precision}"] = their(bf16=True)
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        ours().to(device)(*inputs).square().mean().backward()
    table = Table(f"training step, {name}", variants, "ours, compiled", images=len(target))
    table.flop = counter.get_total_flops()
    return table


def _our_step(
    network: nn.Module,
    inputs: tuple[Tensor, ...],
    target: Tensor,
    *,
    compiled: bool = False,
    optimizer: Any = "adamw",
) -> Callable[[], None]:
    learner = Learner(
        network,
        Accelerator(
            cpu=target.device.type == "cpu",
            mixed_precision="bf16" if computes_bf16(target.device) else "no",
        ),
        optimizer=OptimizerConfig(optimizer=optimizer),
        max_steps=10_000,
        ema=EMAConfig(),
        compute=ComputeConfig(compile=compiled),
    )

    def step() -> None:
        with torch.enable_grad():
            learner.update((learner.forward_model(*inputs).float() - target).square().mean())

    return step


def _their_step(
    network: nn.Module,
    inputs: tuple[Tensor, ...],
    target: Tensor,
    *,
    bf16: bool = False,
    best: bool = False,
) -> Callable[[], None]:
    """The step of diffusers' train_text_to_image.py 0.42.1, without flags or with what helps.

    What the script does before, encoding images and prompts in every step, is not counted.
    """
    optimizer = torch.optim.AdamW(network.parameters(), fused=True if best else None)
    average = EMAModel(network.parameters(), foreach=best)
    if best:
        network.compile(dynamic=False)

    def step() -> None:
        with torch.enable_grad():
            with torch.autocast(target.device.type, torch.bfloat16, enabled=bf16):
                output = network(*inputs)
            loss = (output.float() - target).square().mean()
            loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(network.parameters())
        loss.item()

    return step


class _UNet(nn.Module):
    """diffusers' UNet, called as ours is."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return self.unet(x, timestep, context, return_dict=False)[0]


class _VAE(nn.Module):
    """An autoencoder of either library, from images to the decoded means of their posteriors."""

    def __init__(self, vae: VAE | AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor) -> Tensor:
        if isinstance(self.vae, VAE):
            return self.vae.decode(self.vae.encode(images).mean)
        return self.vae.decode(self.vae.encode(images).latent_dist.mean).sample


def caching_table(folder: Path, *, device: torch.device) -> Table:
    """A folder of images that are made up to latents on disk; all is written under `folder`."""
    data = folder / "data"
    data.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 128, 128, 3), dtype=np.uint8)
    files = [data / f"{number:04d}.png" for number in range(IMAGES)]
    for file, image in zip(files, pixels, strict=True):
        Image.fromarray(image).save(file)
    rows = [{"file_name": file.name, "text": "noise"} for file in files]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = compose(VAEConfig, yaml.safe_load((CONFIGS / "vae.yaml").read_text())["vae"])
    torch.manual_seed(0)
    vae = VAE(config).to(device).eval()
    diffusers_vae = AutoencoderKL.from_config(config.to_dict()).to(device).eval()
    diffusers_vae.load_state_dict(vae.state_dict())

    def ours() -> None:
        cache = Path(tempfile.mkdtemp(dir=folder))
        dataset = open_images(DataConfig(data=str(data), image_size=64))
        write_cache(cache, dataset, vae, batch_size=64)

    def theirs() -> None:
        """As its scripts prepare an image, in batches, with the moments kept."""
        moments: list[np.ndarray] = []
        transform = transforms.Compose(
            [
                transforms.Resize(64),
                transforms.CenterCrop(64),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )
        for start in range(0, IMAGES, 64):
            opened = [Image.open(file).convert("RGB") for file in files[start : start + 64]]
            batch = torch.stack([transform(image) for image in opened]).to(device)
            moments.append(diffusers_vae.encode(batch).latent_dist.parameters.cpu().numpy())
        np.save(folder / "theirs.npy", np.concatenate(moments))

    variants = {"ours": Variant(ours), "diffusers": Variant(theirs)}
    return Table("a folder of images to latents on disk", variants, "ours", images=IMAGES)
