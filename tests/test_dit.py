"""The DiT: diffusers' transformers in every number, the identity at its start, any size."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from support.parity import difference, fill, gradients, same_weights
from support.tiny import randomise
from torch import Tensor, nn

from latentdiff.models.dit import CrossBlock, DiT, DiTConfig, JointBlock, positions

SMALL = DiTConfig(
    sample_size=8,
    num_layers=3,
    num_attention_heads=2,
    attention_head_dim=8,
    cross_attention_dim=12,
)
CONFIGS = {
    "cross": SMALL,
    "joint": dataclasses.replace(SMALL, attention="joint"),
    "cross, pooled text": dataclasses.replace(
        SMALL, pooled_text=True, patch_size=1, out_channels=8
    ),
    "joint, pooled text": dataclasses.replace(SMALL, attention="joint", pooled_text=True),
    "one joint block": dataclasses.replace(SMALL, attention="joint", num_layers=1, patch_size=3),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
EXACT: dict[str, Any] = {"dtype": torch.float64, "requires_grad": True}


def filled(config: DiTConfig) -> DiT:
    """A network in float64 with no parameter left at a special value."""
    network = DiT(config).double()
    fill(network)
    return network


def inputs(config: DiTConfig, size: tuple[int, int] = (12, 6), count: int = 2) -> list[Tensor]:
    """x (B, C, H, W), timestep (B,), context (B, 5, D), in float64."""
    x = torch.randn(count, config.in_channels, *size, **EXACT)
    context = torch.randn(count, 5, config.cross_attention_dim, **EXACT)
    return [x, torch.linspace(7, 981.25, count), context]


def copy_weights(block: nn.Module, reference: nn.Module, *, absent: tuple[str, ...] = ()) -> None:
    """Into our block what diffusers' has under the same names, but for what ours does not have."""
    weights = {k: v for k, v in reference.state_dict().items() if not k.startswith(absent)}
    block.load_state_dict(weights)


@pytest.mark.parametrize("last", [False, True])
def test_a_joint_block_is_diffusers_in_every_number_and_gradient(last: bool) -> None:
    width, heads = SMALL.width, SMALL.num_attention_heads
    theirs = JointTransformerBlock(width, heads, width // heads, context_pre_only=last).double()
    fill(theirs)
    ours = JointBlock(SMALL, last=last).double()
    # The last block's text asks nothing of which anything would be used; diffusers computes it.
    unused = ("attn.add_q_proj",) if last else ("nothing",)
    copy_weights(ours, theirs, absent=unused)
    x, context, time = (torch.randn(2, *size, width, **EXACT) for size in ((6,), (5,), ()))
    text, patches = theirs(x, context, time)
    found, found_text = ours(x, context, time)
    outputs = [(found, patches)] if last else [(found, patches), (found_text, text)]
    for output, expected in outputs:
        assert difference({"": output}, {"": expected}) < 1e-12
    wanted = gradients(sum(o.sum() + patches.square().sum() for _, o in outputs), theirs, (x,))
    got = gradients(sum(o.sum() + found.square().sum() for o, _ in outputs), ours, (x,))
    wanted = {name: g for name, g in wanted.items() if not name.startswith(unused)}
    assert difference(got, wanted) < 1e-10


def test_a_cross_block_is_diffusers_in_every_number_and_gradient() -> None:
    """Its time comes from an embedding of its own there, which ours is handed."""
    theirs = BasicTransformerBlock(
        SMALL.width,
        SMALL.num_attention_heads,
        SMALL.width // SMALL.num_attention_heads,
        cross_attention_dim=SMALL.cross_attention_dim,
        activation_fn="gelu-approximate",
        attention_bias=True,
        norm_type="ada_norm_zero",
        num_embeds_ada_norm=10,
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    ).double()
    fill(theirs)
    ours = CrossBlock(SMALL).double()
    copy_weights(ours, theirs, absent=("norm1.emb",))
    x, _, context = inputs(SMALL)
    x = torch.randn(2, 6, SMALL.width, **EXACT)
    step, label = torch.tensor([3, 900]), torch.tensor([1, 4])
    theirs.eval()  # in training its label embedding drops labels
    expected = theirs(
        x,
        encoder_hidden_states=context,
        timestep=step,
        class_labels=label,
    )
    embedding = theirs.norm1.get_submodule("emb")
    output, same = ours(x, context, embedding(step, label, hidden_dtype=x.dtype))
    assert same is context
    assert difference({"": output}, {"": expected}) < 1e-12
    wanted = gradients(expected, theirs, (x, context))
    wanted = {name: g for name, g in wanted.items() if not name.startswith("norm1.emb")}
    assert difference(gradients(output, ours, (x, context)), wanted) < 1e-10


NAMES_OF_SD3 = {
    "patch_embed.": "pos_embed.proj.",
    "time_embedding.": "time_text_embed.timestep_embedder.",
    "text_embedding.": "time_text_embed.text_embedder.",
}


def test_with_joint_attention_and_pooled_text_the_network_is_that_of_sd_3() -> None:
    config = CONFIGS["joint, pooled text"]
    theirs = SD3Transformer2DModel(
        sample_size=8,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        num_layers=config.num_layers,
        attention_head_dim=config.attention_head_dim,
        num_attention_heads=config.num_attention_heads,
        joint_attention_dim=config.cross_attention_dim,
        caption_projection_dim=config.width,
        pooled_projection_dim=config.cross_attention_dim,
        out_channels=config.out_channels,
        pos_embed_max_size=4,
    ).double()
    fill(theirs)
    ours = DiT(config).double()
    weights = theirs.state_dict()
    for name in ours.state_dict():
        start = next((old for old in NAMES_OF_SD3 if name.startswith(old)), "")
        weights[name] = weights.pop(NAMES_OF_SD3.get(start, "") + name.removeprefix(start))
    assert set(weights) - set(ours.state_dict()) == {
        "pos_embed.pos_embed",
        *(f"transformer_blocks.2.attn.add_q_proj.{part}" for part in ("weight", "bias")),
    }
    ours.load_state_dict({name: weights[name] for name in ours.state_dict()})
    x, timestep, context = inputs(config, (8, 8))
    expected = theirs(x, context, context.mean(1), timestep).sample
    # Its positions are sums in float64, and ours in float32 as all sinusoids here.
    assert difference({"": ours(x, timestep, context)}, {"": expected}) < 1e-6


@pytest.mark.parametrize("side", [3, 8])
def test_positions_are_dits(side: int) -> None:
    expected = get_2d_sincos_pos_embed(16, side, base_size=side, output_type="pt")
    found = positions(side, side, 16, device=torch.device("cpu"))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_positions_of_another_size_are_the_same_ones() -> None:
    """A larger image has those of a smaller one, and more, each once."""
    device = torch.device("cpu")
    large = positions(9, 7, 16, device=device).unflatten(0, (9, 7))
    assert torch.equal(positions(4, 6, 16, device=device).unflatten(0, (4, 6)), large[:4, :6])
    assert len(large.flatten(0, 1).unique(dim=0)) == 63


@each_config
def test_a_new_network_is_the_zero_function_and_each_block_the_identity(config: DiTConfig) -> None:
    network = DiT(config).double()
    x, timestep, context = inputs(config)
    assert not network(x, timestep, context).any()
    assert network(x, timestep, context).shape == (2, config.out_channels, 12, 6)
    width = config.width
    dim = config.cross_attention_dim if network.context_embedder is None else width
    for block in network.transformer_blocks:
        tokens, text = torch.randn(2, 6, width, **EXACT), torch.randn(2, 5, dim, **EXACT)
        after, answer = block(tokens, text, torch.randn(2, width, **EXACT))
        assert torch.equal(after, tokens)
        assert torch.equal(answer, text)


@each_config
def test_a_new_network_has_no_bias(config: DiTConfig) -> None:
    """Nor has the convolution that cuts the patches, which torch gives one (DiT's train.py)."""
    assert not any(p.any() for name, p in DiT(config).named_parameters() if name.endswith("bias"))


def streams(network: DiT) -> list[torch.dtype]:
    """Fills up with the precision in which the patches enter and leave each block."""
    found: list[torch.dtype] = []
    for block in network.transformer_blocks:
        block.register_forward_hook(
            lambda _, given, made: found.extend((given[0].dtype, made[0].dtype))
        )
    return found


@each_config
def test_under_autocast_the_blocks_add_up_in_float32(config: DiTConfig) -> None:
    """As DiT's do. The patches were rounded to bfloat16 with their positions, and so each sum."""
    network = filled(config).float()
    found = streams(network)
    x, timestep, context = (y.float() for y in inputs(config))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        network(x, timestep, context)
    assert found == [torch.float32] * (2 * config.num_layers)


@each_config
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_all_is_in_half_precision(config: DiTConfig, dtype: torch.dtype) -> None:
    network = DiT(config)
    randomise(network)
    x, timestep, context = (y.float() for y in inputs(config))
    expected = network(x, timestep, context)
    found = streams(network.to(dtype))
    output = network(x.to(dtype), timestep, context.to(dtype))
    assert {output.dtype, *found} == {dtype}
    assert (output.float() - expected).norm() < 0.03 * expected.norm()


@each_config
def test_from_zero_the_gradient_reaches_every_parameter_in_four_steps(config: DiTConfig) -> None:
    """And so none is without use, for whose gradient DDP would wait."""
    network = DiT(config).double()
    found = {}
    for _ in range(4):
        found = gradients(network(*inputs(config)), network, ())
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter -= 1e-3 * found[name]
    assert [name for name, gradient in found.items() if not gradient.any()] == []


@each_config
@pytest.mark.parametrize("size", [(6, 6), (6, 18), (30, 12)])
def test_any_size_that_the_patch_divides_goes_in_and_comes_out(
    config: DiTConfig, size: tuple[int, int]
) -> None:
    network = filled(config)
    assert network(*inputs(config, size)).shape == (2, config.out_channels, *size)


@each_config
def test_each_example_is_alone(config: DiTConfig) -> None:
    network = filled(config)
    x, timestep, context = inputs(config, count=3)
    whole = network(x, timestep, context)
    for i in range(3):
        alone = network(x[i : i + 1], timestep[i : i + 1], context[i : i + 1])
        torch.testing.assert_close(alone[0], whole[i], rtol=0, atol=1e-10)


@each_config
def test_the_order_of_the_words_is_not_seen_but_the_words_are(config: DiTConfig) -> None:
    """What says where a word stands is in the text encoder's states, not here."""
    network = filled(config)
    x, timestep, context = inputs(config)
    expected = network(x, timestep, context)
    shuffled = network(x, timestep, context[:, torch.tensor([3, 0, 4, 1, 2])])
    torch.testing.assert_close(shuffled, expected, rtol=0, atol=1e-10)
    assert not torch.allclose(network(x, timestep, context.roll(1, 0)), expected, atol=1e-3)


@each_config
def test_patches_are_told_apart_by_their_positions_alone(
    config: DiTConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them, patches that change places change the places of what is made of them."""
    network = filled(config)
    x, timestep, context = inputs(config, (6, 6))
    p = config.patch_size

    def turned(x: Tensor) -> Tensor:
        """The rows of patches, each one further down."""
        return x.roll(p, dims=2)

    apart = network(turned(x), timestep, context) - turned(network(x, timestep, context))
    assert apart.abs().max() > 1e-3
    monkeypatch.setattr(
        "latentdiff.models.dit.positions", lambda h, w, dim, device: torch.zeros(h * w, dim)
    )
    torch.testing.assert_close(
        network(turned(x), timestep, context),
        turned(network(x, timestep, context)),
        rtol=0,
        atol=1e-10,
    )


@each_config
def test_the_time_is_seen(config: DiTConfig) -> None:
    network = filled(config)
    x, timestep, context = inputs(config)
    earlier = network(x, timestep - 5, context)
    assert not torch.allclose(network(x, timestep, context), earlier, atol=1e-3)


@each_config
def test_a_folder_round_trip_is_bit_exact(tmp_path: Path, config: DiTConfig) -> None:
    network = DiT(config)
    fill(network)
    network.save_pretrained(tmp_path)
    loaded = DiT.from_pretrained(tmp_path)
    assert loaded.config == config
    assert same_weights(loaded, network)
    assert DiTConfig.from_dict(json.loads((tmp_path / "config.json").read_text())) == config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", "SD3Transformer2DModel"),
        ("attention", "self"),
        ("attention", ["joint"]),
        ("pooled_text", 1),
        ("patch_size", 0),
        ("patch_size", 10**6),
        ("num_layers", 10**6),
        ("num_layers", 2.0),
        ("num_attention_heads", 0),
        ("attention_head_dim", 7),
        ("attention_head_dim", 2**16),
        ("cross_attention_dim", None),
        ("sample_size", -1),
        ("qk_norm", "rms_norm"),
    ],
)
def test_what_the_network_cannot_do_is_refused_by_key_and_value(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key) as error:
        DiTConfig.from_dict({**SMALL.to_dict(), key: value})
    assert json.dumps(value).strip('"') in str(error.value) or repr(value) in str(error.value)


def test_latents_that_the_patch_does_not_divide_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"latents of \(8, 7\) must be divisible by patch_size=2"):
        DiT(SMALL)(torch.zeros(1, 4, 8, 7), torch.zeros(1), torch.zeros(1, 5, 12))
