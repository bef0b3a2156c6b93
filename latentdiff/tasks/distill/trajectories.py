"""Distillation of trajectories: a student takes in one step what its teacher takes in several.

Progressive distillation (Salimans & Ho 2022, arXiv:2202.00512) in one round. The teacher draws
images in many steps; the student, of N steps, learns each of its own from where the teacher is when
that begins to where it is when that ends. A step of the student is one of DDIM's, so that N steps
of `ddim` draw the image that the teacher draws of the same noise.
Shapes: B images, C latent channels, H/W latent size.
"""

import torch
from torch import Tensor

from latentdiff.diffusion import Diffusion, Network
from latentdiff.levels import Denoise, NoiseLevel, NoiseLevels
from latentdiff.samplers.multistep import dpmpp_2m


@torch.no_grad()
def trajectory(teacher: Denoise, noise: Tensor, levels: NoiseLevels, steps: int) -> Tensor:
    """What a teacher makes of noise (B, C, H, W): (steps + 1, B, C, H, W), the last is the image.

    The others are where each of a student's `steps` steps begins. The teacher takes a step of
    DPM-Solver++(2M) for each of `levels`, whose number is a multiple of `steps`.
    """
    assert len(levels) % steps == 0, f"{len(levels)} steps for {steps}"
    states = []

    def watched(x: Tensor, level: NoiseLevel) -> Tensor:
        states.append(x)
        return teacher(x, level)

    *_, image = dpmpp_2m(watched, noise, levels)
    return torch.stack([*states[:: len(levels) // steps], image])


def step_errors(
    diffusion: Diffusion, student: Network, states: Tensor, context: Tensor, levels: NoiseLevels
) -> Tensor:
    """How far each step of a student of N steps ends from the teacher's, (N, B).

    states (N + 1, B, C, H, W) are of `trajectory`, context (B, L, D), `levels` the student's. An
    error is the mean square over the latents, times N^2: for a flow, whose steps are equally long,
    that of the velocity over the step. The gradient reaches the student alone.
    """
    steps, begin = len(levels), states[:-1]

    def of_examples(values: Tensor) -> Tensor:
        """A level's values, (N + 1,), for each example of each step, (N B,)."""
        return values[:-1].repeat_interleave(states.shape[1]).to(states.device)

    level = NoiseLevel(*map(of_examples, (levels.timestep, levels.alpha, levels.sigma)))
    x = begin.flatten(0, 1)
    output = student(x, level.timestep, context.repeat(steps, 1, 1)).to(x.dtype)
    x0 = diffusion.to_x0(output, x, level.alpha, level.sigma).unflatten(0, (steps, -1))
    s, t = levels.ends()
    from_x, from_x0 = s.sigma / t.sigma, s.alpha - t.alpha * s.sigma / t.sigma  # DDIM, eq. 12
    from_x, from_x0 = (c.to(x).reshape(-1, 1, 1, 1, 1) for c in (from_x, from_x0))
    error = from_x * begin + from_x0 * x0 - states[1:]
    return steps**2 * error.square().flatten(2).mean(2)
