"""Guidance: exact identities, parity with diffusers, and when the network is asked twice."""

import math
from typing import Any

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from support.toys import SHAPE, network, normal
from torch import Tensor

from latentdiff.diffusion import Diffusion
from latentdiff.guidance import Guidance, guided_denoiser
from latentdiff.samplers import ddim

EPSILON = Diffusion("scaled_linear", "epsilon")
FLOW = Diffusion("flow", "flow_prediction")


def outputs() -> tuple[Tensor, Tensor]:
    return normal(1), normal(2)


@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_rescaling_is_diffusers(rescale: float) -> None:
    null, conditional = outputs()
    plain = null + 7.5 * (conditional - null)
    theirs = rescale_noise_cfg(plain, conditional, guidance_rescale=rescale)
    ours = Guidance(7.5, rescale=rescale).combine(null, conditional)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)


def test_a_full_rescale_has_the_contrast_of_the_estimate_with_the_prompt() -> None:
    null, conditional = outputs()
    guided = Guidance(9.0, rescale=1.0).combine(null, conditional)
    rest = (1, 2, 3)
    torch.testing.assert_close(guided.std(rest), conditional.std(rest), rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"eta": 0.0},
        {"eta": 0.5, "norm_threshold": 3.0},
        {"norm_threshold": 0.5, "momentum": -0.5},
        {"eta": 0.0, "norm_threshold": 2.0, "momentum": -0.75},
    ],
)
def test_adaptive_projected_guidance_is_diffusers_over_several_steps(
    options: dict[str, Any],
) -> None:
    """On estimates of x0 and from the estimate with the prompt on, as in the paper's Algorithm 1.

    diffusers leaves it to its caller what to project, and takes the scale less one.
    """
    guidance = Guidance(6.0, **options)
    context, null_context = normal(3), normal(4)
    denoise = guided_denoiser(FLOW, network, context, null_context, guidance)
    one = guided_denoiser(FLOW, network, context, None, 1)
    none = guided_denoiser(FLOW, network, null_context, None, 1)
    buffer = MomentumBuffer(guidance.momentum)
    levels = FLOW.levels(5)
    for i in range(5):
        x = normal(10 + i)
        theirs = normalized_guidance(
            one(x, levels[i]),
            none(x, levels[i]),
            guidance.scale - 1,
            buffer,
            guidance.eta,
            guidance.norm_threshold or 0.0,
            use_original_formulation=True,
        )
        torch.testing.assert_close(denoise(x, levels[i]), theirs, rtol=1e-9, atol=1e-9)


def test_projection_leaves_what_is_perpendicular_and_plain_guidance_at_eta_one() -> None:
    x0, update = outputs()
    perpendicular = Guidance(5.0, eta=0.0).project(update, x0) - x0
    assert (perpendicular * x0).flatten(1).sum(1).abs().max() < 1e-11
    plain = Guidance(5.0, norm_threshold=1e6).project(update, x0)
    torch.testing.assert_close(plain, x0 + 4 * update, rtol=1e-14, atol=1e-14)


def test_no_guidance_is_longer_than_its_threshold() -> None:
    x0, update = outputs()
    guided = Guidance(2.0, norm_threshold=0.25).project(update, x0)
    lengths = (guided - x0).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.25))


@pytest.mark.parametrize("diffusion", [EPSILON, FLOW])
@pytest.mark.parametrize("interval", [(0.3, 3.0), (0.0, 1.0), (1.0, 1000.0)])
def test_outside_its_interval_guidance_costs_nothing_and_changes_nothing(
    diffusion: Diffusion, interval: tuple[float, float]
) -> None:
    sizes: list[int] = []

    def counted(x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        sizes.append(len(x))
        return network(x, timestep, context)

    levels = diffusion.levels(12)
    guidance = Guidance(5.0, interval=interval)
    everywhere = guided_denoiser(diffusion, network, normal(3), normal(4), 5.0)
    nowhere = guided_denoiser(diffusion, network, normal(3), None, 1.0)
    denoise = guided_denoiser(diffusion, counted, normal(3), normal(4), guidance)
    inside = []
    for i in range(12):
        alpha, sigma = float(levels.alpha[i]), float(levels.sigma[i])
        inside.append(interval[0] * alpha <= sigma <= interval[1] * alpha)
        x = normal(i)
        plain = everywhere if inside[-1] else nowhere
        torch.testing.assert_close(denoise(x, levels[i]), plain(x, levels[i]), rtol=0, atol=1e-12)
    assert sizes == [SHAPE[0] * (2 if i else 1) for i in inside]
    assert len(set(inside)) == 2


def test_an_interval_over_all_levels_is_plain_guidance_bit_for_bit() -> None:
    levels = EPSILON.levels(6)
    everywhere = Guidance(4.0, interval=(0.0, 1e6))
    samples = [
        deque_last(
            ddim(guided_denoiser(EPSILON, network, normal(3), normal(4), g), normal(5), levels)
        )
        for g in (4.0, everywhere)
    ]
    assert torch.equal(*samples)


def deque_last(items: Any) -> Tensor:
    *_, last = items
    return last


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"scale": -1.0}, "guidance_scale=-1.0"),
        ({"scale": math.nan}, "guidance_scale=nan"),
        ({"rescale": 1.5}, "guidance_rescale=1.5"),
        ({"interval": (2.0, 1.0)}, "guidance_interval=(2.0, 1.0)"),
        ({"interval": (1.0,)}, "guidance_interval=(1.0,)"),
        ({"interval": (0.0, math.inf)}, "guidance_interval=(0.0, inf)"),
        ({"eta": 2.0}, "guidance_eta=2.0"),
        ({"norm_threshold": 0.0}, "guidance_norm_threshold=0.0"),
        ({"momentum": 1.0}, "guidance_momentum=1.0"),
        ({"eta": 0.0, "rescale": 0.7}, "guidance_rescale=0.7 does not go with guidance_eta"),
    ],
)
def test_a_value_out_of_range_is_named(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match="guidance") as raised:
        Guidance(**options)
    assert str(raised.value).startswith(field)
