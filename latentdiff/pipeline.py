"""From prompts to images: text encoder, denoiser, VAE and noise schedule composed.

Start reading at `Pipeline._sample`; it leads to models/text.py, levels.py, noise.py, samplers/,
guidance.py, prepared.py, diffusion.py, models/unet.py and models/vae.py. Image-to-image and
inpainting are in editing.py, loading and saving in loading.py.
Shapes: B images, C latent channels, H/W latent size, f the VAE's factor, L tokens, D width.
"""

import functools
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Never, Self

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from latentdiff import loading
from latentdiff.diffusion import Diffusion
from latentdiff.editing import composite, edit
from latentdiff.engines.choice import check_engine
from latentdiff.engines.openvino import OpenVINO
from latentdiff.formats.option_names import refuse_unknown
from latentdiff.formats.weights import check_numbers
from latentdiff.images import to_pil, why_not_finite
from latentdiff.levels import LevelSpacing
from latentdiff.loading import Components
from latentdiff.models.dit import DiT
from latentdiff.models.lora import LoRAs
from latentdiff.models.precision import Precision
from latentdiff.models.text import TextEncoder
from latentdiff.models.unet import UNet
from latentdiff.models.vae import VAE
from latentdiff.noise import ImageNoise
from latentdiff.prepared import Batching, denoiser_of_all
from latentdiff.request import Request
from latentdiff.samplers import find_sampler

COMMON = ("dtype", "device", "engine")  # what every way of loading takes
OPTIONS = [field.name for field in fields(Request) if field.init]


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
        self.openvino: OpenVINO | None = None
        """What computes the networks in torch's place, if they were loaded for it."""

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        steps: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
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
        sampler: str | None = None,
        level_spacing: LevelSpacing | None = None,
        image: Image.Image | Sequence[Image.Image] | None = None,
        strength: float | None = None,
        mask_image: Image.Image | Sequence[Image.Image] | None = None,
        variation_seed: int | Sequence[int] | None = None,
        variation_strength: float = 0.0,
        progress: bool = True,
        **unknown: Never,
    ) -> PipelineOutput:
        """Draw `num_images` images of each prompt.

        steps, num_inference_steps: denoising steps; more are finer and slower.
        guidance_scale: how closely to follow the prompt; 1 is off and halves the time.
        guidance_rescale, guidance_interval: less contrast; (low, high) of sigma / alpha.
        guidance_eta, guidance_norm_threshold, guidance_momentum: projected guidance.
        negative_prompt: what to stay away from; one for all prompts, or one for each.
        prompt_weighting: whether "(word:1.2)" weighs a word.
        height, width: in pixels; by default those of `image`, or of the images of training.
        num_images, seed: of each prompt; of the first image, the others count up, or of each.
        sampler, level_spacing: how a step is taken, and where; see `latentdiff.samplers`.
        image, strength, mask_image: to draw over; 0 … 1, how much of it to give up; white is drawn.
        variation_seed, variation_strength: another noise, and 0 … 1, how far towards it.
        progress: whether a bar shows the steps.

        None is the default of `Request`, or of a student. Raises ValueError as `Request` does,
        which says more of each, and TypeError for another option, with ours that does what
        diffusers' does.
        """
        if unknown:
            refuse_unknown(unknown, OPTIONS)
        options = {name: value for name, value in locals().items() if name in OPTIONS}
        return self.draw(Request.of(self.diffusion, **options))

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
        refuse_unknown(options, OPTIONS)
        request = Request.of(self.diffusion, prompt, **options)
        return (self.decode(latents, request) for latents in self._sample(request))

    @torch.no_grad()
    def _sample(self, request: Request) -> Iterator[Tensor]:
        """The latents (B, C, H, W) of each step: estimates of x0, and last the sample."""
        if self.diffusion.distilled_steps is not None and request.guidance_scale != 1:
            warnings.warn(
                f"guidance_scale={request.guidance_scale:g}: the model is a student, whose images "
                "are guided already, and this guides them further, at twice the cost; 1 does not",
                stacklevel=3,
            )
        contexts = self._contexts(request)
        sampler = find_sampler(request.sampler, learned_variance=self.diffusion.learned_variance)
        levels = sampler.levels(self.diffusion, request.steps, spacing=request.level_spacing)
        noise = self._noise(request)
        denoise = denoiser_of_all(
            self.diffusion,
            self.unet,
            contexts,
            request.guidance,
            timesteps=levels.network_timesteps(),
            dtype=self.dtype,
            batching=self._batching,
            with_v=sampler.takes_v,
        )
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

    @property
    def _batching(self) -> Batching:
        if self.device.type != "cpu" or self.batched:
            return "all"
        return "alone" if self.openvino is not None else "exact"

    def _noise(self, request: Request) -> ImageNoise:
        config, multiple = self.vae.config, self.unet.multiple
        height, width = request.latent_size(self.side, factor=config.factor, multiple=multiple)
        size = (config.latent_channels, height, width)
        # Half-precision networks are sampled in float32 too: the sums of the steps are cheap, and
        # their rounding errors add up.
        dtype = torch.promote_types(self.dtype, torch.float32)
        return ImageNoise(request.seeds, size, device=self.device, dtype=dtype)

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

        Raises ValueError for weights that are too large for the dtype, and for what OpenVINO does
        not compute in or on; nothing has changed then.
        """
        if self.openvino is not None:
            self.openvino.check_target(target)
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
    def engine(self) -> str:
        """What computes the networks: "torch" or "openvino"."""
        return "torch" if self.openvino is None else "openvino"

    @property
    def precision(self) -> torch.dtype:
        """The dtype that the UNet is computed in: `dtype`, or OpenVINO's."""
        return self.dtype if self.openvino is None else self.openvino.dtype

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
        engine: str = "torch",
        **unknown: Never,
    ) -> Self:
        """Load "emoji" (embedded), a diffusers folder, a single file, or from the Hugging Face Hub.

        A single file is one .safetensors file of A1111's and ComfyUI's kind: see
        `from_single_file`, which has more options. `revision` is the branch, tag or commit of a hub
        id; `variant`, such as "fp16", chooses among a folder's weights. Weights of any precision
        become `dtype`, which with "auto" is bfloat16 where the device computes in it and float32
        elsewhere, or stay as they are with None; without `device` they stay on the CPU. `engine`
        "openvino" computes on a CPU in torch's place, in `dtype` (docs/generate.md). Raises
        ValueError if there is no such model or something in it is missing, and for an option that
        such a model or engine does not have.
        """
        refuse_unknown(unknown, ("revision", "variant", *COMMON), loading=True)
        if Path(name).is_file():
            for option, value in (("revision", revision), ("variant", variant)):
                if value is not None:
                    raise ValueError(f"{option}={value!r} is not of a single file, which {name} is")
            return cls.from_single_file(name, dtype=dtype, device=device, engine=engine)
        weights, computed = check_engine(engine, dtype=dtype, device=device)
        components = loading.load_folder(name, revision=revision, variant=variant, dtype=weights)
        return cls(**components._asdict())._on(device, computed, name)

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
        engine: str = "torch",
        **unknown: Never,
    ) -> Self:
        """Load one .safetensors file with LDM's names, as A1111 and ComfyUI use them.

        `config` (an LDM YAML file or a diffusers folder) describes what the tensors do not show.
        Without it the file's latentdiff metadata does, or a YAML file of the same name beside it,
        or the conventions of SD 1.x and 2.x, with a warning where these are ambiguous. `tokenizer`
        is a folder or hub id; the default is the one in the file, or CLIP's own. `ema`
        loads the running averages that some files hold as well. `dtype`, `device` and `engine` are
        those of `from_pretrained`. Raises ValueError for any other file, saying what it seems to
        be.
        """
        refuse_unknown(unknown, ("config", "tokenizer", "ema", *COMMON), loading=True)
        weights, computed = check_engine(engine, dtype=dtype, device=device)
        components = loading.load_single_file(
            path, config=config, tokenizer=tokenizer, ema=ema, dtype=weights
        )
        return cls(**components._asdict())._on(device, computed, path)

    def _on(
        self, device: str | torch.device | None, computed: torch.dtype | None, model: str | Path
    ) -> Self:
        """Go to a device, or to OpenVINO if that computes in a dtype; the model is at `model`."""
        if computed is not None:
            networks = (self.unet, self.vae, self.text_encoder)
            self.openvino = OpenVINO(*networks, self.loras, dtype=computed, model=model)
        return self if device is None else self.to(device)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write a plain diffusers pipeline folder; `dtype` is what weights are converted to.

        A DiT is in `transformer/`, and such a folder is for latentdiff alone. model_index.json
        comes last: a folder that has one is complete. Raises ValueError, before anything is
        written, for weights that are not finite or too large for `dtype`.
        """
        loading.save_folder(self.components, folder, dtype=dtype)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face Hub; returns its address.

        Raises ValueError, saying why, where the hub cannot be reached or refuses.
        """
        return loading.push(self.components, repo_id, private=private, token=token)

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
