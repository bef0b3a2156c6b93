"""The denoising network in a sampling run, which computes once what no step of the run changes.

That is the text's keys and values in every cross-attention, the embeddings of all timesteps, and
what they add to every block. Nothing here outlives a run: LoRAs and changed weights take effect in
the next. Shapes: B images, C latent channels, H/W latent size, L tokens, D width.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from latentdiff.diffusion import Diffusion
from latentdiff.guidance import Evaluate, Guidance, guide
from latentdiff.levels import Denoise, NoiseLevel
from latentdiff.models.dit import DiT
from latentdiff.models.layers import repeated
from latentdiff.models.unet import UNet

WINDOW = 64
"""Timesteps that are embedded in one product; what all 1000 of a long run add takes 80 MB for each
row of the context at the size of SD 1.5."""


def evaluations(
    network: UNet | DiT,
    context: Tensor,
    null_context: Tensor | None = None,
    *,
    timesteps: Sequence[float],
    dtype: torch.dtype,
) -> tuple[Evaluate, Evaluate]:
    """The network as `guidance.guide` asks for it: with the prompt alone, and both halves.

    The contexts are (B, L, D) each; `timesteps`, rising, are those of `NoiseLevels`. The network
    computes in `dtype`; the output has x's.
    """
    contexts = context if null_context is None else torch.cat([null_context, context])
    states = functools.cache(lambda rows: network.prepare_context(contexts[-rows:]))
    window: dict[float, Sequence[Tensor]] = {}

    def times(timestep: Tensor) -> Sequence[Tensor]:
        t = float(timestep)  # on the CPU, as all levels are: nothing waits for the device
        if t not in window:
            window.clear()
            end = timesteps.index(t) + 1
            ts = timesteps[max(0, end - WINDOW) : end]  # a run goes down
            embedded = torch.tensor(ts, device=contexts.device)
            window.update(
                zip(ts, network.prepare_times(embedded, contexts, dtype=dtype), strict=True)
            )
        return window[t]

    @torch.no_grad()
    def conditional(x: Tensor, timestep: Tensor) -> Tensor:
        rows = len(context)
        shifts = [shift[-rows:] for shift in times(timestep)]
        return network(x.to(dtype), shifts, states(rows)).to(x.dtype)

    @torch.no_grad()
    def halves(x: Tensor, timestep: Tensor) -> Tensor:
        rows = len(contexts)
        output = network(x.to(dtype), times(timestep), states(rows))
        return repeated(output, rows).to(x.dtype)  # a network that never reads the text has B rows

    return conditional, halves


def denoiser_of_all(
    diffusion: Diffusion,
    network: UNet | DiT,
    contexts: Sequence[Sequence[Tensor]],
    guidance: Guidance,
    *,
    timesteps: Sequence[float],
    dtype: torch.dtype,
    alone: bool,
    with_v: bool,
) -> Denoise:
    """The guided network for all images: each `alone`, or those with equally long contexts at once.

    On a CPU each is alone: matrix products add up in an order that depends on the batch, and fifty
    steps make that visible; so "same seed, same image" is exact there. `contexts` has one of
    (1, L, D) for each image, and then as many without the prompt, if it is guided; the rest is as
    in `evaluations` and `guide`.
    """
    batches: dict[int, list[int]] = {}
    for i, context in enumerate(contexts[0]):
        batches.setdefault(i if alone else context.shape[1], []).append(i)
    denoisers: list[Denoise] = []
    for rows in batches.values():
        context, *null = (torch.cat([states[i] for i in rows]) for states in contexts)
        conditional, halves = evaluations(network, context, *null, timesteps=timesteps, dtype=dtype)
        denoisers.append(guide(diffusion, conditional, halves, guidance, with_v=with_v))
    if len(denoisers) == 1:
        return denoisers[0]

    def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
        x0: dict[int, Tensor] = {}
        for rows, denoise_rows in zip(batches.values(), denoisers, strict=True):
            x0 |= zip(rows, denoise_rows(x[rows], level), strict=True)
        return torch.stack([x0[i] for i in range(len(x))])

    return denoise
