"""The denoising network in a sampling run, which computes once what no step of the run changes.

That is the text's keys and values in every cross-attention, the embeddings of all timesteps, and
what they add to every block. Nothing here outlives a run: LoRAs and changed weights take effect in
the next. Shapes: B images, C latent channels, H/W latent size, L tokens, D width.
"""

import functools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from latentdiff.diffusion import Diffusion
from latentdiff.feature_cache import FeatureCache
from latentdiff.guidance import Evaluate, Guidance, guide
from latentdiff.levels import Denoise, NoiseLevel
from latentdiff.models.dit import DiT
from latentdiff.models.layers import repeated
from latentdiff.models.unet import UNet
from latentdiff.tiles import exact, tiles

Batching = Literal["all", "exact", "alone"]
"""Which images are evaluated at once: those with equally long contexts, the same in tiles that
change no bit (`tiles.py`), or none."""
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
    cache_interval: int = 1,
) -> tuple[Evaluate, Evaluate]:
    """The network as `guidance.guide` asks for it: with the prompt alone, and both halves.

    The contexts are (B, L, D) each; `timesteps`, rising, are those of `NoiseLevels`. The network
    computes in `dtype`; the output has x's. A `cache_interval` above 1 is that of a `FeatureCache`.
    """
    contexts = context if null_context is None else torch.cat([null_context, context])
    states = functools.cache(lambda rows: network.prepare_context(contexts[-rows:]))
    cache = None if cache_interval == 1 else FeatureCache(network, timesteps, cache_interval)
    window: dict[float, Sequence[Tensor]] = {}

    def times(t: float) -> Sequence[Tensor]:
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
    def evaluate(x: Tensor, timestep: Tensor, *, rows: int) -> Tensor:
        t = float(timestep)  # on the CPU, as all levels are: nothing waits for the device
        latents = x.to(dtype)
        if len(x) == 1 and dtype == torch.float32 and x.device.type == "cpu":
            # oneDNN convolves one image by another algorithm than several (docs/decisions/0003).
            latents = latents.expand(rows, -1, -1, -1)
        inputs = latents, [shift[-rows:] for shift in times(t)], states(rows)
        output = network(*inputs) if cache is None else cache(*inputs, timestep=t, rows=rows)
        return repeated(output, rows).to(x.dtype)  # one that never reads the text has B rows

    conditional, halves = (functools.partial(evaluate, rows=len(c)) for c in (context, contexts))
    return conditional, halves


def denoiser_of_all(
    diffusion: Diffusion,
    network: UNet | DiT,
    contexts: Sequence[Sequence[Tensor]],
    guidance: Guidance,
    *,
    timesteps: Sequence[float],
    dtype: torch.dtype,
    batching: Batching,
    cache_interval: int = 1,
    with_v: bool,
) -> Denoise:
    """The guided network for all images of a request.

    On a CPU matrix products add up in an order that depends on the batch, and fifty steps make that
    visible: "same seed, same image" holds to the bit where images are `alone`, or in tiles that are
    `exact`. `contexts` has one of (1, L, D) for each image, and then as many without the prompt, if
    it is guided; the rest is as in `evaluations` and `guide`.
    """
    batches: dict[int, list[int]] = {}
    for i, context in enumerate(contexts[0]):
        batches.setdefault(i if batching == "alone" else context.shape[1], []).append(i)
    of_rows = [tuple(rows) for rows in batches.values()]

    @functools.cache
    def pair(rows: tuple[int, ...]) -> tuple[Evaluate, Evaluate]:
        context, *null = (torch.cat([states[i] for i in rows]) for states in contexts)
        return evaluations(
            network,
            context,
            *null,
            timesteps=timesteps,
            dtype=dtype,
            cache_interval=cache_interval,
        )

    if batching == "exact" and len(contexts[0]) > 1:
        of_rows = [tile for rows in of_rows for tile in tiles(rows)]
        one, two = (lambda rows: pair(rows)[0]), (lambda rows: pair(rows)[1])
        pairs = [(exact(one, rows), exact(two, rows)) for rows in of_rows]
    else:
        pairs = [pair(rows) for rows in of_rows]
    denoisers = [guide(diffusion, *pair, guidance, with_v=with_v) for pair in pairs]
    if len(denoisers) == 1:
        return denoisers[0]

    def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
        x0: dict[int, Tensor] = {}
        for rows, denoise_rows in zip(of_rows, denoisers, strict=True):
            x0 |= zip(rows, denoise_rows(x[list(rows)], level), strict=True)
        return torch.stack([x0[i] for i in range(len(x))])

    return denoise
