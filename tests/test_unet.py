"""The UNet: diffusers' `UNet2DConditionModel` in every number, folders, LDM's start at zero."""

import dataclasses
import inspect
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from support.parity import (
    TOLERANCES,
    difference,
    fill,
    gradients,
    no_warning_logged,
    same_weights,
    shapes,
)
from torch import Tensor

from latentdiff.formats.weights import load_safetensors, save_safetensors
from latentdiff.models.layers import ResnetBlock, SpatialTransformer
from latentdiff.models.unet import UNet, UNetConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
DOWN, UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")


def config(attends: tuple[bool, ...] = (True, True, False), **keys: Any) -> UNetConfig:
    """A tiny network; `attends` says which levels have attention, down and up."""
    values: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16, 24)[: len(attends)],
        "down_block_types": [DOWN[a] for a in attends],
        "up_block_types": [UP[a] for a in reversed(attends)],
        "layers_per_block": 1,
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNetConfig(**values | keys)


SD2 = {"use_linear_projection": True, "attention_head_dim": (2, 4, 3), "upcast_attention": True}
CONFIGS = {
    "sd1": config(layers_per_block=2, upcast_attention=None),
    "sd2": config(layers_per_block=2, **SD2),
    "mid block without attention": config(
        mid_block_type="UNetMidBlock2D", layers_per_block=3, flip_sin_to_cos=False, freq_shift=1
    ),
    "no mid block": config(mid_block_type=None, attention_head_dim=(1, 4, 2)),
    "no attention at all": config((False, False), mid_block_type="UNetMidBlock2D"),
    "two transformer layers": config(
        (False, True), transformer_layers_per_block=2, **{**SD2, "attention_head_dim": (2, 4)}
    ),
    "attention on one way only": config(
        (True, False), up_block_types=UP[::-1], attention_head_dim=(4, 2)
    ),
    "one level": config((True,), sample_size=None),
    "odd widths": config(
        (True, True),
        block_out_channels=(9, 21),
        norm_num_groups=3,
        norm_eps=1e-3,
        attention_head_dim=3,
        in_channels=5,
        out_channels=3,
        freq_shift=0.5,
    ),
    "text added to time": config(
        (True, False), addition_embed_type="text", addition_embed_type_num_heads=3
    ),
    "mean of the text added to time": config((True, False), class_embed_type="simple_projection"),
    "mean of the text beside time": config(
        (False, True), class_embed_type="simple_projection", class_embeddings_concat=True
    ),
}


def drawn(seed: int) -> UNetConfig:
    """A configuration at random, of all that the keys allow."""
    draw = random.Random(seed)
    levels = draw.randint(1, 3)
    attends = tuple(draw.random() < 0.6 for _ in range(levels))
    heads = tuple(draw.choice((1, 2, 4, 8)) for _ in range(levels))
    return config(
        attends,
        block_out_channels=tuple(8 * draw.randint(1, 3) for _ in range(levels)),
        up_block_types=[UP[draw.random() < 0.6] for _ in range(levels)],
        mid_block_type=draw.choice(("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)),
        attention_head_dim=draw.choice((draw.choice((1, 2, 4)), heads)),
        layers_per_block=draw.randint(1, 3),
        transformer_layers_per_block=draw.randint(1, 2),
        use_linear_projection=draw.random() < 0.5,
        upcast_attention=draw.random() < 0.5,
        norm_num_groups=draw.choice((1, 2, 8)),
        flip_sin_to_cos=draw.random() < 0.5,
        freq_shift=draw.choice((0, 1)),
        in_channels=draw.randint(1, 9),
        out_channels=draw.randint(1, 5),
    )


CONFIGS |= {f"drawn {seed}": drawn(seed) for seed in range(4)}
POOLED = [name for name in CONFIGS if " time" in name]
QUICK = ("sd1", "odd widths", *POOLED)
each_config = pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, id=name, marks=[] if name in QUICK else pytest.mark.exhaustive)
        for name, config in CONFIGS.items()
    ],
)


def inputs(config: UNetConfig, size: tuple[int, int] = (9, 11), **options: Any) -> list[Tensor]:
    """x (2, C, H, W), timestep (2,) (whole for SD, real for flow), context (2, 5, D)."""
    x = torch.randn(2, config.in_channels, *size, **options)
    return [
        x,
        torch.tensor([7.0, 981.25]),
        torch.randn(2, 5, config.cross_attention_dim, **options),
    ]


def theirs(config: UNetConfig) -> UNet2DConditionModel:
    """diffusers' network of this configuration, with no parameter left at a special value."""
    network = UNet2DConditionModel.from_config(config.to_dict())
    fill(network)
    return network


def ours(config: UNetConfig) -> UNet:
    network = UNet(config)
    fill(network)
    return network


@each_config
def test_output_and_all_gradients_equal_diffusers(config: UNetConfig) -> None:
    reference, unet = theirs(config), UNet(config)
    assert shapes(unet) == shapes(reference)
    unet.load_state_dict(reference.state_dict())
    for dtype, tolerance in TOLERANCES.items():
        if config.addition_embed_type is not None:
            tolerance = max(tolerance, 1e-5)  # diffusers pools with a softmax in float32 always
        reference.to(dtype)
        unet.to(dtype)
        x, timestep, context = inputs(config, dtype=dtype, requires_grad=True)
        pooled = None if config.class_embed_type is None else context.mean(dim=1)
        expected = reference(x, timestep, context, class_labels=pooled).sample
        output = unet(x, timestep, context)
        assert difference({"": output}, {"": expected}) < tolerance
        wanted = gradients(expected, reference, (x, context))
        assert difference(gradients(output, unet, (x, context)), wanted) < tolerance
        reads_context = any(".attn2." in n or "_embedding." in n for n in wanted if "time" not in n)
        unused = [] if reads_context else ["input 1"]
        assert [name for name, gradient in wanted.items() if not gradient.any()] == unused


@each_config
def test_configuration_passes_through_diffusers_unchanged(config: UNetConfig) -> None:
    written = json.loads(json.dumps(config.to_dict()))
    with no_warning_logged(), torch.device("meta"):
        reference = UNet2DConditionModel.from_config(written)
    assert UNetConfig.from_dict(dict(reference.config)) == config
    assert UNetConfig.from_dict(written) == config


def test_every_key_of_diffusers_is_written_and_an_absent_one_means_what_it_means_there() -> None:
    parameters = inspect.signature(UNet2DConditionModel.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if name != "self"}
    assert UNetConfig.from_dict({}).to_dict() == {"_class_name": "UNet2DConditionModel", **defaults}


def test_a_key_that_diffusers_does_not_know_would_be_noticed() -> None:
    """The check that the tests above rest on."""
    with pytest.raises(AssertionError, match="colour"), no_warning_logged():
        UNet2DConditionModel.from_config({**CONFIGS["sd1"].to_dict(), "colour": "red"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("act_fn", "gelu"),
        ("addition_embed_type", "text_time"),
        ("class_embed_type", "timestep"),
        ("only_cross_attention", True),
        ("resnet_time_scale_shift", "scale_shift"),
        ("conv_in_kernel", 1),
        ("class_embeddings_concat", True),
        ("projection_class_embeddings_input_dim", 12),
        ("num_attention_heads", 8),
        ("colour", "red"),
        ("down_block_types", ["AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]),
        ("up_block_types", ["UpBlock2D", "UpBlock2D"]),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("attention_head_dim", [2, 2]),
        ("attention_head_dim", 3),
        ("attention_head_dim", 0),
        ("block_out_channels", [8, 16, 22]),
        ("norm_num_groups", None),
        ("layers_per_block", [1, 2, 1]),
        ("layers_per_block", 0),
        ("transformer_layers_per_block", [1, 2, 10]),
        ("cross_attention_dim", [12, 12, 16]),
        ("cross_attention_dim", [12, 12]),
        ("time_embedding_dim", 8),
        ("reverse_transformer_layers_per_block", [2, 1, 1]),
    ],
)
def test_what_the_network_cannot_do_is_refused_by_key_and_value(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key) as error:
        UNet(UNetConfig.from_dict({**CONFIGS["sd1"].to_dict(), key: value}))
    assert repr(value) in str(error.value).replace("(", "[").replace(")", "]")


def test_a_folder_round_trip_is_bit_exact(tmp_path: Path) -> None:
    unet = ours(CONFIGS["sd2"])
    unet.save_pretrained(tmp_path)
    loaded = UNet.from_pretrained(tmp_path)
    assert loaded.config == unet.config
    assert same_weights(loaded, unet)
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_diffusers_opens_our_folder_and_we_open_theirs(tmp_path: Path, name: str) -> None:
    unet = ours(CONFIGS[name])
    unet.save_pretrained(tmp_path / "ours")
    with no_warning_logged():
        reference = UNet2DConditionModel.from_pretrained(tmp_path / "ours")
    assert same_weights(reference, unet)
    reference.save_pretrained(tmp_path / "theirs")
    again = UNet.from_pretrained(tmp_path / "theirs")
    assert again.config == unet.config
    assert same_weights(again, unet)


def test_half_precision_on_disk_is_float32_in_memory(tmp_path: Path) -> None:
    unet = ours(CONFIGS["sd1"])
    unet.save_pretrained(tmp_path, dtype=torch.float16)
    stored = load_safetensors(tmp_path / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert same_weights(UNet.from_pretrained(tmp_path), unet.half().float())


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    UNet(CONFIGS["one level"]).save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: no such file"):
        UNet.from_pretrained(tmp_path)


def test_weights_that_do_not_fit_are_refused_and_the_first_is_named(tmp_path: Path) -> None:
    unet = UNet(CONFIGS["sd1"])
    other = dataclasses.replace(unet.config, cross_attention_dim=10)
    unet.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(other.to_dict()))
    with pytest.raises(
        ValueError, match=r"first down_blocks\.0.*to_k\.weight: \(8, 12\).*\(8, 10\)"
    ):
        UNet.from_pretrained(tmp_path)

    unet.save_pretrained(tmp_path)
    tensors = load_safetensors(tmp_path / WEIGHTS)
    del tensors["conv_out.bias"]
    save_safetensors(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"1 tensors, first conv_out\.bias: missing in the file"):
        UNet.from_pretrained(tmp_path)
    tensors = {**unet.state_dict(), "class_embedding.weight": torch.zeros(3)}
    save_safetensors(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"first class_embedding\.weight: \(3,\).* none by"):
        UNet.from_pretrained(tmp_path)


@each_config
def test_a_new_network_is_the_zero_function_and_so_is_every_branch(config: UNetConfig) -> None:
    unet = UNet(config)
    assert not unet(*inputs(config)).any()
    zeros = [unet.conv_out]
    for module in unet.modules():
        if isinstance(module, ResnetBlock):
            zeros.append(module.conv2)
            x = torch.randn(2, module.conv1.in_channels, 4, 4)
            shortcut = x if module.conv_shortcut is None else module.conv_shortcut(x)
            time = torch.randn(2, config.time_width)
            assert torch.equal(module(x, time), shortcut)
        elif isinstance(module, SpatialTransformer):
            zeros.append(module.proj_out)
            x = torch.randn(2, module.norm.num_channels, 4, 4)
            assert torch.equal(module(x, torch.randn(2, 5, config.cross_attention_dim)), x)
    names = {id(parameter): name for name, parameter in unet.named_parameters()}
    zeroed = {names[id(p)] for module in zeros for p in module.parameters()}
    suffixes = ("conv2.weight", "conv2.bias", "proj_out.weight", "proj_out.bias")
    expected = {name for name in names.values() if name.endswith(suffixes)}
    assert zeroed == expected | {"conv_out.weight", "conv_out.bias"}
    assert not any(p.any() for module in zeros for p in module.parameters())


@pytest.mark.parametrize("name", POOLED)
def test_pooled_text_reaches_where_no_attention_does(name: str) -> None:
    """A network without attention sees its text through the time alone, each example its own."""
    sees = dataclasses.replace(
        CONFIGS[name],
        down_block_types=[DOWN[0]] * 2,
        up_block_types=[UP[0]] * 2,
        mid_block_type="UNetMidBlock2D",
    )
    unet = ours(sees).double()
    x, timestep, context = inputs(sees, dtype=torch.float64)
    expected = unet(x, timestep, context)
    assert not torch.allclose(unet(x, timestep, context.flip(0)), expected, atol=1e-3)
    torch.testing.assert_close(unet(x, timestep, context.flip(1)), expected)  # no order of words
    context[1] = torch.randn_like(context[1])
    changed = unet(x, timestep, context)
    torch.testing.assert_close(changed[0], expected[0], rtol=0, atol=1e-10)
    assert not torch.allclose(changed[1], expected[1], atol=1e-3)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (
            {
                "addition_embed_type": "text",
                "addition_embed_type_num_heads": 2,
                "class_embed_type": "simple_projection",
            },
            "class_embed_type='simple_projection' must be null where addition_embed_type is given",
        ),
        (
            {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 8},
            "projection_class_embeddings_input_dim=8 must be 12: cross_attention_dim",
        ),
    ],
)
def test_pooled_text_that_cannot_be_is_refused_in_words(
    keys: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        UNetConfig.from_dict({**CONFIGS["sd1"].to_dict(), **keys})


def test_the_heads_that_pool_the_text_must_divide_its_width_and_not_the_default_one() -> None:
    """A training sets the width after its options are read; 20 was refused, as 5 is not in 768."""
    keys: dict[str, Any] = {"addition_embed_type": "text", "addition_embed_type_num_heads": 5}
    as_read = dataclasses.replace(CONFIGS["sd1"], cross_attention_dim=768, **keys)
    known = dataclasses.replace(as_read, cross_attention_dim=20)
    x, timestep, context = inputs(known)
    assert ours(known)(x, timestep, context).shape == x.shape
    with pytest.raises(ValueError, match="_num_heads=5 must divide cross_attention_dim=768"):
        UNet(as_read)


def test_from_zero_the_gradient_reaches_the_output_first_and_every_parameter_in_three_steps() -> (
    None
):
    """Zero layers pass no gradient to what lies before them until they have moved themselves."""
    unet = UNet(CONFIGS["sd1"]).double()
    x, timestep, context = inputs(unet.config, dtype=torch.float64)
    for step in range(3):
        found = gradients(unet(x, timestep, context), unet, ())
        if step == 0:
            reached = {name for name, gradient in found.items() if gradient.any()}
            assert reached == {"conv_out.weight", "conv_out.bias"}
        with torch.no_grad():
            for name, parameter in unet.named_parameters():
                parameter -= 0.1 * found[name]
    assert all(gradient.any() for gradient in found.values())
