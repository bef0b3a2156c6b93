"""Names of LDM and diffusers for one another: against diffusers' reader and LDM's way to build."""

from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from hypothesis import HealthCheck, given, settings
from support.cases import mostly_exhaustive
from support.ldm import ldm_unet, ldm_vae
from support.parity import shapes
from support.strategies import unet_configs, vae_configs
from torch import nn

from latentdiff.formats.ldm.keys import (
    MAX_BLOCKS,
    clip_from_ldm,
    is_vae_convolution,
    unet_from_ldm,
    unet_to_ldm,
    vae_from_ldm,
    vae_to_ldm,
)
from latentdiff.formats.ldm.keys import (
    UNET as UNET_PREFIX,
)
from latentdiff.formats.ldm.shapes import infer_unet_config, infer_vae_config
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.models.vae import VAE, VAEConfig

same_examples = settings(
    derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
SD2 = UNetConfig(
    cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
)


def empty(cls: Any, config: Any) -> nn.Module:
    with torch.device("meta"):
        return cls(config)


def check_unet(config: UNetConfig) -> None:
    theirs = shapes(empty(UNet, config))
    names = unet_to_ldm(theirs)
    assert {ldm: theirs[name] for name, ldm in names.items()} == ldm_unet(config)
    assert unet_from_ldm(names.values()) == {ldm: name for name, ldm in names.items()}
    # diffusers moves values by name; here each value is the name where it belongs.
    marked = {UNET_PREFIX + ldm: name for name, ldm in names.items()}
    read = convert_ldm_unet_checkpoint(marked, {"layers_per_block": config.layers_per_block})
    assert read == {name: name for name in names}


def check_vae(config: VAEConfig) -> None:
    vae = empty(VAE, config)
    theirs = shapes(vae)
    names = vae_to_ldm(theirs)
    ldm_shapes = {
        ldm: theirs[name] + ((1, 1) if is_vae_convolution(name) else ())
        for name, ldm in names.items()
    }
    assert ldm_shapes == ldm_vae(config)
    assert vae_from_ldm(names.values()) == {ldm: name for name, ldm in names.items()}
    tensors = {ldm: torch.empty(shape, device="meta") for ldm, shape in ldm_shapes.items()}
    values = vae.config.to_dict()
    read = convert_ldm_vae_checkpoint(
        {f"first_stage_model.{n}": t for n, t in tensors.items()}, values
    )
    assert {name: tuple(tensor.shape) for name, tensor in read.items()} == theirs


@settings(same_examples, max_examples=8)
@given(unet_configs())
def test_a_unet_of_any_shape_has_ldms_names_and_diffusers_reads_them(config: UNetConfig) -> None:
    check_unet(config)


@settings(same_examples, max_examples=20)
@given(vae_configs())
def test_a_vae_of_any_shape_has_ldms_names_and_diffusers_reads_them(config: VAEConfig) -> None:
    check_vae(config)


@settings(same_examples, max_examples=8)
@given(unet_configs())
def test_what_shows_of_a_unets_configuration_is_read_from_its_shapes(config: UNetConfig) -> None:
    theirs = shapes(empty(UNet, config))
    attends = any(".attentions." in name for name in theirs)
    found = infer_unet_config(theirs)
    assert ("cross_attention_dim" in found) == attends
    expected = config.to_dict()
    if not attends:  # then it shows in nothing
        expected["use_linear_projection"] = False
    for key, value in found.items():
        assert value == (list(expected[key]) if isinstance(value, list) else expected[key])


@settings(same_examples, max_examples=20)
@given(vae_configs())
def test_what_shows_of_a_vaes_configuration_is_read_from_its_shapes(config: VAEConfig) -> None:
    found = infer_vae_config(shapes(empty(VAE, config)))
    expected = config.to_dict() | {"block_out_channels": list(config.block_out_channels)}
    assert found == {key: expected[key] for key in found}


@pytest.mark.parametrize(
    "config", mostly_exhaustive([UNetConfig(), SD2, UNetConfig(in_channels=9)])
)
def test_published_unets_have_686_tensors_under_ldms_names(config: UNetConfig) -> None:
    check_unet(config)
    theirs = shapes(empty(UNet, config))
    assert len(theirs) == 686
    found = {ldm: theirs[name] for name, ldm in unet_to_ldm(theirs).items()}
    context = config.cross_attention_dim
    block = "transformer_blocks.0"
    assert found["input_blocks.0.0.weight"] == (320, config.in_channels, 3, 3)
    assert found[f"input_blocks.1.1.{block}.attn2.to_k.weight"] == (320, context)
    assert found["input_blocks.3.0.op.weight"] == (320, 320, 3, 3)
    assert found["input_blocks.4.0.skip_connection.weight"] == (640, 320, 1, 1)
    assert found[f"middle_block.1.{block}.ff.net.0.proj.weight"] == (10240, 1280)
    assert found["output_blocks.2.1.conv.weight"] == (1280, 1280, 3, 3)
    assert found["output_blocks.5.2.conv.weight"] == (1280, 1280, 3, 3)
    assert found["output_blocks.11.0.skip_connection.weight"] == (320, 640, 1, 1)
    assert found["output_blocks.11.1.proj_in.weight"] == (
        (320, 320) if config.use_linear_projection else (320, 320, 1, 1)
    )
    assert found["out.2.weight"] == (4, 320, 3, 3)


def test_the_published_vae_has_248_tensors_under_ldms_names() -> None:
    check_vae(VAEConfig())
    theirs = shapes(empty(VAE, VAEConfig()))
    assert len(theirs) == 248
    found = {ldm: theirs[name] for name, ldm in vae_to_ldm(theirs).items()}
    assert found["decoder.up.0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1)
    assert found["decoder.up.3.upsample.conv.weight"] == (512, 512, 3, 3)
    assert found["encoder.down.2.downsample.conv.bias"] == (512,)
    assert found["encoder.mid.attn_1.proj_out.bias"] == (512,)
    assert found["quant_conv.weight"] == (8, 8, 1, 1)


def test_text_towers_with_and_without_their_prefix_are_read_alike() -> None:
    name = "encoder.layers.0.mlp.fc1.weight"
    for given_name in (name, f"text_model.{name}"):
        assert clip_from_ldm([given_name]) == {given_name: f"text_model.{name}"}


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (unet_from_ldm, "input_blocks.1.0.in_layers.9.weight"),
        (unet_from_ldm, "label_emb.0.0.weight"),
        (unet_to_ldm, "class_embedding.linear_1.weight"),
        (vae_from_ldm, "encoder.down.7.block.0.conv1.weight"),
        (vae_from_ldm, "decoder.conv_in"),
        (vae_to_ldm, "encoder.down_blocks.0.resnets.0.time_emb_proj.weight"),
        (clip_from_ldm, "text_model.encoder.layers.0.mlp.fc3.weight"),
        (unet_from_ldm, "." * 1_000_000),
    ],
)
def test_a_name_that_sd_has_not_is_refused(read: Any, name: str) -> None:
    with pytest.raises(ValueError, match="is no tensor of Stable Diffusion"):
        read([name])


def test_more_blocks_than_any_network_has_are_refused_at_once() -> None:
    names = [f"input_blocks.{i}.0.op.weight" for i in range(50_000)]
    with pytest.raises(ValueError, match=f"more than {MAX_BLOCKS} blocks"):
        unet_from_ldm(names)
