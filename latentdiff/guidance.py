"""Guidance: how far, where and in which direction a sample is led towards its prompt.

At each step the network is evaluated with the prompt and with the negative prompt (by default the
empty one), and classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) extrapolates from
the second output through the first. The other options reduce the artefacts of a large scale.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from latentdiff.diffusion import Diffusion, Network
from latentdiff.formats.header import short_repr
from latentdiff.levels import Denoise, NoiseLevel

Evaluate = Callable[[Tensor, Tensor], Tensor]  # x_t (B, C, H, W), timestep () or (B,) -> output


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


@dataclass(frozen=True)
class Guidance:
    """How a sample is guided; the defaults beyond `scale` are plain classifier-free guidance.

    Raises ValueError, naming the field, for a value out of range.
    """

    scale: float = 7.5
    """The weight of the extrapolation, >= 0; 1 is off, at half the cost."""
    rescale: float = 0.0
    """0 … 1: how much of the contrast that guidance adds is taken back (Lin et al. 2023,
    arXiv:2305.08891, section 3.4; 0.7 there)."""
    interval: Sequence[float] | None = None
    """The lowest and the highest noise level sigma / alpha that is guided; the others have a scale
    of 1 (Kynkäänniemi et al. 2024, arXiv:2404.07724). None guides everywhere."""
    eta: float = 1.0
    """Adaptive projected guidance (Sadat et al. 2024, arXiv:2410.02416): the weight of the update's
    component parallel to the estimate of x0; 0 avoids saturated colours, 1 is off."""
    norm_threshold: float | None = None
    """The largest Euclidean norm of an image's update in a step (r in Sadat et al.)."""
    momentum: float = 0.0
    """The weight of the earlier steps' updates, above -1 and below 1; beta in Sadat et al., where
    it is negative, -0.5, and emphasises what is new in a step."""

    def __post_init__(self) -> None:
        for name in ("scale", "rescale", "eta", "norm_threshold", "momentum"):
            value = getattr(self, name)
            if not _is_number(value) and not (name == "norm_threshold" and value is None):
                raise ValueError(f"guidance_{name}={short_repr(value)} must be a number")
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(f"guidance_scale={self.scale} must be a finite number >= 0")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance_rescale={self.rescale} must be from 0 to 1")
        interval = (0.0, 1.0) if self.interval is None else self.interval
        numbers = isinstance(interval, Sequence) and all(map(_is_number, interval))
        if not numbers or len(interval) != 2 or not 0 <= interval[0] <= interval[1] < math.inf:
            raise ValueError(
                f"guidance_interval={short_repr(interval)} must be two finite numbers, "
                "0 <= low <= high, of sigma / alpha"
            )
        if not 0 <= self.eta <= 1:
            raise ValueError(f"guidance_eta={self.eta} must be from 0 to 1")
        if self.norm_threshold is not None and not 0 < self.norm_threshold < math.inf:
            raise ValueError(
                f"guidance_norm_threshold={self.norm_threshold} must be a positive number"
            )
        if not -1 < self.momentum < 1:
            raise ValueError(f"guidance_momentum={self.momentum} must be between -1 and 1")
        if self.projected and self.rescale:
            raise ValueError(
                f"guidance_rescale={self.rescale} does not go with guidance_eta, "
                "guidance_norm_threshold or guidance_momentum, which mend the same fault"
            )

    @property
    def projected(self) -> bool:
        """Whether it is adaptive projected guidance."""
        return self.eta != 1 or self.momentum != 0 or self.norm_threshold is not None

    def guides(self, alpha: Tensor, sigma: Tensor) -> bool:
        """Whether this noise level is guided; alpha and sigma are (), on the CPU."""
        if self.scale == 1 or self.interval is None:
            return self.scale != 1
        low, high = self.interval
        return bool(low * alpha <= sigma) and bool(sigma <= high * alpha)

    def combine(self, null: Tensor, conditional: Tensor) -> Tensor:
        """The guided output of the network from its two outputs, each (B, ...)."""
        guided = null + self.scale * (conditional - null)
        if not self.rescale:
            return guided
        dims = tuple(range(1, guided.ndim))
        contrast = conditional.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
        return guided * (self.rescale * contrast + (1 - self.rescale))  # eq. 15 and 16

    def project(self, update: Tensor, x0: Tensor) -> Tensor:
        """The guided estimate of x0 by adaptive projected guidance, (B, ...): Algorithm 1.

        x0 is the estimate with the prompt; `update` is its difference from the estimate with the
        negative prompt, plus momentum. Norms and sums are over all of an image's latents.
        """
        dims = tuple(range(1, x0.ndim))
        if self.norm_threshold is not None:
            norm = torch.linalg.vector_norm(update, dim=dims, keepdim=True)
            update = update * (self.norm_threshold / norm).clamp(max=1)
        square = x0.square().sum(dims, keepdim=True)
        parallel = (update * x0).sum(dims, keepdim=True) / square * x0
        return x0 + (self.scale - 1) * (update - (1 - self.eta) * parallel)


def guided_denoiser(
    diffusion: Diffusion,
    network: Network,
    context: Tensor,
    null_context: Tensor | None,
    guidance: Guidance | float,
    *,
    with_v: bool = False,
) -> Denoise:
    """A denoiser that estimates x0 by the guided network; a float is the scale of plain guidance.

    context is (B, L, D); null_context, that of the negative prompt, is (B, L, D) or (1, L, D), and
    needed only where something is guided. `guide` says more.
    """
    if not isinstance(guidance, Guidance):
        guidance = Guidance(guidance)
    if guidance.scale != 1 and null_context is None:
        raise ValueError(f"guidance_scale={guidance.scale} needs a null_context; 1 does not")
    both = [context] if null_context is None else [null_context.expand_as(context), context]
    contexts = torch.cat(both)

    def conditional(x: Tensor, timestep: Tensor) -> Tensor:
        return network(x, timestep.to(x.device, non_blocking=True).expand(len(x)), context)

    def halves(x: Tensor, timestep: Tensor) -> Tensor:
        timestep = timestep.to(x.device, non_blocking=True).expand(len(x)).repeat(2)
        return network(torch.cat([x, x]), timestep, contexts)

    return guide(diffusion, conditional, halves, guidance, with_v=with_v)


def guide(
    diffusion: Diffusion,
    conditional: Evaluate,
    halves: Evaluate,
    guidance: Guidance,
    *,
    with_v: bool = False,
) -> Denoise:
    """A denoiser that estimates x0 from evaluations of a network at x and the network's timestep.

    `halves` gives (2B, C, H, W): without the prompt, or with the negative one, then with it;
    `conditional` the second half alone, which is all that is asked for where nothing is guided.
    Guiding the output is guiding x0, because `Diffusion.to_x0` is affine. A denoiser is for one
    sampling run, since momentum sums over its steps. With `with_v` it gives (B, 2C, H, W): x0, and
    v of the learned variance, which is the conditional output's without guidance, as in GLIDE's
    code.
    """
    assert diffusion.learned_variance or not with_v, "only a learned variance has v"
    update: Tensor | None = None

    def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
        nonlocal update
        timestep, alpha, sigma = level

        def to_x0(output: Tensor) -> Tensor:
            x_t = x[:, : output.shape[1]]  # an inpainting UNet sees further channels
            return diffusion.to_x0(output, x_t, alpha, sigma)

        if not guidance.guides(alpha, sigma):
            output, v = diffusion.split_output(conditional(x, timestep))
            x0 = to_x0(output)
        else:
            (null, _), (output, v) = map(diffusion.split_output, halves(x, timestep).chunk(2))
            if not guidance.projected:
                x0 = to_x0(guidance.combine(null, output))
            else:
                x0 = to_x0(output)
                difference = x0 - to_x0(null)
                update = difference if update is None else difference + guidance.momentum * update
                x0 = guidance.project(update, x0)
        return torch.cat([x0, v], dim=1) if with_v and v is not None else x0

    return denoise
