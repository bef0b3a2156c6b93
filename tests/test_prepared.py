"""What a sampling run computes once changes no number, in every kind of denoiser."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import mostly_exhaustive
from support.loras import ATTENTION, in_peft_names, random_lora
from support.parity import fill
from support.tiny import CONTEXT_DIM, UNET, double_pipeline, tiny_pipeline
from torch import Tensor, nn

from latentdiff.diffusion import Diffusion
from latentdiff.formats.weights import save_safetensors
from latentdiff.guidance import Guidance, guide, guided_denoiser
from latentdiff.models.dit import DiT, DiTConfig
from latentdiff.models.layers import ResnetBlock, SpatialTransformer
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.prepared import WINDOW, evaluations
from latentdiff.samplers import SAMPLERS

DIT = DiTConfig(
    sample_size=8,
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=8,
    cross_attention_dim=CONTEXT_DIM,
)
TEXT: dict[str, Any] = {"addition_embed_type": "text", "addition_embed_type_num_heads": 2}
SD2 = replace(
    UNET, use_linear_projection=True, attention_head_dim=(2, 4), transformer_layers_per_block=2
)
NETWORKS: dict[str, UNetConfig | DiTConfig] = {
    "sd1": UNET,
    "text added to time": replace(UNET, **TEXT),
    "dit": DIT,
    "dit, joint attention": replace(DIT, attention="joint", pooled_text=True),
    "sd2": SD2,
    "text is first read below": replace(
        UNET,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ),
    "text beside time": replace(
        UNET, class_embed_type="simple_projection", class_embeddings_concat=True
    ),
    "no mid block": replace(UNET, mid_block_type=None),
    "text is never read": replace(
        UNET,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        mid_block_type="UNetMidBlock2D",
    ),
    "dit, pooled text": replace(DIT, pooled_text=True),
    "dit, joint attention alone": replace(DIT, attention="joint"),
}
each = pytest.mark.parametrize("name", mostly_exhaustive(NETWORKS, quick=5))
TIMESTEPS = [0.0, 3.5, 712.0, 999.0]


def double(name: str) -> UNet | DiT:
    """Random weights in every layer, in float64."""
    torch.manual_seed(2)
    config = NETWORKS[name]
    network = DiT(config) if isinstance(config, DiTConfig) else UNet(config)
    fill(network)
    return network.double().eval()


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


@each
@pytest.mark.parametrize("batch", [1, 3])
def test_a_prepared_network_is_the_plain_one_alone_and_in_both_halves(
    name: str, batch: int
) -> None:
    network, x = double(name), normal(batch, 4, 8, 6)
    context, null = normal(batch, 5, CONTEXT_DIM), normal(batch, 6, CONTEXT_DIM)[:, 1:]
    conditional, halves = evaluations(
        network, context, null, timesteps=TIMESTEPS, dtype=torch.float64
    )
    with torch.no_grad():
        for t in reversed(TIMESTEPS):
            plain = network(x, torch.full((batch,), t), context)
            assert_equal(conditional(x, torch.tensor(t)), plain)
            both = torch.cat([network(x, torch.full((batch,), t), null), plain])
            assert_equal(halves(x, torch.tensor(t)), both)
    assert ("never" in name) == (both[:batch].equal(plain))


@each
def test_guidance_by_prepared_halves_is_guidance_by_a_plain_network(name: str) -> None:
    """By intervals too, which ask for the half with the prompt alone."""
    network, diffusion = double(name), Diffusion("flow", "flow_prediction")
    context, null = normal(2, 5, CONTEXT_DIM), normal(2, 6, CONTEXT_DIM)[:, 1:]
    guidance = Guidance(3.0, interval=(0.3, 3.0), eta=0.5, momentum=-0.5)
    levels = diffusion.levels(6)
    pair = evaluations(
        network, context, null, timesteps=levels.network_timesteps(), dtype=torch.float64
    )
    denoisers = (
        guide(diffusion, *pair, guidance),
        guided_denoiser(diffusion, network, context, null, guidance),
    )
    with torch.no_grad():
        for i in range(6):
            found, expected = (denoise(normal(2, 4, 8, 8), levels[i]) for denoise in denoisers)
            assert_equal(found, expected)


@pytest.mark.parametrize(
    ("name", "shared"), [("sd1", 1), ("text is first read below", 1), ("text added to time", 0)]
)
def test_what_precedes_the_text_is_computed_once_for_both_halves(name: str, shared: int) -> None:
    """`shared` residual blocks whole; where the text joins the time, half of the first one."""
    network, rows = double(name), dict[str, list[int]]()
    assert isinstance(network, UNet)
    for title, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(
                lambda _, inputs, title=title: rows.setdefault(title, []).append(len(inputs[0]))
            )
    _, halves = evaluations(
        network,
        normal(1, 5, CONTEXT_DIM),
        normal(1, 5, CONTEXT_DIM),
        timesteps=TIMESTEPS,
        dtype=torch.float64,
    )
    halves(normal(1, 4, 8, 8), torch.tensor(999.0))
    first = "down_blocks.0.resnets.0"
    assert rows["conv_in"] == rows[f"{first}.conv1"] == [1]
    assert rows[f"{first}.conv2"] == [2 - shared]
    assert rows["conv_out"] == [2]
    below = "down_blocks.1.resnets.0.conv2"
    assert rows[below] == [1 if name == "text is first read below" else 2]


@pytest.mark.parametrize("sampler", mostly_exhaustive(SAMPLERS, quick=2))
@pytest.mark.parametrize("steps", [1, 7])
def test_every_sampler_stays_within_the_timesteps_of_its_levels(sampler: str, steps: int) -> None:
    flow = SAMPLERS[sampler].flow
    diffusion = Diffusion("flow", "flow_prediction") if flow else Diffusion("cosine", "sample")
    levels = SAMPLERS[sampler].levels(diffusion, steps)
    allowed, x = levels.network_timesteps(), normal(1, 4, 2, 2)

    def denoise(x: Tensor, level: Any) -> Tensor:
        assert float(level.timestep) in allowed
        return 0.5 * x

    assert list(SAMPLERS[sampler](denoise, x, levels, noise=lambda: x))


def test_a_run_of_more_timesteps_than_are_embedded_at_once_is_the_same() -> None:
    network, diffusion = double("sd1"), Diffusion("linear", "epsilon")
    levels = diffusion.levels(2 * WINDOW + 3)
    timesteps = levels.network_timesteps()
    assert len(timesteps) == 2 * WINDOW + 3
    context, x = normal(1, 5, CONTEXT_DIM), normal(1, 4, 4, 4)
    conditional, _ = evaluations(network, context, timesteps=timesteps, dtype=torch.float64)
    with torch.no_grad():
        for i in (0, 1, WINDOW - 1, WINDOW, WINDOW - 1, 2 * WINDOW + 2):
            t = levels[i].timestep
            assert_equal(conditional(x, t), network(x, t[None], context))


def test_text_and_times_are_embedded_once_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, calls = tiny_pipeline(tmp_path), dict[str, int]()
    assert isinstance(pipe.unet, UNet)
    for name, module in pipe.unet.named_modules():
        if name.endswith(("attn2.to_k", "time_emb_proj", "time_embedding")):
            module.register_forward_hook(
                lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1})
            )
    pipe("a cat", steps=5, guidance_scale=3.0, progress=False)
    blocks = [m for m in pipe.unet.modules() if isinstance(m, ResnetBlock | SpatialTransformer)]
    assert len(calls) == len(blocks) + 1
    assert set(calls.values()) == {1}


def test_a_lora_and_changed_weights_take_effect_in_the_next_run(tmp_path: Path) -> None:
    """They are in the keys and values that a run computes once."""
    pipe = double_pipeline(tmp_path / "tokenizer")

    def draw() -> bytes:
        drawn = pipe("a cat", steps=2, seed=0, guidance_scale=3.0, progress=False)
        return drawn.images[0].tobytes()

    plain = draw()
    lora = in_peft_names(random_lora(pipe.unet, ATTENTION, rank=2))
    save_safetensors(lora, tmp_path / "style.safetensors")
    pipe.loras.load(tmp_path / "style.safetensors")
    styled = draw()
    assert styled != plain
    pipe.loras.unload()
    assert draw() == plain
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if name.endswith(("attn2.to_v.weight", "time_emb_proj.weight")):
                parameter.mul_(3)
    assert draw() != plain
