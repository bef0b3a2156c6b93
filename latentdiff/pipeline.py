"""From prompts to images: text encoder, denoiser, VAE and noise schedule composed.

Start reading at `Pipeline._sample`; it leads to models/text.py, levels.py, noise.py, samplers/,
guidance.py, prepared.py, diffusion.py, models/unet.py and models/vae.py. Image-to-image and
inpainting are in editing.py, loading and saving in loading.py.
Shapes: B images, C latent channels, H/W latent size, f the VAE's factor, L tokens, D width.
"""

import functools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from latentdiff import loading
from latentdiff.diffusion import Diffusion
from latentdiff.editing import composite, edit
from latentdiff.formats.weights import check_numbers
from latentdiff.guidance import Evaluate, Guidance, guide
from latentdiff.images import to_pil, why_not_finite
from latentdiff.levels import Denoise, LevelSpacing, NoiseLevel
from latentdiff.loading import Components
from latentdiff.models.dit import DiT
from latentdiff.models.lora import LoRAs
from latentdiff.models.precision import Precision, choose_dtype
from latentdiff.models.text import TextEncoder
from latentdiff.models.unet import UNet
from latentdiff.models.vae import VAE
from latentdiff.noise import ImageNoise
from latentdiff.prepared import evaluations
from latentdiff.request import Request
from latentdiff.samplers import find_sampler
from latentdiff.tiles import exact, tiles

MOST_PIXELS = 64_000_000


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
        loading.check_shapes(unet, vae, text_encoder, diffusion)
        self.unet = unet
        """The denoising network. It may be a DiT; this file calls either "the UNet"."""
        self.vae = vae
        self.text_encoder = text_encoder
        self.diffusion = diffusion
        self.loras = LoRAs(unet, text_encoder.model)
        """LoRAs on the UNet and the text encoder: `pipe.loras.load("style.safetensors")`."""
        self.batched = False
        """Whether the CPU, too, denoises all images of a call at once where that changes their
        bits: faster, and what a seed draws then depends, by rounding, on the images beside it."""

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        steps: int = 50,
        num_inference_steps: int | None = None,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        guidance_interval: Sequence[float] | None = None,
        guidance_eta: float = 1.0,
        guidance_norm_threshold: float | None = None,
        guidance_momentum: float = 0.0,
        negative_prompt: str | Sequence[str] = "",
        prompt_weighting: bool = False,
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] | None = None,
        num_images: int = 1,
        sampler: str = "ddim",
        level_spacing: LevelSpacing | None = None,
        image: Image.Image | Sequence[Image.Image] | None = None,
        strength: float | None = None,
        mask_image: Image.Image | Sequence[Image.Image] | None = None,
        variation_seed: int | Sequence[int] | None = None,
        variation_strength: float = 0.0,
        progress: bool = True,
    ) -> PipelineOutput:
        """Draw `num_images` images of each prompt; the options are the fields of `Request`."""
        request = Request(
            prompt,
            steps=steps,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
            guidance_eta=guidance_eta,
            guidance_norm_threshold=guidance_norm_threshold,
            guidance_momentum=guidance_momentum,
            negative_prompt=negative_prompt,
            prompt_weighting=prompt_weighting,
            height=height,
            width=width,
            seed=seed,
            num_images=num_images,
            sampler=sampler,
            level_spacing=level_spacing,
            image=image,
            strength=strength,
            mask_image=mask_image,
            variation_seed=variation_seed,
            variation_strength=variation_strength,
            progress=progress,
        )
        return self.draw(request)

    def draw(self, request: Request) -> PipelineOutput:
        """Draw the images of a request."""
        steps = self._sample(request)
        bar = tqdm(steps, total=request.num_denoising_steps, disable=not request.progress)
        latents = deque(bar, maxlen=1).pop()
        return PipelineOutput(self.decode(latents, request), list(request.seeds))

    def stream(self, prompt: str | Sequence[str], **options: Any) -> Iterator[list[Image.Image]]:
        """Draw as `pipe(...)` does, with its options, and yield the estimated images of each step.

        The last item holds the finished images. Each preview costs a decode by the VAE, which at
        SD 1.5's size is more than the step itself: the run takes two to three times as long.
        """
        request = Request(prompt, **options)
        return (self.decode(latents, request) for latents in self._sample(request))

    @torch.no_grad()
    def _sample(self, request: Request) -> Iterator[Tensor]:
        """The latents (B, C, H, W) of each step: estimates of x0, and last the sample."""
        contexts = self._contexts(request)
        sampler = find_sampler(request.sampler, learned_variance=self.diffusion.learned_variance)
        levels = sampler.levels(self.diffusion, request.steps, spacing=request.level_spacing)
        noise = self._noise(request)
        timesteps = levels.network_timesteps()
        denoise = self._denoiser(contexts, request.guidance, timesteps, with_v=sampler.takes_v)
        if request.images or self.inpaints:
            levels = levels.last(request.num_denoising_steps)
            x, denoise = edit(
                request, denoise, levels[0], noise, vae=self.vae, inpainting_unet=self.inpaints
            )
        else:
            x = noise.first(request.variation_seeds, request.variation_strength)
        return sampler(denoise, x, levels, noise=noise)

    def _contexts(self, request: Request) -> list[list[Tensor]]:
        """The context (1, L, D) of each image's prompt and, where guided, of its negative prompt.

        Both contexts of an image are equally long: L is one chunk of tokens or several.
        """
        weighting = request.prompt_weighting
        # Equal prompts are encoded once.
        encode = functools.cache(functools.partial(self.text_encoder.encode, weighting=weighting))
        count = functools.partial(self.text_encoder.count_chunks, weighting=weighting)
        texts = [request.prompts]
        if request.guidance_scale != 1:
            texts.append(request.negative_prompts)
        chunks = [max(map(count, of_image)) for of_image in zip(*texts, strict=True)]
        return [[encode(text, chunks=n) for text, n in zip(t, chunks, strict=True)] for t in texts]

    def _denoiser(
        self,
        contexts: list[list[Tensor]],
        guidance: Guidance,
        timesteps: Sequence[float],
        *,
        with_v: bool,
    ) -> Denoise:
        """The guided network for all images, those with equally long contexts in one batch.

        On the CPU, unless `batched` is set, such a batch is cut into tiles, in which each image has
        the bits that it has alone: so "same seed, same image" is exact there.
        """
        batches: dict[int, list[int]] = {}
        for i, context in enumerate(contexts[0]):
            batches.setdefault(context.shape[1], []).append(i)
        of_rows = [tuple(rows) for rows in batches.values()]

        @functools.cache
        def pair(rows: tuple[int, ...]) -> tuple[Evaluate, Evaluate]:
            context, *null = (torch.cat([states[i] for i in rows]) for states in contexts)
            return evaluations(self.unet, context, *null, timesteps=timesteps, dtype=self.dtype)

        if self.device.type == "cpu" and not self.batched and len(contexts[0]) > 1:
            of_rows = [tile for rows in of_rows for tile in tiles(rows)]
            one, two = (lambda rows: pair(rows)[0]), (lambda rows: pair(rows)[1])
            pairs = [(exact(one, rows), exact(two, rows)) for rows in of_rows]
        else:
            pairs = [pair(rows) for rows in of_rows]
        denoisers = [guide(self.diffusion, *p, guidance, with_v=with_v) for p in pairs]
        if len(denoisers) == 1:
            return denoisers[0]

        def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
            x0: dict[int, Tensor] = {}
            for rows, denoise_rows in zip(of_rows, denoisers, strict=True):
                x0 |= zip(rows, denoise_rows(x[list(rows)], level), strict=True)
            return torch.stack([x0[i] for i in range(len(x))])

        return denoise

    def _noise(self, request: Request) -> ImageNoise:
        size = (self.vae.config.latent_channels, *self._latent_size(request))
        # Half-precision networks are sampled in float32 too: the sums of the steps are cheap, and
        # their rounding errors add up.
        dtype = torch.promote_types(self.dtype, torch.float32)
        return ImageNoise(request.seeds, size, device=self.device, dtype=dtype)

    def _latent_size(self, request: Request) -> tuple[int, int]:
        """Height and width of the latents; by default those of the init image or of training."""
        f, multiple = self.vae.config.factor, self.vae.config.factor * self.unet.multiple
        default = request.images[0].size[::-1] if request.images else (self.side, self.side)
        size = []
        for field, pixels in zip(("height", "width"), default, strict=True):
            requested = getattr(request, field)
            if requested is not None and requested % multiple:
                patch = "" if multiple == f else f" times {self.unet.multiple}, a patch of the DiT"
                why = f"the factor of the VAE{patch}"
                raise ValueError(f"{field}={requested} must be divisible by {multiple}, {why}")
            if pixels < multiple:
                raise ValueError(
                    f"image has a {field} of {pixels}; it must be at least {multiple} pixels"
                )
            size.append((pixels // multiple * multiple if requested is None else requested) // f)
        if size[0] * size[1] * f**2 > MOST_PIXELS:
            raise ValueError(
                f"height={size[0] * f} and width={size[1] * f} are too large; an image has at most "
                f"{MOST_PIXELS:,} pixels"
            )
        return size[0], size[1]

    @torch.no_grad()
    def encode(
        self, prompts: str | Sequence[str], *, chunks: int = 1, weighting: bool = False
    ) -> Tensor:
        """Text states of the prompts, (B, L, D), each encoded alone: its bits fit any batch.

        Prompts longer than the text encoder reads at once need more `chunks`, each of which makes
        L longer; `weighting` is the request's `prompt_weighting`.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        encode = self.text_encoder.encode
        states = {p: encode(p, chunks=chunks, weighting=weighting) for p in dict.fromkeys(prompts)}
        return torch.cat([states[prompt] for prompt in prompts])

    @torch.no_grad()
    def decode(self, latents: Tensor, request: Request | None = None) -> list[Image.Image]:
        """Images of latents (B, C, H, W), decoded one by one, which also needs less memory.

        Pixels that a mask of the request keeps are those of its init image. Raises ValueError for
        latents that are not finite.
        """
        dtype = next(self.vae.parameters()).dtype
        images = torch.cat([self.vae.decode(z).float() for z in latents.to(dtype).split(1)])
        if not images.isfinite().all():
            scale = 1.0 if request is None else request.guidance_scale
            raise ValueError(why_not_finite(latents, scale, dtypes={dtype, self.dtype}))
        if request is not None and request.masks:
            images = composite(images, request)
        return [to_pil(image) for image in images]

    def to(self, target: str | torch.device | torch.dtype) -> Self:
        """Move the three networks to a device, or convert them to a dtype, in place.

        Raises ValueError for weights that are too large for the dtype; nothing has changed then.
        """
        networks = (self.unet, self.vae, self.text_encoder)
        if isinstance(target, torch.dtype):
            for network in networks:
                for name, tensor in network.state_dict().items():
                    check_numbers(name, tensor, target)
        for network in networks:
            network.to(target)
        return self

    @property
    def device(self) -> torch.device:
        """The device of the UNet."""
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the UNet."""
        return next(self.unet.parameters()).dtype

    @property
    def inpaints(self) -> bool:
        """Whether the UNet sees the mask and the masked image beside the noisy latents."""
        return self.unet.config.in_channels != self.vae.config.latent_channels

    @property
    def side(self) -> int:
        """The side in pixels of the images that it was trained on, and draws by default."""
        trained, config = self.unet.config.sample_size, self.vae.config
        return config.sample_size if trained is None else trained * config.factor

    @property
    def components(self) -> Components:
        """The networks and the diffusion process, in the order of `loading.Components`."""
        return Components(self.unet, self.vae, self.text_encoder, self.diffusion)

    def fingerprint(self) -> str:
        """SHA-256 of the three networks and the noise schedule: the same in any precision."""
        return loading.components_fingerprint(self.components)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        variant: str | None = None,
        dtype: Precision = torch.float32,
        device: str | torch.device | None = None,
    ) -> Self:
        """Load "emoji" (embedded), a diffusers folder, a single file, or from the Hugging Face Hub.

        A single file is one .safetensors file of A1111's and ComfyUI's kind: see
        `from_single_file`, which has more options. `revision` is the branch, tag or commit of a hub
        id; `variant`, such as "fp16", chooses among a folder's weights. Weights of any precision
        become `dtype`, which with "auto" is bfloat16 where the device computes in it and float32
        elsewhere, or stay as they are with None; without `device` they stay on the CPU. Raises
        ValueError if there is no such model or something in it is missing, and for an option
        that such a model does not have.
        """
        if Path(name).is_file():
            for option, value in (("revision", revision), ("variant", variant)):
                if value is not None:
                    raise ValueError(f"{option}={value!r} is not of a single file, which {name} is")
            return cls.from_single_file(name, dtype=dtype, device=device)
        dtype = choose_dtype(dtype, device)
        components = loading.load_folder(name, revision=revision, variant=variant, dtype=dtype)
        pipeline = cls(**components._asdict())
        return pipeline if device is None else pipeline.to(device)

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        *,
        config: str | Path | None = None,
        tokenizer: str | Path | None = None,
        ema: bool = False,
        dtype: Precision = torch.float32,
        device: str | torch.device | None = None,
    ) -> Self:
        """Load one .safetensors file with LDM's names, as A1111 and ComfyUI use them.

        `config` (an LDM YAML file or a diffusers folder) describes what the tensors do not show.
        Without it the file's latentdiff metadata does, or a YAML file of the same name beside it,
        or the conventions of SD 1.x and 2.x, with a warning where these are ambiguous. `tokenizer`
        is a folder or hub id; the default is the one in the file, or CLIP's from the hub. `ema`
        loads the running averages that some files hold as well. Raises ValueError for any other
        file, saying what it seems to be.
        """
        dtype = choose_dtype(dtype, device)
        components = loading.load_single_file(
            path, config=config, tokenizer=tokenizer, ema=ema, dtype=dtype
        )
        pipeline = cls(**components._asdict())
        return pipeline if device is None else pipeline.to(device)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write a plain diffusers pipeline folder; `dtype` is what weights are converted to.

        A DiT is in `transformer/`, and such a folder is for latentdiff alone. model_index.json
        comes last: a folder that has one is complete. Raises ValueError, before anything is
        written, for weights that are not finite or too large for `dtype`.
        """
        loading.save_folder(self.components, folder, dtype=dtype)

    def save_single_file(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> list[str]:
        """Write one .safetensors file with LDM's names; returns sentences on which tools open it.

        Where tools cannot infer the model, its LDM config (.yaml) is written beside it. `metadata`
        is what the header shall say besides, such as author and licence. Raises ValueError, before
        anything is written, for weights that are not finite or too large for `dtype`.
        """
        return loading.save_single_file(self.components, path, dtype=dtype, metadata=metadata)
