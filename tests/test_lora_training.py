"""A new LoRA in a network: the layers by the trainers' rules, and what training it changes."""

import copy
import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from support.runs import make_learner
from support.tiny import tiny_pipeline
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from latentdiff.formats.header import read_header
from latentdiff.formats.lora import LoRAFile, read_lora
from latentdiff.formats.lora_layers import LoRALayer
from latentdiff.formats.lora_writing import write_lora
from latentdiff.models.lora_training import (
    TEXT_LAYERS,
    UNET_LAYERS,
    LoRAConfig,
    add_lora,
    trained_lora,
    unet_pattern,
)
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.pipeline import Pipeline

SD15_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    return tiny_pipeline(tmp_path)


def step(pipeline: Pipeline, unet: nn.Module) -> torch.Tensor:
    c, rng = pipeline.unet.config, torch.Generator().manual_seed(0)
    x = torch.randn(2, c.in_channels, 8, 8, generator=rng)
    states = torch.randn(2, 5, c.cross_attention_dim, generator=rng)
    return unet(x, torch.tensor([10.0, 700.0]), states)


def test_the_layers_are_those_of_kohya_and_of_diffusers() -> None:
    """192 modules in SD 1.5's transformers, 70 more with convolutions, and 128 of attention."""
    with torch.device("meta"):
        unet = UNet(UNetConfig())
    names = [n for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]

    def count(*kinds: str) -> int:
        pattern = unet_pattern(LoRAConfig(layers=kinds))  # pyright: ignore[reportArgumentType]
        return sum(bool(re.fullmatch(pattern, name)) for name in names)

    assert count("attention") == 128
    assert count("attention", "feed_forward", "projections") == 192
    assert count(*UNET_LAYERS) == 192 + 2 * 22 + 14 + 3 + 3


def test_a_new_lora_changes_no_bit_and_its_training_nothing_else(pipeline: Pipeline) -> None:
    unet = pipeline.unet
    before, weights = step(pipeline, unet), copy.deepcopy(unet.state_dict())
    count = add_lora(unet, LoRAConfig(rank=4), unet_pattern(LoRAConfig()), seed=0)
    assert torch.equal(step(pipeline, unet), before)
    learner = make_learner(unet, learning_rate=1e-2, max_steps=9, ema_decay=0.5)
    assert len(learner.trained) == 2 * count
    for _ in range(3):
        learner.update(step(pipeline, learner.forward_model).square().mean())
    assert not torch.equal(step(pipeline, unet), before)
    for name, module in unet.named_modules():
        if name.removesuffix(".base_layer") + ".weight" in weights and hasattr(module, "weight"):
            assert torch.equal(module.weight, weights[name.removesuffix(".base_layer") + ".weight"])


def test_a_lora_of_half_precision_is_itself_in_float32(pipeline: Pipeline) -> None:
    """peft gave it the network's bfloat16, in which a step of AdamW is mostly rounded away."""
    unet = pipeline.unet.to(torch.bfloat16)
    add_lora(unet, LoRAConfig(rank=4), unet_pattern(LoRAConfig()), seed=0)
    assert {p.dtype for p in unet.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in unet.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_the_file_of_the_average_draws_what_the_average_draws(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    config = LoRAConfig(rank=3, alpha=1.5, layers=tuple(UNET_LAYERS), text_encoder=True)  # pyright: ignore[reportArgumentType]
    base = copy.deepcopy(pipeline.unet)
    add_lora(pipeline.unet, config, unet_pattern(config), seed=0)
    learner = make_learner(pipeline.unet, learning_rate=1e-2, max_steps=9, ema_decay=0.5)
    for _ in range(3):
        learner.update(step(pipeline, learner.forward_model).square().mean())
    path = tmp_path / "lora.safetensors"
    write_lora(LoRAFile(trained_lora(learner.ema), {}), path, dtype=torch.float32)
    assert {layer.alpha for layer in read_lora(path, layers_per_block=1).unet.values()} == {1.5}
    expected = step(pipeline, learner.ema)
    fresh = Pipeline(
        unet=base,
        vae=pipeline.vae,
        text_encoder=pipeline.text_encoder,
        diffusion=pipeline.diffusion,
    )
    fresh.loras.load(path)
    assert torch.equal(step(pipeline, fresh.unet), expected)


def test_a_text_encoder_takes_one_too(pipeline: Pipeline) -> None:
    model = pipeline.text_encoder.model
    layers = sum(isinstance(m, nn.Linear) for n, m in model.named_modules() if "layers" in n)
    assert add_lora(model, LoRAConfig(rank=2), TEXT_LAYERS, seed=0) == layers
    assert all(name.startswith("encoder.") for name in trained_lora(model))


def test_every_name_in_the_file_is_one_that_kohya_and_comfyui_look_for(tmp_path: Path) -> None:
    """Of SD 1.5: by the rule of kohya's networks/lora.py, which names the linear layers and
    convolutions inside of certain classes of diffusers, and by that of comfy/lora.py, which takes
    the names of diffusers' weights. kohya's rule finds no other layers than ours either."""
    with torch.device("meta"):
        unet = UNet(UNetConfig())
        theirs = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        tower = CLIPTextModel(CLIPTextConfig(**SD15_TEXT))

    def by_class(prefix: str, network: nn.Module, classes: set[str]) -> set[str]:
        return {
            ".".join(filter(None, (prefix, name, inner))).replace(".", "_")
            for name, module in network.named_modules()
            if type(module).__name__ in classes
            for inner, layer in module.named_modules()
            if type(layer).__name__ in ("Linear", "Conv2d", "LoRACompatibleConv")
        }

    blocks = {"Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"}
    kohya = by_class("lora_unet", theirs, blocks)
    kohya = {name for name in kohya if "time_emb_proj" not in name}  # ours leaves them alone
    text = tower if hasattr(tower, "text_model") else nn.ModuleDict({"text_model": tower})
    kohya |= by_class("lora_te", text, {"CLIPAttention", "CLIPMLP"})
    comfyui = {
        f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        for name in theirs.state_dict()
        if name.endswith(".weight")
    }
    comfyui |= {
        f"lora_te_text_model_encoder_layers_{number}_{name}"
        for number in range(12)
        for name in (
            *("mlp_fc1", "mlp_fc2", "self_attn_k_proj", "self_attn_q_proj", "self_attn_v_proj"),
            "self_attn_out_proj",
        )
    }
    config = LoRAConfig(layers=tuple(UNET_LAYERS))  # pyright: ignore[reportArgumentType]
    inner = getattr(tower, "text_model", tower)
    file = LoRAFile(
        thin(unet, unet_pattern(config)),
        thin(inner, TEXT_LAYERS),
    )
    write_lora(file, tmp_path / "lora.safetensors")
    names = {name.partition(".")[0] for name in read_header(tmp_path / "lora.safetensors").shapes}
    assert names == kohya
    assert names <= comfyui


def thin(network: nn.Module, pattern: str) -> dict[str, LoRALayer]:
    """A LoRA of rank 1 on the layers that match, whose weights are on the meta device."""
    return {
        name: LoRALayer(
            torch.ones(1, *module.weight.shape[1:]),
            torch.ones(len(module.weight), 1, *(1 for _ in module.weight.shape[2:])),
            1.0,
        )
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and re.fullmatch(pattern, name)
    }


def test_what_cannot_be_is_refused(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match=r"lora\.rank=0 must be at least 1"):
        LoRAConfig(rank=0)
    with pytest.raises(ValueError, match=r"lora\.alpha=nan must be positive"):
        LoRAConfig(alpha=float("nan"))
    with pytest.raises(ValueError, match=r"lora\.layers: 'attn' must be one of attention, feed"):
        LoRAConfig(layers=("attn",))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"lora\.rank=4096 must be at most \d+, the rank of "):
        add_lora(pipeline.unet, LoRAConfig(rank=4096), unet_pattern(LoRAConfig()), seed=0)
    with pytest.raises(ValueError, match="the Linear has no layer for a LoRA"):
        add_lora(nn.Linear(2, 2), LoRAConfig(), TEXT_LAYERS, seed=0)
