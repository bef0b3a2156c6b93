"""Feature caching: which timesteps are whole, and that what is kept is what the UNet would read."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny import UNET, Recording, randomise, tiny_pipeline
from torch import nn

from latentdiff.feature_cache import FeatureCache
from latentdiff.models.dit import DiT, DiTConfig
from latentdiff.models.unet import UNet
from latentdiff.pipeline import Pipeline


@pytest.mark.parametrize("text_in_the_last_block", [True, False])
@torch.no_grad()
def test_at_one_latent_the_kept_features_give_the_whole_output(
    text_in_the_last_block: bool,
) -> None:
    """With one batch of latents for both halves of guidance too."""
    order = 1 if text_in_the_last_block else -1
    down, up = UNET.down_block_types[::order], UNET.up_block_types[::order]
    unet = UNet(replace(UNET, down_block_types=down, up_block_types=up))
    randomise(unet)
    contexts = torch.randn(4, 5, unet.config.cross_attention_dim)
    x, timesteps = torch.randn(2, unet.config.in_channels, 7, 8), [100.0, 200.0]
    times = unet.prepare_times(torch.tensor(timesteps), contexts, dtype=x.dtype)[0]
    prepared = times, unet.prepare_context(contexts)
    cache = FeatureCache(unet, timesteps, 2)
    whole = cache(x, *prepared, timestep=200.0, rows=4)
    assert whole.equal(unet(x, *prepared))
    assert cache(x, *prepared, timestep=100.0, rows=4).equal(whole)
    assert not cache(x + 1, *prepared, timestep=100.0, rows=4).equal(whole)


def whole_evaluations(pipe: Pipeline, **options: Any) -> int:
    """How often a call evaluates the block at the bottom."""
    calls: list[int] = []
    assert isinstance(pipe.unet, UNet)
    assert pipe.unet.mid_block is not None

    def count(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        calls.append(len(inputs[0]))

    with pipe.unet.mid_block.register_forward_pre_hook(count):
        pipe("a", seed=1, progress=False, sampler="euler", **options)
    return len(calls)


def test_every_so_many_th_step_is_whole(tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path)
    assert whole_evaluations(pipe, steps=7) == 7
    assert whole_evaluations(pipe, steps=7, cache_interval=2) == 4
    assert whole_evaluations(pipe, steps=7, cache_interval=3) == 3
    assert whole_evaluations(pipe, steps=7, cache_interval=1000) == 1


def test_where_guidance_begins_and_ends_is_whole(tmp_path: Path) -> None:
    """Half a batch has no features to give to a whole one."""
    pipe = tiny_pipeline(tmp_path)
    options = {"steps": 9, "guidance_scale": 3.0, "cache_interval": 1000}
    assert whole_evaluations(pipe, guidance_interval=(0.5, 5.0), **options) == 3


def test_cached_images_beside_others_have_the_bits_that_they_have_alone(tmp_path: Path) -> None:
    pipe = Recording(**tiny_pipeline(tmp_path).components._asdict())
    options: Any = {"steps": 5, "guidance_scale": 3.0, "progress": False, "cache_interval": 2}
    pipe(["a", "b", "c"], seed=[1, 2, 3], **options)
    together = pipe.latents
    pipe("b", seed=2, **options)
    assert pipe.latents[0].equal(together[1])


def test_a_network_without_kept_features_is_refused(tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path)
    dit = DiT(DiTConfig(num_layers=1, num_attention_heads=1, attention_head_dim=8))
    with pytest.raises(ValueError, match=r"cache_interval=2 is for a UNet, .* a DiT; leave it out"):
        FeatureCache(dit, [100.0], 2)
    pipe.unet.forward = pipe.unet.forward  # as `latentdiff.engines` replace it
    with pytest.raises(ValueError, match=r"cache_interval=3 needs .* without compiling"):
        pipe("a", cache_interval=3)
    with pytest.raises(ValueError, match="cache_interval=0 must be a whole number from 1 to 1,000"):
        pipe("a", cache_interval=0)
