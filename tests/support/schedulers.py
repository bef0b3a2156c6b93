"""Sampling with diffusers' schedulers and with ours, side by side: what the network saw."""

from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import torch
from torch import Tensor

from latentdiff.diffusion import Diffusion, Network
from latentdiff.guidance import guided_denoiser
from latentdiff.levels import NoiseLevels
from support.cases import mostly_exhaustive
from support.toys import network, normal

WORDS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
# Every prediction type on every schedule, and every spacing and offset.
CASES = [
    (schedule, prediction, "trailing", 0)
    for schedule in WORDS
    for prediction in ("epsilon", "sample", "v_prediction")
] + [
    (schedule, prediction, spacing, offset)
    for schedule, prediction in (("linear", "epsilon"), ("scaled_linear", "v_prediction"))
    for spacing, offset in (("leading", 0), ("leading", 1), ("linspace", 0))
]

STEPS = mostly_exhaustive([5, 1, 2, 20])


def our_path(
    diffusion: Diffusion,
    sampler: Callable[..., Iterator[Tensor]],
    x: Tensor,
    levels: NoiseLevels,
    *,
    network: Network = network,
    with_v: bool = False,
    **options: Any,
) -> list[Tensor]:
    inputs = []

    def recorded(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        inputs.append(x)
        return network(x, timestep, context)

    denoise = guided_denoiser(diffusion, recorded, normal(7), None, 1.0, with_v=with_v)
    samples = list(sampler(denoise, x, levels, **options))
    assert len(samples) == len(levels)
    return [*inputs, samples[-1]]


def their_path(
    scheduler: Any,
    steps: int,
    x: Tensor,
    *,
    levels: NoiseLevels | None = None,
    network: Network = network,
    noise_sampler: Callable[[Tensor, Tensor], Tensor] | None = None,
    **options: Any,
) -> list[Tensor]:
    scheduler.set_timesteps(steps)
    if noise_sampler is not None:
        scheduler.noise_sampler = noise_sampler
    if levels is not None:  # the same levels as theirs, but not rounded to float32
        ratio = levels.sigma / levels.alpha
        if scheduler.order == 2:  # Heun's list holds the inner ones twice
            ratio = torch.cat([ratio[:1], ratio[1:-1].repeat_interleave(2), ratio[-1:]])
        torch.testing.assert_close(scheduler.sigmas, ratio.float(), atol=0, rtol=1e-5)
        scheduler.sigmas = ratio
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    x, inputs = x * scheduler.init_noise_sigma, []
    for timestep in scheduler.timesteps:
        inputs.append(scheduler.scale_model_input(x, timestep))
        output = network(inputs[-1], timestep, normal(7))
        x = scheduler.step(output, timestep, x, **options).prev_sample
    return [*inputs, x]


def processes(
    scheduler: type,
    schedule: str,
    prediction: str,
    spacing: str,
    offset: int,
    *,
    set_alpha_to_one: bool | None = None,
    as_it_comes: bool = False,
    **options: Any,
) -> tuple[Diffusion, Any]:
    """Ours and theirs, with our table of alpha_bar; theirs as it comes is rounded to float32."""
    keywords: dict[str, Any] = {"timestep_spacing": spacing, "steps_offset": offset}
    if set_alpha_to_one is not None:
        keywords["set_alpha_to_one"] = set_alpha_to_one
    diffusion = Diffusion(schedule, prediction, **keywords)
    if scheduler in (diffusers.DDIMScheduler, diffusers.DDPMScheduler):
        keywords["clip_sample"] = False
    start, end = diffusion.beta_start or 1e-4, diffusion.beta_end or 0.02
    keywords["prediction_type"] = prediction
    if scheduler is diffusers.PNDMScheduler:
        keywords["skip_prk_steps"] = True
    theirs = scheduler(1000, start, end, WORDS[schedule], **keywords, **options)
    if not as_it_comes:
        table = diffusion.alphas_cumprod
        torch.testing.assert_close(theirs.alphas_cumprod, table.float(), atol=1e-7, rtol=1e-4)
        theirs.alphas_cumprod = table
        if set_alpha_to_one is False:
            theirs.final_alpha_cumprod = table[0]
    return diffusion, theirs


def largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """At any step, relative to the largest value: what predicts noise badly makes hundreds."""
    assert len(ours) == len(theirs)
    largest = max(1.0, *(float(x.abs().max()) for x in theirs))
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / largest


def assert_same_path(ours: list[Tensor], theirs: list[Tensor], within: float = 1e-5) -> None:
    difference = largest_difference(ours, theirs)
    assert difference < within, f"largest difference {difference:.2g}"
