"""From prompts to images: text encoder, denoiser, VAE and noise schedule composed.

Start reading at `Pipeline.sample`; it leads to models/text.py, levels.py, noise.py, samplers/,
guidance.py, prepared.py, diffusion.py, models/unet.py and models/vae.py. Image-to-image and
inpainting are in editing.py, loading and saving in diffusion_model.py.
Shapes: B images, C latent channels, H/W latent size, f the VAE's factor, L tokens, D width.
"""

import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, Never, Self

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from latentdiff import output
from latentdiff.diffusion_model import DiffusionModel
from latentdiff.editing import composite, edit
from latentdiff.engines.compiled import Compiled
from latentdiff.formats.option_names import refuse_unknown
from latentdiff.images import to_pil, why_not_finite
from latentdiff.levels import LevelSpacing
from latentdiff.noise import ImageNoise
from latentdiff.output import OutputType, PipelineOutput, StepEnd
from latentdiff.prepared import Batching, denoiser_of_all
from latentdiff.request import Request
from latentdiff.samplers import find_sampler

PLAIN = "pil", None, ("latents",)
OPTIONS = [field.name for field in fields(Request) if field.init]


class Pipeline(DiffusionModel):
    """A text-to-image model that draws: `Pipeline.from_pretrained("emoji")("a cat").images[0]`."""

    batched = False
    """Whether the CPU, too, denoises all images of a call at once where that changes their bits:
    faster, and what a seed draws then depends, by rounding, on the images beside it."""
    _interrupt = False  # what a callback may set: see `latentdiff.output.StepEnd`

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
        num_images_per_prompt: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        sampler: str | None = None,
        level_spacing: LevelSpacing | None = None,
        image: Image.Image | Sequence[Image.Image] | None = None,
        strength: float | None = None,
        mask_image: Image.Image | Sequence[Image.Image] | None = None,
        variation_seed: int | Sequence[int] | None = None,
        variation_strength: float = 0.0,
        cache_interval: int = 1,
        progress: bool = True,
        output_type: OutputType = "pil",
        callback_on_step_end: StepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **unknown: Never,
    ) -> PipelineOutput:
        """Draw `num_images` images of each prompt.

        steps, cache_interval: more are finer and slower; above 1 only each so many-th is whole.
        guidance_scale: how closely to follow the prompt; 1 is off and halves the time.
        guidance_rescale, guidance_interval: less contrast; (low, high) of sigma / alpha.
        guidance_eta, guidance_norm_threshold, guidance_momentum: projected guidance.
        negative_prompt, prompt_weighting: to stay away from; whether "(word:1.2)" weighs a word.
        height, width: in pixels; by default those of `image`, or of the images of training.
        num_images, seed: of each prompt; of the first image, the others count up, or of each.
        sampler, level_spacing: how a step is taken, and where; see `latentdiff.samplers`.
        image, strength, mask_image: to draw over; 0 … 1, how much of it to give up; white is drawn.
        variation_seed, variation_strength: another noise, and 0 … 1, how far towards it.
        progress, output_type: a bar of the steps; "pil", "np" or "pt" (0 … 1), or "latent".
        num_inference_steps, num_images_per_prompt, generator: diffusers' steps, num_images, seed.
        callback_on_step_end, callback_on_step_end_tensor_inputs: see `latentdiff.output.StepEnd`.

        None is `Request`'s default or a student's. Raises ValueError as it, TypeError for others.
        """
        if unknown:
            refuse_unknown(unknown, OPTIONS)
        options = {name: value for name, value in locals().items() if name in OPTIONS}
        request = Request.of(self.diffusion, **options)
        asked = output_type, callback_on_step_end, callback_on_step_end_tensor_inputs
        if asked != PLAIN:
            output.check_output(*asked)
        return self.draw(request, output_type=output_type, callback=callback_on_step_end)

    def draw(
        self, request: Request, *, output_type: OutputType = "pil", callback: StepEnd | None = None
    ) -> PipelineOutput:
        """Draw the images of a request; the other options are those of a call."""
        steps = self.sample(request)
        steps = steps if callback is None else output.told(steps, callback, self, request)
        off: Any = {} if request.progress else {"disable": True}  # or as TQDM_DISABLE says
        latents = deque(tqdm(steps, total=request.num_denoising_steps, **off), maxlen=1).pop()
        images: Any = latents if output_type == "latent" else self._decoded(latents, request)
        pil = output_type == "pil"
        images = [*map(to_pil, images)] if pil else output.as_array(images, output_type)
        return PipelineOutput(images, list(request.seeds))

    def stream(self, prompt: str | Sequence[str], **options: Any) -> Iterator[list[Image.Image]]:
        """Draw as `pipe(...)` does, with its options, and yield the estimated images of each step.

        The last item holds the finished images. Each preview costs a decode: at SD 1.5's size the
        run takes two to three times as long.
        """
        refuse_unknown(options, OPTIONS)
        request = Request.of(self.diffusion, prompt, **options)
        return (self.decode(latents, request) for latents in self.sample(request))

    @torch.no_grad()
    def sample(self, request: Request) -> Iterator[Tensor]:
        """The latents (B, C, H, W) of each step, for `decode`: estimates of x0, last the sample."""
        if self.diffusion.distilled_steps is not None and request.guidance_scale != 1:
            warnings.warn(
                f"guidance_scale={request.guidance_scale:g}: the model is a student, whose images "
                "are guided already, and this guides them further, at twice the cost; 1 does not",
                stacklevel=3,
            )
        weighting = request.prompt_weighting
        contexts = self.text_encoder.encode_together(*request.texts, weighting=weighting)
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
            batching=self.batching,
            cache_interval=request.cache_interval,
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

    @property
    def batching(self) -> Batching:
        """Which images are denoised at once: on a CPU those that this changes no bit of."""
        if self.device.type != "cpu" or self.batched:
            return "all"
        return "alone" if self.openvino is not None else "exact"

    def _noise(self, request: Request) -> ImageNoise:
        config, multiple = self.vae.config, self.unet.multiple
        height, width = request.latent_size(self.side, factor=config.factor, multiple=multiple)
        size = (config.latent_channels, height, width)
        # Half-precision networks too: the sums of the steps are cheap, their rounding adds up.
        dtype = torch.promote_types(self.dtype, torch.float32)
        seeds = request.generators or request.seeds
        return ImageNoise(seeds, size, device=self.device, dtype=dtype, theirs=self.dtype)

    @torch.no_grad()
    def encode(
        self, prompts: str | Sequence[str], *, chunks: int = 1, weighting: bool = False
    ) -> Tensor:
        """Text states of the prompts, (B, L, D), each encoded alone: its bits fit any batch.

        Long prompts need more `chunks`, which make L longer; `weighting` is `prompt_weighting`.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        encode = self.text_encoder.encode
        states = {p: encode(p, chunks=chunks, weighting=weighting) for p in dict.fromkeys(prompts)}
        return torch.cat([states[prompt] for prompt in prompts])

    def decode(self, latents: Tensor, request: Request | None = None) -> list[Image.Image]:
        """Images of latents (B, C, H, W), decoded one by one, which also needs less memory.

        Pixels that a mask of the request keeps are those of its init image. Raises ValueError for
        latents that are not finite.
        """
        return [to_pil(image) for image in self._decoded(latents, request)]

    @torch.no_grad()
    def _decoded(self, latents: Tensor, request: Request | None) -> Tensor:
        dtype = next(self.vae.parameters()).dtype
        images = torch.cat([self.vae.decode(z).float() for z in latents.to(dtype).split(1)])
        if not images.isfinite().all():
            scale = 1.0 if request is None else request.guidance_scale
            raise ValueError(why_not_finite(latents, scale, dtypes={dtype, self.dtype}))
        if request is not None and request.masks:
            images = composite(images, request)
        return images

    def compile(self, **options: Any) -> Self:
        """Compile the denoiser and the VAE's decoder for drawing: a minute or so, then faster.

        An image of one step is drawn for it by these options of a call: other sizes, numbers of
        images and lengths of prompts are compiled when they first occur, and everything is when
        LoRAs, weights or the dtype change; the code is kept on disk (docs/speed.md). Images stay
        the same within rounding. Raises ValueError with OpenVINO and without a C++ compiler.
        """
        refuse_unknown(options, OPTIONS)
        if self.openvino is not None:
            raise ValueError(
                'compile: OpenVINO has compiled this pipeline; load it by engine="torch"'
            )
        options = {"prompt": "", "steps": 1, "seed": 0, "progress": False} | options
        request = Request.of(self.diffusion, **options)
        if self.compiled is None:
            self.compiled = Compiled(self.unet, self.vae, self.loras)
        with self.compiled.warming():
            self.draw(request)
        return self

    def __repr__(self) -> str:
        return output.described(self)
