"""From prompts to images: text encoder, denoiser, VAE and noise schedule composed.

Read on in samplers/ (the steps), diffusion.py (the mathematics) and models/ (the networks).
Shapes: B images, C latent channels, H/W latent size, f the VAE's factor, L tokens, D width.
"""

import functools
import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from latentdiff.diffusion import Diffusion
from latentdiff.editing import Given, with_channels
from latentdiff.formats.diffusers import (
    check_pipeline_folder,
    find_model,
    load_scheduler_config,
    save_model_index,
    save_scheduler_config,
)
from latentdiff.formats.lora import check_without_loras
from latentdiff.formats.single_file import read_single_file, write_single_file
from latentdiff.guidance import guided_denoiser
from latentdiff.images import from_pil, mask_from_pil, to_pil
from latentdiff.levels import Denoise, NoiseLevel, NoiseLevels
from latentdiff.models.dit import DiT
from latentdiff.models.fingerprint import fingerprint
from latentdiff.models.lora import LoRAs
from latentdiff.models.single_file import networks, single_file
from latentdiff.models.text import TextEncoder
from latentdiff.models.unet import UNet
from latentdiff.models.vae import VAE
from latentdiff.noise import ImageNoise, slerp
from latentdiff.request import Request, asks
from latentdiff.samplers import find_sampler


@dataclass(frozen=True)
class PipelineOutput:
    """The images of one call and the seed of each: prompt by prompt, `num_images` of each."""

    images: list[Image.Image]
    seeds: list[int]


class Pipeline:
    """A text-to-image model: `Pipeline.from_pretrained("emoji")("red heart").images[0]`."""

    def __init__(
        self, *, unet: UNet | DiT, vae: VAE, text_encoder: TextEncoder, diffusion: Diffusion
    ) -> None:
        self.unet = unet
        """The denoiser, which may be a DiT; it and not the UNet is meant wherever we say UNet."""
        self.vae = vae
        self.text_encoder = text_encoder
        self.diffusion = diffusion
        self.loras = LoRAs(unet, text_encoder.model)
        """LoRAs on the UNet and the text encoder: `pipe.loras.load("style.safetensors")`."""
        channels, text = vae.config.latent_channels, text_encoder.width
        if unet.config.in_channels not in (channels, 2 * channels + 1):
            raise ValueError(
                f"in_channels={unet.config.in_channels} of the UNet must be {channels}, the VAE's "
                f"latent_channels, or {2 * channels + 1}, with mask and masked image"
            )
        times, variance = (2, "learned") if diffusion.learned_variance else (1, "not learned")
        if unet.config.out_channels != times * channels:
            raise ValueError(
                f"out_channels={unet.config.out_channels} of the UNet must be {times * channels}: "
                f"the VAE has latent_channels={channels}, and the scheduler says that the variance "
                f"is {variance}"
            )
        if unet.config.cross_attention_dim != text:
            raise ValueError(
                f"cross_attention_dim={unet.config.cross_attention_dim} of the UNet must be "
                f"{text}, the width of the text encoder"
            )

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        variant: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
    ) -> Self:
        """Load "emoji" (embedded), a diffusers folder, a single file, or from the Hugging Face Hub.

        A single file is one .safetensors file of A1111's and ComfyUI's kind: see
        `from_single_file`, which has more options. `revision` is the branch, tag or commit of a hub
        id; `variant`, such as "fp16", chooses among a folder's weights. Weights of any precision
        become `dtype`; without `device` they stay on the CPU.
        Raises ValueError if there is no such model, or says what it lacks.
        """
        if Path(name).is_file():
            return cls.from_single_file(name, dtype=dtype, device=device)
        folder = find_model(name, revision=revision, variant=variant)
        variants = check_pipeline_folder(folder, variant=variant)
        network, part = (UNet, "unet") if "unet" in variants else (DiT, "transformer")
        pipeline = cls(
            unet=network.from_pretrained(folder / part, variant=variants[part], dtype=dtype),
            vae=VAE.from_pretrained(folder / "vae", variant=variants["vae"], dtype=dtype),
            text_encoder=TextEncoder.from_pretrained(
                folder, variant=variants["text_encoder"], dtype=dtype
            ),
            diffusion=Diffusion.from_scheduler_config(load_scheduler_config(folder)),
        )
        return pipeline if device is None else pipeline.to(device)

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        *,
        config: str | Path | None = None,
        tokenizer: str | Path | None = None,
        ema: bool = False,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
    ) -> Self:
        """Load one .safetensors file with LDM's names, as A1111 and ComfyUI have them.

        `config` (an LDM YAML file or a diffusers folder) says what does not show in the tensors;
        without it our own metadata does, or else the conventions of SD 1.x and 2.x, with a warning
        where they leave a doubt. `tokenizer` is a folder or hub id; by default the one in the file,
        or CLIP's own from the hub. `ema` takes the running averages that some files hold besides.
        Raises ValueError for a file that is anything else, saying what it seems to be.
        """
        file = read_single_file(path, config=config, ema=ema, dtype=dtype)
        unet, vae, text_encoder = networks(file, tokenizer=tokenizer)
        pipeline = cls(
            unet=unet,
            vae=vae,
            text_encoder=text_encoder,
            diffusion=Diffusion.from_scheduler_config(file.scheduler_config),
        )
        return pipeline if device is None else pipeline.to(device)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write a plain diffusers pipeline folder; `dtype` is what weights are converted to.

        A DiT is in `transformer/`, and such a folder is for latentdiff alone. model_index.json
        comes last: a folder that has one is whole.
        """
        self._check_whole()
        folder = Path(folder)
        part = "unet" if isinstance(self.unet, UNet) else "transformer"
        self.unet.save_pretrained(folder / part, dtype=dtype)
        self.vae.save_pretrained(folder / "vae", dtype=dtype)
        self.text_encoder.save_pretrained(folder, dtype=dtype)
        scheduler = self.diffusion.to_scheduler_config()
        save_scheduler_config(scheduler, folder)
        save_model_index(folder, scheduler_class=scheduler["_class_name"], denoiser=part)

    def save_single_file(self, path: str | Path, *, dtype: torch.dtype | None = None) -> list[str]:
        """Write one .safetensors file with LDM's names; returns sentences on which tools open it.

        Where tools cannot guess the shape, the matching LDM description (.yaml) lies beside it.
        """
        self._check_whole()
        scheduler = self.diffusion.to_scheduler_config()
        file = single_file(self.unet, self.vae, self.text_encoder, scheduler)
        return write_single_file(file, path, dtype=dtype)

    def _check_whole(self) -> None:
        for network in (self.unet, self.text_encoder):
            check_without_loras(network)

    def to(self, target: str | torch.device | torch.dtype) -> Self:
        """Move the three networks to a device, or convert them to a dtype, in place."""
        for network in (self.unet, self.vae, self.text_encoder):
            network.to(target)
        return self

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The UNet's dtype."""
        return next(self.unet.parameters()).dtype

    @property
    def inpaints(self) -> bool:
        """Whether the UNet sees the mask and the masked image beside the noisy latents."""
        return self.unet.config.in_channels != self.vae.config.latent_channels

    def fingerprint(self) -> str:
        """SHA-256 of the three networks and the noise schedule: the same in any precision."""
        parts = [
            fingerprint(self.unet, self.unet.config.to_dict()),
            fingerprint(self.vae, self.vae.config.to_dict()),
            fingerprint(self.text_encoder.model, {}),
            json.dumps(self.diffusion.to_scheduler_config(), sort_keys=True),
        ]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    @asks(Request)
    def __call__(self, request: Request) -> PipelineOutput:
        """Draw the images that the arguments, those of `Request`, ask for."""
        return self.draw(request)

    def draw(self, request: Request) -> PipelineOutput:
        """Draw what a request asks for: its images, and the seed of each."""
        noise = self._noise(request)
        given = self._given(request, noise)
        levels = self._levels(request)
        previews = self._sample(request, levels, noise, given)
        steps = tqdm(previews, total=len(levels), disable=not request.progress)
        latents = deque(steps, maxlen=1).pop()
        return PipelineOutput(self.decode(latents, given), list(request.seeds))

    @asks(Request)
    def stream(self, request: Request) -> Iterator[list[Image.Image]]:
        """Draw as `pipe(...)` does, giving at each step the images as the UNet now sees them.

        The last item holds the finished images. Each preview costs a decode by the VAE, which at
        SD 1.5's size is more than the step itself: the whole takes two to three times as long.
        """
        noise = self._noise(request)
        given = self._given(request, noise)
        previews = self._sample(request, self._levels(request), noise, given)
        return (self.decode(latents, given) for latents in previews)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, chunks: int = 1, weighting: bool = False) -> Tensor:
        """Text states of the prompts, (B, L, D); each alone, so that neighbours change nothing.

        Prompts longer than the text encoder reads at once need more `chunks`, each of which makes
        L longer; `weighting` is the request's `prompt_weighting`.
        """
        encode = self.text_encoder.encode
        states = {p: encode(p, chunks=chunks, weighting=weighting) for p in dict.fromkeys(prompts)}
        return torch.cat([states[prompt] for prompt in prompts])

    @torch.no_grad()
    def decode(self, latents: Tensor, given: Given | None = None) -> list[Image.Image]:
        """Images of latents (B, C, H, W); one after the other, which also keeps memory small.

        What is to be kept of a given image is taken from it. Raises ValueError for latents that
        are not finite.
        """
        dtype = next(self.vae.parameters()).dtype
        images = torch.cat([self.vae.decode(z).float() for z in latents.to(dtype).split(1)])
        if given is not None:
            images = given.paste(images)
        return [to_pil(image) for image in images]

    def _noise(self, request: Request) -> ImageNoise:
        size = (self.vae.config.latent_channels, *self._latent_size(request))
        # Half-precision networks too are sampled in float32: the steps' sums are cheap, and their
        # rounding errors add up.
        dtype = torch.promote_types(self.dtype, torch.float32)
        return ImageNoise(request.seeds, size, device=self.device, dtype=dtype)

    def _latent_size(self, request: Request) -> tuple[int, int]:
        """Height and width of the latents."""
        f, multiple = self.vae.config.factor, self.vae.config.factor * self.unet.multiple
        trained = self.unet.config.sample_size
        side = self.vae.config.sample_size // f if trained is None else trained
        size = request.images[0].size[::-1] if request.images else (side * f, side * f)
        asked = {"height": request.height, "width": request.width}
        for (field, pixels), own in zip(asked.items(), size, strict=True):
            if pixels is not None and pixels % multiple:
                patch = "" if multiple == f else f" times {self.unet.multiple}, a patch of the DiT"
                why = f"the factor of the VAE{patch}"
                raise ValueError(f"{field}={pixels} must be divisible by {multiple}, {why}")
            if own < multiple:
                raise ValueError(
                    f"image has a {field} of {own}; it must be at least {multiple} pixels"
                )
        height, width = (
            own // multiple * multiple if pixels is None else pixels
            for pixels, own in zip(asked.values(), size, strict=True)
        )
        return height // f, width // f

    def _given(self, request: Request, noise: ImageNoise) -> Given | None:
        """The request's images and masks, at the size of the latents times the VAE's factor."""
        if self.inpaints and not request.masks:
            raise ValueError("this model is for inpainting: it needs an image and a mask_image")
        if not request.images:
            return None
        f = self.vae.config.factor
        size = (noise.size[1] * f, noise.size[2] * f)
        images = torch.stack([from_pil(image, size) for image in request.images])
        masks = [mask_from_pil(mask, size) for mask in request.masks]
        return Given(
            images.to(noise.device, noise.dtype),
            torch.stack(masks).to(noise.device, noise.dtype) if masks else None,
        )

    def _levels(self, request: Request) -> NoiseLevels:
        sampler = find_sampler(request.sampler)
        levels = sampler.levels(self.diffusion, request.steps, spacing=request.level_spacing)
        return levels.last(request.walked_steps)

    @torch.no_grad()
    def _sample(
        self, request: Request, levels: NoiseLevels, noise: ImageNoise, given: Given | None
    ) -> Iterator[Tensor]:
        """Latents (B, C, H, W): the estimate of x0 at each step, and last the sample."""
        # The order in which noise is drawn is diffusers', so that its seeds draw its images.
        latents = channels = None
        masked = given is not None and given.masks is not None
        from_noise = given is None or (masked and request.strength == 1)
        if given is not None and not (from_noise and self.inpaints):
            latents = given.latents(self.vae, noise)
        x = eps = self._first_noise(request, noise)
        if given is not None and self.inpaints:
            channels = given.channels(self.vae, noise)
        if latents is not None and not from_noise:
            x = levels.alpha[0] * latents + levels.sigma[0] * eps
        sampler = find_sampler(request.sampler, learned_variance=self.diffusion.learned_variance)
        denoise = self._denoiser(request, channels, with_v=sampler.takes_v)
        if given is not None and latents is not None and masked and not self.inpaints:
            noise_only = levels.sigma[0] if from_noise else None
            denoise = given.keep(denoise, latents, eps, noise_only=noise_only)
        return sampler(denoise, x, levels, noise=noise)

    def _first_noise(self, request: Request, noise: ImageNoise) -> Tensor:
        eps = noise()
        if not request.variation_strength:
            return eps
        other = ImageNoise(
            request.variation_seeds, noise.size, device=noise.device, dtype=noise.dtype
        )
        return slerp(eps, other(), request.variation_strength)

    def _contexts(self, request: Request) -> list[tuple[Tensor, Tensor | None]]:
        """Text states (1, L, D) of each image's prompt and negative prompt, of equal length."""
        guided = request.guidance_scale != 1
        weighting = request.prompt_weighting

        @functools.cache
        def encode(prompt: str, chunks: int) -> Tensor:
            return self.encode([prompt], chunks=chunks, weighting=weighting)

        contexts = []
        for texts in zip(request.prompts, request.negative_prompts, strict=True):
            texts = texts if guided else texts[:1]
            count = self.text_encoder.count_chunks
            chunks = max(count(text, weighting=weighting) for text in texts)
            context, *null = (encode(text, chunks) for text in texts)
            contexts.append((context, null[0] if null else None))
        return contexts

    def _denoiser(self, request: Request, channels: Tensor | None, *, with_v: bool) -> Denoise:
        """The guided network for all images, those with equally long texts in one call.

        But on the CPU for each alone: matrix products add up in an order that depends on the batch,
        and fifty steps make that visible; so "same seed, same image" is exact there.
        """
        contexts = self._contexts(request)
        groups: dict[int, list[int]] = {}
        for i, (context, _) in enumerate(contexts):
            groups.setdefault(i if self.device.type == "cpu" else context.shape[1], []).append(i)
        parts: list[tuple[list[int], Denoise]] = []
        for rows in groups.values():
            context = torch.cat([contexts[i][0] for i in rows])
            null = [states for i in rows if (states := contexts[i][1]) is not None]
            null_context = torch.cat(null) if null else None
            network = self._network
            if channels is not None:
                network = with_channels(network, channels[rows])
            part = guided_denoiser(
                self.diffusion, network, context, null_context, request.guidance, with_v=with_v
            )
            parts.append((rows, part))
        if len(parts) == 1:
            return parts[0][1]

        def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
            of_row: dict[int, Tensor] = {}
            for rows, denoise_rows in parts:
                of_row |= zip(rows, denoise_rows(x[rows], level), strict=True)
            return torch.stack([of_row[row] for row in range(len(x))])

        return denoise

    @torch.no_grad()
    def _network(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return self.unet(x.to(self.dtype), timestep, context).to(x.dtype)
