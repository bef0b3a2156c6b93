"""The options of one call of the pipeline, checked as far as is possible without a model."""

import math
import random
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from numbers import Real
from typing import Any, Self

import torch
from PIL import Image

from latentdiff.diffusion import Diffusion
from latentdiff.formats.header import short_repr
from latentdiff.guidance import Guidance
from latentdiff.images import to_mask, to_rgb
from latentdiff.levels import LevelSpacing
from latentdiff.noise import each_generator
from latentdiff.request_values import (
    MOST_IMAGES,
    check_mask,
    check_texts,
    for_each_image,
    in_pixels,
    whole,
    yes_or_no,
)
from latentdiff.samplers import SAMPLERS, find_sampler
from latentdiff.samplers.names import our_names

MOST = {
    "steps": 1_000_000,
    "num_images": MOST_IMAGES,
    "cache_interval": 1000,
    "height": 65_536,
    "width": 65_536,
}
WITH_GUIDANCE = tuple(f"guidance_{f.name}" for f in fields(Guidance) if f.name != "scale")
OTHER_NAMES = {"num_inference_steps": "steps", "num_images_per_prompt": "num_images"}
MOST_PIXELS = 64_000_000


@dataclass(frozen=True)
class Request:
    """A request for `num_images` images of each prompt.

    The same seed gives the same image on the same device, alone or among others: an image's
    first noise is `torch.randn((1, C, H, W), generator=torch.Generator().manual_seed(seed))`, and
    the noise that a sampler adds on the way comes from the same generator. On the CPU that holds
    bit for bit; on an accelerator, whose kernels change with the batch, up to rounding.

    Raises ValueError, naming the field, for anything that cannot be drawn.
    """

    prompt: str | Sequence[str]
    """Plain text of any length, which the text encoder reads in chunks."""
    _: KW_ONLY
    steps: int = 50
    """The number of denoising steps, >= 1."""
    num_inference_steps: int | None = None
    """diffusers' name for `steps`."""
    guidance_scale: float = 7.5
    """The weight of classifier-free guidance, >= 0; 1 is off and halves the time."""
    guidance_rescale: float = 0.0
    """This field and the next four are the other fields of `latentdiff.guidance.Guidance`."""
    guidance_interval: Sequence[float] | None = None
    guidance_eta: float = 1.0
    guidance_norm_threshold: float | None = None
    guidance_momentum: float = 0.0
    negative_prompt: str | Sequence[str] = ""
    """The prompt to stay away from: one for all prompts, or one for each."""
    prompt_weighting: bool = False
    """Whether "(word:1.2)" weighs a word; otherwise brackets are brackets."""
    height: int | None = None
    """Pixels, as is width; by default those of `image`, or of the images of training."""
    width: int | None = None
    seed: int | Sequence[int] | None = None
    """A seed for each image, or the first of consecutive ones; None draws random seeds."""
    num_images: int = 1
    num_images_per_prompt: int | None = None
    """diffusers' name for `num_images`."""
    generator: torch.Generator | Sequence[torch.Generator] | None = field(default=None, repr=False)
    """diffusers' way to give seeds: one for all images, or one for each. What is drawn from it is
    what diffusers draws in that order and dtype, so that it moves on; `seeds` is then empty."""
    sampler: str = "ddim"
    """One of `latentdiff.samplers.SAMPLERS`, by A1111's or ComfyUI's name too, or of diffusers'."""
    level_spacing: LevelSpacing | None = None
    """The spacing of the noise levels; None is that of the model's configuration."""
    image: Image.Image | Sequence[Image.Image] | None = None
    """Image-to-image: the image to start from, one for all prompts or one for each. Of different
    sizes they need `height` and `width`."""
    strength: float | None = None
    """0 … 1: the fraction of `steps` that is taken, from `image` with noise of that level; by
    default 0.8, or 1 with a mask."""
    mask_image: Image.Image | Sequence[Image.Image] | None = None
    """Inpainting: white is redrawn, black is kept; one for all prompts or one for each. A mask has
    the shape of its image, in any size."""
    variation_seed: int | Sequence[int] | None = None
    """As `seed`, for the noise that `variation_strength` goes towards."""
    variation_strength: float = 0.0
    """0 … 1: how far the first noise goes from that of `seed` to that of `variation_seed`. Above 0
    a single `seed` is that of all images: only the variation seeds count up."""
    cache_interval: int = 1
    """Of how many timesteps one is evaluated whole, and the others from its deep features: faster,
    and approximate (`latentdiff.feature_cache`); 1 is off."""
    progress: bool = field(default=True, repr=False)
    """Whether a bar shows the steps."""

    prompts: tuple[str, ...] = field(init=False, repr=False)
    """This field and the next five have an entry for each image, prompt by prompt. The images are
    upright and RGB, the masks grey."""
    negative_prompts: tuple[str, ...] = field(init=False, repr=False)
    seeds: tuple[int, ...] = field(init=False, repr=False)
    variation_seeds: tuple[int, ...] = field(init=False, repr=False)
    images: tuple[Image.Image, ...] = field(init=False, repr=False)
    masks: tuple[Image.Image, ...] = field(init=False, repr=False)
    generators: tuple[torch.Generator, ...] = field(init=False, repr=False)
    """One for each image, if `generator` is given."""

    @classmethod
    def of(cls, diffusion: Diffusion, prompt: str | Sequence[str], **options: Any) -> Self:
        """A request to a model; an option that is not given, or None, has the model's default.

        A student draws in its own steps without guidance, and any other model as by the fields'
        defaults.
        """
        given = {name: value for name, value in options.items() if value is not None}
        steps = diffusion.distilled_steps
        if steps is not None:
            given.setdefault("guidance_scale", 1.0)
            if "num_inference_steps" not in given:
                given.setdefault("steps", steps)
        return cls(prompt, **given)

    def __post_init__(self) -> None:
        for theirs, ours in OTHER_NAMES.items():
            if getattr(self, theirs) is not None:
                self._read_other_name(theirs, ours)
        for name, most in MOST.items():
            value = getattr(self, name)
            if value is not None or name not in ("height", "width"):
                self._set(name, whole(name, value, 1, most))
        for name in ("prompt_weighting", "progress"):
            yes_or_no(name, getattr(self, name))
        if isinstance(self.sampler, str) and self.sampler not in SAMPLERS:
            sampler, spacing = our_names(self.sampler, self.level_spacing, SAMPLERS)
            self._set("sampler", sampler)
            self._set("level_spacing", spacing)
        find_sampler(self.sampler)
        prompts = None  # their number, once they are read
        for name in ("prompt", "negative_prompt"):
            value = getattr(self, name)
            texts = for_each_image(name, value, str, str, prompts, self.num_images)
            check_texts(name, texts, weighting=self.prompt_weighting)
            self._set(f"{name}s", texts)
            prompts = len(texts) // self.num_images
        for name, plural, read in (("image", "images", to_rgb), ("mask_image", "masks", to_mask)):
            values, value = (), getattr(self, name)
            if value is not None:
                values = for_each_image(name, value, Image.Image, read, prompts, self.num_images)
            self._set(plural, values)
        self._check_image()
        self._check_seeds()
        off = [name for name in WITH_GUIDANCE if getattr(self, name) != getattr(Request, name)]
        off += ["negative_prompt"] if any(self.negative_prompts) else []
        if self.guidance.scale == 1 and off:  # which checks its fields
            warnings.warn(
                f"{', '.join(off)}: without effect, since guidance_scale=1 turns guidance off",
                stacklevel=2,
            )

    def _read_other_name(self, theirs: str, ours: str) -> None:
        """Take what is given by diffusers' name of an option; ValueError if both differ."""
        given, value = getattr(self, theirs), getattr(self, ours)
        if value not in (getattr(Request, ours), given):
            raise ValueError(
                f"{ours}={value!r} and {theirs}={given!r} are two names of one option; give one"
            )
        self._set(ours, given)
        self._set(theirs, None)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen

    def _check_image(self) -> None:
        if self.strength is None:
            self._set("strength", 1.0 if self.masks else 0.8 if self.images else 1.0)
        elif not self.images:
            raise ValueError(f"strength={short_repr(self.strength)} needs an image to start from")
        for name in ("strength", "variation_strength"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 <= float(value) <= 1:
                raise ValueError(f"{name}={short_repr(value)} must be a number from 0 to 1")
            self._set(name, float(value))
        if self.num_denoising_steps < 1:
            raise ValueError(
                f"strength={self.strength} leaves none of steps={self.steps}: it must be at least "
                f"1/{self.steps}, such as {math.ceil(1000 / self.steps) / 1000:g}"
            )
        sizes = sorted({image.size for image in self.images})
        if len(sizes) > 1 and None in (self.height, self.width):
            raise ValueError(
                f"image lists images of {in_pixels(sizes[0])} and of {in_pixels(sizes[1])}, which "
                "are drawn in one size; give height and width"
            )
        if self.masks and not self.images:
            raise ValueError("mask_image needs an image, of which it says what to keep")
        for mask, image in zip(self.masks, self.images, strict=False):  # images may have no masks
            check_mask(mask, image)

    def _check_seeds(self) -> None:
        count, varied = len(self.prompts), self.variation_strength > 0
        if self.generator is not None:
            return self._take_generators(self.generator, count)
        self._set("generators", ())
        if self.variation_seed is not None and not varied:
            raise ValueError(
                f"variation_seed={short_repr(self.variation_seed)} needs a variation_strength "
                "above 0"
            )
        for name, step in (("seed", 0 if varied else 1), ("variation_seed", 1)):
            given = getattr(self, name)
            if given is None:
                given = [random.SystemRandom().randrange(2**32) for _ in range(count)]
            if hasattr(given, "__index__") and getattr(given, "ndim", 0) == 0:
                given = [whole(name, given, 0, 2**64 - 1) + step * i for i in range(count)]
            several = isinstance(given, Iterable) and getattr(given, "ndim", 1) > 0
            listed = given if several else [given]
            seeds = tuple(whole(name, seed, 0, 2**64 - 1) for seed in listed)
            if len(seeds) != count:
                raise ValueError(
                    f"{name} lists {len(seeds)} seeds for {count} images; give one for each"
                )
            self._set(f"{name}s", seeds)

    def _take_generators(self, given: Any, count: int) -> None:
        """Take a generator for each image; ValueError for other than one or one for each."""
        if self.seed is not None or self.variation_seed is not None or self.variation_strength:
            raise ValueError(
                "generator is in place of seed, and has no variation: give seed, variation_seed "
                "and variation_strength, or generator alone"
            )
        self._set("generators", each_generator(given, count))
        self._set("seeds", ())
        self._set("variation_seeds", ())

    @property
    def num_denoising_steps(self) -> int:
        """The number of steps that are taken, the last ones: all unless `strength` is below 1."""
        # 100 * 0.29 is 28.999999999999996, of which diffusers makes 28.
        return math.floor(self.steps * (1 if self.strength is None else self.strength) + 1e-6)

    def latent_size(self, side: int, *, factor: int, multiple: int) -> tuple[int, int]:
        """Height and width of the latents; by default those of the init image, or of `side` pixels.

        `factor` is the VAE's, and latents are divisible by `multiple`, the patch of a DiT. Raises
        ValueError for a height or width that cannot be drawn.
        """
        pixels_each = factor * multiple
        default = self.images[0].size[::-1] if self.images else (side, side)
        size = []
        for field_name, pixels in zip(("height", "width"), default, strict=True):
            requested = getattr(self, field_name)
            if requested is not None and requested % pixels_each:
                patch = "" if multiple == 1 else f" times {multiple}, a patch of the DiT"
                raise ValueError(
                    f"{field_name}={requested} must be divisible by {pixels_each}, the factor of "
                    f"the VAE{patch}"
                )
            if pixels < pixels_each:
                raise ValueError(
                    f"image has a {field_name} of {pixels}; it must be at least {pixels_each} "
                    "pixels"
                )
            kept = pixels // pixels_each * pixels_each if requested is None else requested
            size.append(kept // factor)
        height, width = size
        if height * width * factor**2 > MOST_PIXELS:
            raise ValueError(
                f"height={height * factor} and width={width * factor} are too large; an image has "
                f"at most {MOST_PIXELS:,} pixels"
            )
        return height, width

    @property
    def texts(self) -> list[tuple[str, ...]]:
        """The prompts and, where guided, the negative prompts, of each image."""
        return [self.prompts] if self.guidance_scale == 1 else [self.prompts, self.negative_prompts]

    @property
    def guidance(self) -> Guidance:
        """The guidance that the fields `guidance_…` describe."""
        names = [f.name for f in fields(Guidance)]
        return Guidance(**{name: getattr(self, f"guidance_{name}") for name in names})

    def part(self, start: int, stop: int) -> "Request":
        """The request for images `start` to `stop` alone, each as this one asks for it."""
        each = slice(start, stop)
        with warnings.catch_warnings(action="ignore"):  # this request has said it
            return replace(
                self,
                prompt=self.prompts[each],
                negative_prompt=self.negative_prompts[each],
                seed=self.seeds[each] or None,
                generator=self.generators[each] or None,
                num_images=1,
                image=self.images[each] or None,
                mask_image=self.masks[each] or None,
                strength=self.strength if self.images else None,
                variation_seed=self.variation_seeds[each] if self.variation_strength else None,
            )

    def record(self, i: int) -> dict[str, Any]:
        """Every option of a request for image i alone that is not None, for JSON.

        `Request(**record)`, with the same `image` and `mask_image`, is that request. The record has
        the defaults too, because a later release may choose others.
        """
        if self.generators:
            raise ValueError("generator cannot be recorded, since it moves on; give a seed")
        alone: dict[str, Any] = {
            "prompt": self.prompts[i],
            "negative_prompt": self.negative_prompts[i],
            "seed": self.seeds[i],
            "strength": self.strength if self.images else None,
            "variation_seed": self.variation_seeds[i] if self.variation_strength else None,
        }
        left_out = ("image", "mask_image", "num_images", "progress", "generator")
        names = [f.name for f in fields(self) if f.init and f.name not in left_out]
        values = {name: alone.get(name, getattr(self, name)) for name in names}
        return {name: value for name, value in values.items() if value is not None}
