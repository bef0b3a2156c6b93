"""From prompts to pictures: text encoder, UNet, VAE and noise schedule composed.

Read on in samplers.py (the steps), diffusion.py (the mathematics) and models/ (the networks).
Shapes: B pictures, C latent channels, H/W latent size, f the VAE's factor, L tokens, D width.
"""

import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from latentdiff.diffusion import Denoise, Diffusion, NoiseLevel, NoiseLevels
from latentdiff.formats.diffusers import (
    check_pipeline_folder,
    find_model,
    load_scheduler_config,
    save_model_index,
    save_scheduler_config,
)
from latentdiff.models.text import TextEncoder
from latentdiff.models.unet import UNet
from latentdiff.models.vae import VAE
from latentdiff.pictures import to_pil
from latentdiff.samplers import Sampler, find_sampler


@dataclass(frozen=True)
class PipelineOutput:
    """The pictures of one call and the seed of each: prompt by prompt, `num_images` of each."""

    images: list[Image.Image]
    seeds: list[int]


@dataclass(frozen=True)
class Request:
    """What one call asks for, checked: an entry per picture."""

    prompts: list[str]
    negative_prompts: list[str]
    seeds: list[int]
    steps: int
    guidance_scale: float
    latent_size: tuple[int, int]
    sampler: Sampler


class Pipeline:
    """A text-to-image model: `Pipeline.from_pretrained("emoji")("red heart").images[0]`."""

    def __init__(
        self, *, unet: UNet, vae: VAE, text_encoder: TextEncoder, diffusion: Diffusion
    ) -> None:
        self.unet = unet
        self.vae = vae
        self.text_encoder = text_encoder
        self.diffusion = diffusion

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
    ) -> Self:
        """Load "emoji" (embedded), a diffusers pipeline folder, or one from the Hugging Face Hub.

        `revision` is the branch, tag or commit of a hub id. Weights of any precision become
        `dtype`; without `device` they stay on the CPU.
        Raises ValueError if there is no such model, or says what its folder lacks.
        """
        folder = find_model(name, revision=revision)
        check_pipeline_folder(folder)
        pipeline = cls(
            unet=UNet.from_pretrained(folder / "unet"),
            vae=VAE.from_pretrained(folder / "vae"),
            text_encoder=TextEncoder.from_pretrained(folder),
            diffusion=Diffusion.from_scheduler_config(load_scheduler_config(folder)),
        )
        return pipeline.to(dtype) if device is None else pipeline.to(dtype).to(device)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write a plain diffusers pipeline folder; `dtype` is what weights are converted to.

        model_index.json comes last: a folder that has one is whole.
        """
        folder = Path(folder)
        self.unet.save_pretrained(folder / "unet", dtype=dtype)
        self.vae.save_pretrained(folder / "vae", dtype=dtype)
        self.text_encoder.save_pretrained(folder, dtype=dtype)
        scheduler = self.diffusion.to_scheduler_config()
        save_scheduler_config(scheduler, folder)
        save_model_index(folder, scheduler_class=scheduler["_class_name"])

    def to(self, target: str | torch.device | torch.dtype) -> Self:
        """Move the three networks to a device, or convert them to a dtype, in place."""
        for network in (self.unet, self.vae, self.text_encoder):
            network.to(target)
        return self

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The UNet's dtype."""
        return self.unet.conv_in.weight.dtype

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        steps: int = 50,
        num_inference_steps: int | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] | None = None,
        num_images: int = 1,
        sampler: str = "ddim",
        progress: bool = True,
    ) -> PipelineOutput:
        """Draw `num_images` pictures of each prompt.

        The same seed gives the same picture on the same device, alone or among others: a picture's
        first noise is `torch.randn((1, C, H, W), generator=torch.Generator().manual_seed(seed))`,
        and the noise that a sampler adds on the way comes from the same generator. On the CPU that
        holds bit for bit; on an accelerator, whose kernels change with the batch, up to rounding.

        steps: noise levels walked through, >= 1; `num_inference_steps` is another word for it.
        guidance_scale: how far from the negative prompt, >= 0; 1 is off and halves the time.
        negative_prompt: one for all prompts, or one for each.
        height, width: in pixels; by default the size that the UNet was trained on.
        seed: one for each picture; one number counts up from there; None draws fresh ones.
        sampler: a name in `latentdiff.samplers.SAMPLERS`.
        Raises ValueError, naming the field, for anything that cannot be drawn.
        """
        request = self._check(
            prompt,
            steps=steps if num_inference_steps is None else num_inference_steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            seed=seed,
            num_images=num_images,
            sampler=sampler,
        )
        context = self.encode(request.prompts)
        null_context = self.encode(request.negative_prompts)
        levels = self._levels(request)
        noise = self._noise(request)
        previews = self._sample(request, context, null_context, levels, noise)
        latents = deque(tqdm(previews, total=request.steps, disable=not progress), maxlen=1).pop()
        return PipelineOutput(self.decode(latents), request.seeds)

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        steps: int = 50,
        num_inference_steps: int | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] | None = None,
        num_images: int = 1,
        sampler: str = "ddim",
    ) -> Iterator[list[Image.Image]]:
        """Draw as `pipe(...)` does, giving at each step the pictures as the UNet now sees them.

        The last item holds the finished pictures. Each preview costs a decode by the VAE, which at
        SD 1.5's size is more than the step itself: the whole takes two to three times as long.
        """
        request = self._check(
            prompt,
            steps=steps if num_inference_steps is None else num_inference_steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            seed=seed,
            num_images=num_images,
            sampler=sampler,
        )
        return self._decoded_steps(request)

    def _decoded_steps(self, request: Request) -> Iterator[list[Image.Image]]:
        context = self.encode(request.prompts)
        null_context = self.encode(request.negative_prompts)
        levels = self._levels(request)
        noise = self._noise(request)
        for latents in self._sample(request, context, null_context, levels, noise):
            yield self.decode(latents)

    def _check(
        self,
        prompt: str | Sequence[str],
        *,
        steps: int,
        guidance_scale: float,
        negative_prompt: str | Sequence[str],
        height: int | None,
        width: int | None,
        seed: int | Sequence[int] | None,
        num_images: int,
        sampler: str,
    ) -> Request:
        _at_least_one("steps", steps)
        _at_least_one("num_images", num_images)
        if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
            raise ValueError(f"guidance_scale={guidance_scale} must be a finite number >= 0")
        prompts = _prompts("prompt", prompt)
        negative = _prompts("negative_prompt", negative_prompt)
        if len(negative) == 1:
            negative = negative * len(prompts)
        if len(negative) != len(prompts):
            raise ValueError(
                f"negative_prompt lists {len(negative)} texts for {len(prompts)} prompts; "
                "give one, or one for each"
            )
        return Request(
            prompts=[text for text in prompts for _ in range(num_images)],
            negative_prompts=[text for text in negative for _ in range(num_images)],
            seeds=_seeds(seed, len(prompts) * num_images),
            steps=steps,
            guidance_scale=guidance_scale,
            latent_size=(self._side("height", height), self._side("width", width)),
            sampler=find_sampler(sampler),
        )

    def _side(self, field: str, pixels: int | None) -> int:
        """Side of the latents for a picture of so many pixels."""
        f = self.vae.config.factor
        if pixels is None:
            side = self.unet.config.sample_size
            return self.vae.config.sample_size // f if side is None else side
        _at_least_one(field, pixels)
        if pixels % f:
            raise ValueError(f"{field}={pixels} must be divisible by {f}, the factor of the VAE")
        return pixels // f

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Text states of the prompts, (B, L, D); each alone, so that neighbours change nothing."""
        states = {prompt: self.text_encoder([prompt]) for prompt in dict.fromkeys(prompts)}
        return torch.cat([states[prompt] for prompt in prompts])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of latents (B, C, H, W); one after the other, which also keeps memory small.

        Raises ValueError for latents that are not finite.
        """
        dtype = next(self.vae.parameters()).dtype
        pictures = [self.vae.decode(z).float() for z in latents.to(dtype).split(1)]
        return [to_pil(picture[0]) for picture in pictures]

    def _levels(self, request: Request) -> NoiseLevels:
        return request.sampler.levels(self.diffusion, request.steps, device=self.device)

    def _noise(self, request: Request) -> "PictureNoise":
        size = (self.unet.config.in_channels, *request.latent_size)
        # Half-precision networks too are sampled in float32: the steps' sums are cheap, and their
        # rounding errors add up.
        dtype = torch.promote_types(self.dtype, torch.float32)
        return PictureNoise(request.seeds, size, device=self.device, dtype=dtype)

    def _sample(
        self,
        request: Request,
        context: Tensor,
        null_context: Tensor,
        levels: NoiseLevels,
        noise: "PictureNoise",
    ) -> Iterator[Tensor]:
        """Latents (B, C, H, W): the estimate of x0 at each step, and last the sample."""
        denoise = self._denoiser(context, null_context, request.guidance_scale)
        return request.sampler(denoise, noise(), levels, noise=noise)

    def _denoiser(self, context: Tensor, null_context: Tensor, guidance_scale: float) -> Denoise:
        @torch.no_grad()
        def network(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
            return self.unet(x.to(self.dtype), timestep, context).to(x.dtype)

        if self.device.type != "cpu":
            return self.diffusion.denoiser(network, context, null_context, guidance_scale)
        # Matrix products add up in an order that depends on the batch, and fifty steps make that
        # visible. One picture at a time on the CPU keeps "same seed, same picture" exact.
        alone = [
            self.diffusion.denoiser(network, *contexts, guidance_scale)
            for contexts in zip(context.split(1), null_context.split(1), strict=True)
        ]

        def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
            pictures = zip(alone, x.split(1), strict=True)
            return torch.cat([denoise_one(x_i, level) for denoise_one, x_i in pictures])

        return denoise


class PictureNoise:
    """Fresh N(0, I) of shape (B, C, H, W) at each call, a generator a picture, drawn on the CPU."""

    def __init__(
        self,
        seeds: Sequence[int],
        size: tuple[int, int, int],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.size = size
        self.device = device
        self.dtype = dtype

    def __call__(self) -> Tensor:
        """The next noise of every picture, (B, C, H, W)."""
        noise = torch.cat([torch.randn((1, *self.size), generator=g) for g in self.generators])
        return noise.to(device=self.device, dtype=self.dtype)


def _prompts(field: str, value: str | Sequence[str]) -> list[str]:
    prompts = [value] if isinstance(value, str) else list(value)
    if not prompts:
        raise ValueError(f"{field} is an empty list; give at least one text")
    for text in prompts:
        if not isinstance(text, str):
            raise ValueError(f"{field} holds {text!r}; it must be a text or a list of texts")
    return prompts


def _seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    if seed is None:
        return [random.SystemRandom().randrange(2**32) for _ in range(count)]
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise ValueError(f"seed lists {len(seeds)} seeds for {count} pictures; give one for each")
    for one in seeds:
        if not isinstance(one, int) or not 0 <= one < 2**64:
            raise ValueError(f"seed={one!r} must be a whole number from 0 to 2**64 - 1")
    return seeds


def _at_least_one(field: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{field}={value!r} must be a whole number of at least 1")
