"""What a call gives beside PIL images: arrays, tensors and latents, and a word after each step."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from PIL import Image
from torch import Tensor

from latentdiff.formats.header import short_repr
from latentdiff.request import Request
from latentdiff.samplers import find_sampler

OutputType = Literal["pil", "np", "pt", "latent"]
StepEnd = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None]
"""diffusers' `callback_on_step_end`: (pipe, step, timestep, {"latents": latents}) after each step.

`latents` (B, C, H, W) are the estimate of the finished ones, of which `pipe.decode` makes a
preview; diffusers gives the noisy ones. They are to look at: samplers here keep their own, so that
a callback that returns or leaves others ends in ValueError. `pipe._interrupt = True`, as in
diffusers, ends the call with the estimate of this step, and an exception ends it without images.
"""


@dataclass(frozen=True)
class PipelineOutput:
    """The images of one call and the seed of each: prompt by prompt, `num_images` of each.

    `images` are what `output_type` says; their type is that of the default. `seeds` is empty if a
    `generator` was given.
    """

    images: list[Image.Image]
    seeds: list[int]


def check_output(output_type: str, callback: Any, tensors: Sequence[str]) -> None:
    """Raise ValueError for an output type, a callback or its tensors that cannot be."""
    if callback is not None and not callable(callback):
        raise ValueError(
            f"callback_on_step_end={short_repr(callback)} must be a function of (pipe, step, "
            "timestep, callback_kwargs)"
        )
    if output_type not in get_args(OutputType):
        raise ValueError(
            f"output_type={output_type!r} must be one of {', '.join(get_args(OutputType))}"
        )
    if isinstance(tensors, str) or list(tensors) != ["latents"]:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs={short_repr(tensors)} must be ['latents']: the "
            "other tensors of a step are not handed out here"
        )


def as_array(images: Tensor, output_type: OutputType) -> Any:
    """Images (B, 3, H, W) in [-1, 1] as diffusers gives them, from 0 to 1; latents as they are.

    "pt" is a tensor (B, 3, H, W) on its device, "np" a float32 array (B, H, W, 3).
    """
    if output_type == "latent":
        return images
    images = (images / 2 + 0.5).clamp(0, 1)
    return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()


def told(
    steps: Iterator[Tensor], callback: StepEnd, pipe: Any, request: Request
) -> Iterator[Tensor]:
    """The latents of each step, told to a callback, until it interrupts; see `StepEnd`.

    Raises ValueError if it changes them.
    """
    sampler = find_sampler(request.sampler, learned_variance=pipe.diffusion.learned_variance)
    levels = sampler.levels(pipe.diffusion, request.steps, spacing=request.level_spacing)
    timesteps = levels.last(request.num_denoising_steps).timestep
    pipe._interrupt = False
    for i, latents in enumerate(steps):
        version = latents._version  # in-place operations count it up
        returned = callback(pipe, i, timesteps[i], {"latents": latents}) or {}
        if not isinstance(returned, dict):
            raise ValueError(
                f"callback_on_step_end returned {short_repr(returned)}; return the callback_kwargs "
                "as they came, or nothing"
            )
        if returned.get("latents", latents) is not latents or latents._version != version:
            raise ValueError(
                "callback_on_step_end changed the latents, which has no effect here: they are an "
                "estimate to look at; return the callback_kwargs as they came"
            )
        if others := sorted(returned.keys() - {"latents"}):
            raise ValueError(
                f"callback_on_step_end returned {', '.join(others)}, which has no effect here: "
                "return the callback_kwargs as they came"
            )
        yield latents
        if pipe._interrupt:
            return


def described(pipe: Any) -> str:
    """A pipeline in a line."""
    networks = (pipe.unet, pipe.vae, pipe.text_encoder)
    count = sum(parameter.numel() for one in networks for parameter in one.parameters())
    dtype = str(pipe.precision).removeprefix("torch.")
    return (
        f"<Pipeline: {type(pipe.unet).__name__} for {pipe.side} x {pipe.side} pixels "
        f"({pipe.diffusion.schedule}, {pipe.diffusion.prediction}); {count / 1e6:,.1f} M "
        f"parameters with VAE and text encoder; {dtype} on {pipe.device} by {pipe.engine}>"
    )
