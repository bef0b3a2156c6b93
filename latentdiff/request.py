"""The options of one call of the pipeline, checked as far as is possible without a model."""

import random
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any

from PIL import Image

from latentdiff.guidance import Guidance
from latentdiff.levels import LevelSpacing
from latentdiff.samplers import find_sampler


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
    sampler: str = "ddim"
    """A name in `latentdiff.samplers.SAMPLERS`, or that of a scheduler class of diffusers."""
    level_spacing: LevelSpacing | None = None
    """The spacing of the noise levels; None is that of the model's configuration."""
    image: Image.Image | Sequence[Image.Image] | None = None
    """Image-to-image: the image to start from, one for all prompts or one for each."""
    strength: float | None = None
    """0 … 1: the fraction of `steps` that is taken, from `image` with noise of that level; by
    default 0.8, or 1 with a mask."""
    mask_image: Image.Image | Sequence[Image.Image] | None = None
    """Inpainting: white is redrawn, black is kept; one for all prompts or one for each."""
    variation_seed: int | Sequence[int] | None = None
    """As `seed`, for the noise that `variation_strength` goes towards."""
    variation_strength: float = 0.0
    """0 … 1: how far the first noise goes from that of `seed` to that of `variation_seed`. Above 0
    a single `seed` is that of all images: only the variation seeds count up."""
    progress: bool = field(default=True, repr=False)
    """Whether a bar shows the steps."""

    prompts: tuple[str, ...] = field(init=False, repr=False)
    """This field and the next five have an entry for each image, prompt by prompt."""
    negative_prompts: tuple[str, ...] = field(init=False, repr=False)
    seeds: tuple[int, ...] = field(init=False, repr=False)
    variation_seeds: tuple[int, ...] = field(init=False, repr=False)
    images: tuple[Image.Image, ...] = field(init=False, repr=False)
    masks: tuple[Image.Image, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.num_inference_steps is not None:
            self._set("steps", self.num_inference_steps)
            self._set("num_inference_steps", None)
        for name in ("steps", "num_images", "height", "width"):
            value = getattr(self, name)
            if value is None and name in ("height", "width"):
                continue
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        find_sampler(self.sampler)
        for name in ("prompt", "negative_prompt"):
            self._set(f"{name}s", self._for_each_image(name, str, "a text"))
        for name, plural in (("image", "images"), ("mask_image", "masks")):
            absent = getattr(self, name) is None
            values = () if absent else self._for_each_image(name, Image.Image, "an image")
            self._set(plural, values)
        self._check_image()
        self._check_seeds()
        _ = self.guidance  # which checks its fields

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen

    def _for_each_image(self, name: str, kind: type, one: str) -> tuple[Any, ...]:
        """The option of each image: it is one for all prompts, or one for each."""
        value = getattr(self, name)
        values = [value] if isinstance(value, str | Image.Image) else list(value)
        if not values:
            raise ValueError(f"{name} is an empty list; give at least {one}")
        for item in values:
            if not isinstance(item, kind):
                raise ValueError(f"{name} holds {item!r}; it must be {one} or a list of them")
        prompts = 1 if isinstance(self.prompt, str) else len(self.prompt)
        if len(values) == 1:
            values *= prompts
        if len(values) != prompts:
            raise ValueError(
                f"{name} lists {len(values)} for {prompts} prompts; give one, or one for each"
            )
        return tuple(value for value in values for _ in range(self.num_images))

    def _check_image(self) -> None:
        if self.strength is None:
            self._set("strength", 1.0 if self.masks else 0.8 if self.images else 1.0)
        elif not self.images:
            raise ValueError(f"strength={self.strength} needs an image to start from")
        if not isinstance(self.strength, int | float) or not 0 <= self.strength <= 1:
            raise ValueError(f"strength={self.strength!r} must be a number from 0 to 1")
        if self.num_denoising_steps < 1:
            raise ValueError(
                f"strength={self.strength} leaves none of steps={self.steps}: it must be at least "
                f"{1 / self.steps:.3g}"
            )
        if self.masks and not self.images:
            raise ValueError("mask_image needs an image, of which it says what to keep")

    def _check_seeds(self) -> None:
        count, varied = len(self.prompts), self.variation_strength
        if not isinstance(varied, int | float) or not 0 <= varied <= 1:
            raise ValueError(f"variation_strength={varied!r} must be a number from 0 to 1")
        if self.variation_seed is not None and not varied:
            raise ValueError(
                f"variation_seed={self.variation_seed} needs a variation_strength above 0"
            )
        same = varied > 0 and isinstance(self.seed, int)
        self._set("seeds", _seeds("seed", [self.seed] * count if same else self.seed, count))
        self._set("variation_seeds", _seeds("variation_seed", self.variation_seed, count))

    @property
    def num_denoising_steps(self) -> int:
        """The number of steps that are taken, the last ones: all unless `strength` is below 1."""
        return int(self.steps * (1 if self.strength is None else self.strength))

    @property
    def guidance(self) -> Guidance:
        """The guidance that the fields `guidance_…` describe."""
        names = [f.name for f in fields(Guidance)]
        return Guidance(**{name: getattr(self, f"guidance_{name}") for name in names})

    def record(self, i: int) -> dict[str, Any]:
        """Every option of a request for image i alone that is not None, for JSON.

        `Request(**record)`, with the same `image` and `mask_image`, is that request. The record has
        the defaults too, because a later release may choose others.
        """
        alone: dict[str, Any] = {
            "prompt": self.prompts[i],
            "negative_prompt": self.negative_prompts[i],
            "seed": self.seeds[i],
            "strength": self.strength if self.images else None,
            "variation_seed": self.variation_seeds[i] if self.variation_strength else None,
        }
        left_out = ("image", "mask_image", "num_images", "progress")
        names = [f.name for f in fields(self) if f.init and f.name not in left_out]
        values = {name: alone.get(name, getattr(self, name)) for name in names}
        return {name: value for name, value in values.items() if value is not None}


def _seeds(name: str, seed: Any, count: int) -> tuple[int, ...]:
    if seed is None:
        return tuple(random.SystemRandom().randrange(2**32) for _ in range(count))
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise ValueError(f"{name} lists {len(seeds)} seeds for {count} images; give one for each")
    for one in seeds:
        if not isinstance(one, int) or not 0 <= one < 2**64:
            raise ValueError(f"{name}={one!r} must be a whole number from 0 to 2**64 - 1")
    return tuple(seeds)
