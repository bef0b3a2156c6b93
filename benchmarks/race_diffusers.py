"""Trains by the recipe of diffusers' `train_text_to_image.py`, for as long as is said.

Loop, loss, optimizer and average are that script's (diffusers 0.42.1, examples/text_to_image), with
the flags that help: `--use_ema --mixed_precision bf16 --snr_gamma 5`. Its modules begin as ours do,
at random and in the same shape; VAE, text encoder, images and captions are the same. Images and
prompts are encoded in every step, as there; `--cached` gives it latents that were encoded before,
which the script cannot do. Captions are never dropped there, so that drawing without guidance (a
scale of 1) must be tried too. OUT is a pipeline folder, which `latentdiff eval judge` draws with.

    python benchmarks/race_diffusers.py --config configs/drawings/unet.yaml \\
        --data configs/drawings/cache.yaml --out runs/race/diffusers --seconds 1800
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import EMAModel, compute_snr
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from latentdiff.data.config import DataConfig
from latentdiff.data.dataset import CaptionedImages
from latentdiff.formats.diffusers import find_component
from latentdiff.images import to_floats
from latentdiff.models.unet import UNetConfig
from latentdiff.options import compose

SNR_GAMMA, MAX_GRAD_NORM = 5.0, 1.0


def main() -> None:
    arguments = parse()
    torch.manual_seed(arguments.seed)
    random.seed(arguments.seed)
    options = yaml.safe_load(arguments.config.read_text())
    vae = AutoencoderKL.from_pretrained(find_component(options["vae"], "vae"))
    text = find_component(options["text_encoder"], "text_encoder")
    encoder = CLIPTextModel.from_pretrained(text)
    tokenizer = CLIPTokenizer.from_pretrained(text.parent / "tokenizer")
    vae.requires_grad_(False)
    encoder.requires_grad_(False)
    unet = new_unet(options["unet"], vae, encoder)
    scheduler = DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        steps_offset=1,
    )
    steps = train(arguments, arguments.batch_size, unet, vae, encoder, tokenizer, scheduler)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,  # pyright: ignore[reportArgumentType]
        safety_checker=None,  # pyright: ignore[reportArgumentType] # which may be left out
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    ).save_pretrained(arguments.out)
    (arguments.out / "race.json").write_text(
        json.dumps({"steps": steps} | vars(arguments), default=str)
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--config", type=Path, required=True, help="of train_unet.py")
    parser.add_argument("--data", type=Path, required=True, help="of cache_latents.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--cached", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def new_unet(options: dict[str, Any], vae: Any, encoder: Any) -> UNet2DConditionModel:
    """diffusers' UNet of the shape that `train_unet.py` would train."""
    side = vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1)
    channels = vae.config.latent_channels
    sizes = {"sample_size": side, "in_channels": channels, "out_channels": channels}
    width = {"cross_attention_dim": encoder.config.hidden_size}
    config = compose(UNetConfig, options | sizes | width)
    return UNet2DConditionModel.from_config(config.to_dict())  # pyright: ignore[reportReturnType]


def train(
    arguments: argparse.Namespace,
    batch_size: int,
    unet: Any,
    vae: Any,
    encoder: Any,
    tokenizer: Any,
    scheduler: Any,
) -> int:
    """Train for `--seconds`, put the averages into `unet` and return the number of steps."""
    rows = CaptionedImages(compose(DataConfig, data_options(arguments.data)))
    images = torch.stack([rows.image(i) for i in range(len(rows))])
    captions = [rows.captions[i] for i in range(len(rows))]
    moments = encoded(vae, images) if arguments.cached else None
    ema = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config)
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=arguments.learning_rate, weight_decay=1e-2, eps=1e-8
    )
    order: list[int] = []
    steps, start = 0, time.perf_counter()
    progress = tqdm(total=round(arguments.seconds), unit="s")
    while (seconds := time.perf_counter() - start) < arguments.seconds:
        progress.update(round(seconds) - progress.n)
        if len(order) < batch_size:
            order = torch.randperm(len(rows)).tolist()
        batch, order = order[:batch_size], order[batch_size:]
        prompts = [random.choice(captions[i]) for i in batch]
        ids = tokenizer(
            prompts, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                if moments is None:
                    latents = vae.encode(to_floats(images[batch])).latent_dist.sample()
                else:
                    mean, logvar = moments[batch].chunk(2, dim=1)
                    latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
                latents = latents.float() * vae.config.scaling_factor
                context = encoder(ids, return_dict=False)[0]
            loss = denoising_loss(unet, scheduler, latents, context)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        steps += 1
    progress.close()
    ema.copy_to(unet.parameters())
    return steps


def data_options(path: Path) -> dict[str, Any]:
    """The options of a DataConfig in the configuration of `cache_latents.py`."""
    options = yaml.safe_load(path.read_text())
    return {name: options[name] for name in options if hasattr(DataConfig(), name)}


@torch.no_grad()
def encoded(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """The posterior's moments (N, 2C, H, W) of images (N, 3, S, S) uint8."""
    return torch.cat(
        [vae.encode(to_floats(part)).latent_dist.parameters for part in images.split(64)]
    )


def denoising_loss(
    unet: Any, scheduler: Any, latents: torch.Tensor, context: torch.Tensor
) -> torch.Tensor:
    """The error of the noise, weighed by min(SNR, gamma) / SNR, as in the script."""
    noise = torch.randn_like(latents)
    t = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),))
    noisy = scheduler.add_noise(latents, noise, t)
    prediction = unet(noisy, t, context, return_dict=False)[0]
    snr = compute_snr(scheduler, t)
    weights = snr.clamp(max=SNR_GAMMA) / snr
    error = F.mse_loss(prediction.float(), noise, reduction="none")
    return (error.mean(dim=(1, 2, 3)) * weights).mean()


if __name__ == "__main__":
    main()
