"""Records how one image is drawn, step by step, beside the sampling run that draws it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from latentdiff.diffusion import Diffusion
from latentdiff.explaining.attention import AttentionMaps, recorded, words
from latentdiff.formats.option_names import refuse_unknown
from latentdiff.levels import NoiseLevels
from latentdiff.pipeline import OPTIONS, Pipeline
from latentdiff.request import Request
from latentdiff.samplers import find_sampler

NUM_SHOWN = 8  # steps whose latents are decoded


@dataclass(frozen=True)
class Explanation:
    """How one image was drawn in N steps, of which `shown` are decoded; C, H, W are latents'."""

    request: Request
    image: Image.Image
    """The image that `pipe(prompt, ...)` draws, bit for bit."""
    levels: NoiseLevels
    diffusion: Diffusion
    shown: list[int]
    """Steps from 0 to N - 1."""
    noisy: list[Image.Image]
    """x_t of each shown step, decoded."""
    predicted: list[Image.Image]
    """x0 as it is predicted there, guided."""
    conditional: list[Image.Image]
    """x0 as the network predicts it with the prompt alone."""
    unconditional: list[Image.Image]
    """x0 without the prompt, or with the negative one; empty where nothing is guided."""
    guidance: Tensor
    """(N,): root mean square of the difference of these two, in latents, whose deviation is 1; 0
    where a step is not guided."""
    words: list[tuple[str, Tensor]]
    """Each word of the prompt with its attention, (H, W): the share of what each place looks at,
    the mean over layers, heads and steps."""
    rest: float
    """The share of the tokens that are no words: start, end and padding."""


@dataclass(frozen=True)
class _Evaluation:
    """One evaluation of the network: x_t (1, C, H, W) and its output (1 or 2, C, H, W)."""

    x: Tensor
    output: Tensor


def explain(pipe: Pipeline, prompt: str, **options: Any) -> Explanation:
    """Draw one image as `pipe(prompt, **options)` does, and record what happens.

    Raises ValueError as that does; for several images, for an image to start from, for networks
    that OpenVINO computes or that have no cross-attention, and for samplers that evaluate the
    network more or less often than once a step.
    """
    refuse_unknown(options, OPTIONS)
    request = Request.of(pipe.diffusion, prompt, **options)
    _check(pipe, request)
    height, width = request.latent_size(
        pipe.side, factor=pipe.vae.config.factor, multiple=pipe.unet.multiple
    )
    maps = AttentionMaps((height, width))
    with recorded(pipe.unet, maps), _evaluations(pipe.unet) as evaluations:
        estimates = list(pipe.sample(request))
    sampler = find_sampler(request.sampler, learned_variance=pipe.diffusion.learned_variance)
    levels = sampler.levels(pipe.diffusion, request.steps, spacing=request.level_spacing)
    if len(evaluations) != len(levels):
        raise ValueError(
            f"sampler={request.sampler} evaluates the network {len(evaluations)} times in "
            f"{len(levels)} steps; choose one that does once a step, such as ddim or dpmpp_2m"
        )
    x0 = [_x0(pipe.diffusion, one, levels, i) for i, one in enumerate(evaluations)]
    count = min(NUM_SHOWN, len(levels))
    shown = [round(i * (len(levels) - 1) / max(1, count - 1)) for i in range(count)]
    guided = [i for i in shown if len(x0[i]) == 2]
    parts = [
        (text, maps.mean[positions].sum(dim=0))
        for text, positions in words(prompt, pipe.text_encoder.tokenizer)
    ]
    return Explanation(
        request=request,
        image=pipe.decode(estimates[-1], request)[0],
        levels=levels,
        diffusion=pipe.diffusion,
        shown=shown,
        noisy=_decoded(pipe, [evaluations[i].x for i in shown]),
        predicted=_decoded(pipe, [estimates[i] for i in shown]),
        conditional=_decoded(pipe, [x0[i][-1:] for i in shown]),
        unconditional=_decoded(pipe, [x0[i][:1] for i in guided]),
        guidance=torch.stack([(one[-1] - one[0]).square().mean().sqrt().cpu() for one in x0]),
        words=parts,
        rest=1 - float(sum(part.mean() for _, part in parts)),
    )


def _check(pipe: Pipeline, request: Request) -> None:
    if len(request.prompts) != 1:
        raise ValueError(f"one image can be explained at a time, not {len(request.prompts)}")
    if request.images or pipe.inpaints:
        raise ValueError("image: what is explained is drawn from noise alone; leave out the image")
    if request.prompt_weighting:
        raise ValueError("prompt_weighting=True: words with weights cannot be found in the image")
    if pipe.engine != "torch":
        raise ValueError(
            f"engine={pipe.engine} shows nothing of what is inside the network; load it with "
            "engine='torch'"
        )


@contextmanager
def _evaluations(network: Any) -> Iterator[list[_Evaluation]]:
    """Collect what the network gets and gives."""
    found = list[_Evaluation]()

    def record(_: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        found.append(_Evaluation(inputs[0][-1:].clone(), output.clone()))

    hook = network.register_forward_hook(record)
    try:
        yield found
    finally:
        hook.remove()


def _x0(diffusion: Diffusion, one: _Evaluation, levels: NoiseLevels, step: int) -> Tensor:
    """x0 (1 or 2, C, H, W) of an evaluation: without the prompt, if it is guided, and with it."""
    output, _ = diffusion.split_output(one.output)
    x = one.x.to(output).float()
    return diffusion.to_x0(output.float(), x, levels.alpha[step], levels.sigma[step])


def _decoded(pipe: Pipeline, latents: Sequence[Tensor]) -> list[Image.Image]:
    return [image for z in latents for image in pipe.decode(z)]
