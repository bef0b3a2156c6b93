"""LoHa, LoKr and DoRA: LyCORIS' formulas, and what several files do together."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.interchange_table import Measured
from support.loras import difference, ours
from support.lycoris import ALL, AXES, CHANGES, lycoris_file
from support.tiny import double_pipeline
from torch import nn

from latentdiff.cli import main
from latentdiff.formats.lora import check_without_loras, is_lora, read_lora
from latentdiff.formats.lora_layers import kind
from latentdiff.models.lora import LoRAs
from latentdiff.pipeline import Pipeline

pytestmark = pytest.mark.interchange


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    return double_pipeline(tmp_path / "tokenizer")


@pytest.fixture
def loras(pipeline: Pipeline) -> LoRAs:
    return LoRAs(pipeline.unet, pipeline.text_encoder.model, pipeline.diffusion)


def layers(pipeline: Pipeline) -> Iterator[tuple[int, str, nn.Linear | nn.Conv2d]]:
    for i, network in enumerate((pipeline.unet, pipeline.text_encoder.model)):
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                yield i, name, module


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("axis", AXES)
def test_every_kind_changes_weights_by_the_formula_of_lycoris(
    pipeline: Pipeline,
    loras: LoRAs,
    tmp_path: Path,
    name: str,
    axis: int | None,
    measured: Measured,
) -> None:
    """Linear layers and convolutions of both networks, alphas by layer; unfused, then fused."""
    path, changes = lycoris_file(tmp_path / "x.safetensors", pipeline, [(name, axis)])
    expected = {(i, n): m.weight.detach() + changes[i].get(n, 0) for i, n, m in layers(pipeline)}
    base = ours(pipeline)
    loras.load(path)
    unfused = ours(pipeline)
    loras.fuse()
    found = {(i, n): m.weight.detach() for i, n, m in layers(pipeline)}
    assert found.keys() == expected.keys()
    assert all(difference(found[key], expected[key]) < 1e-12 for key in expected)
    assert difference(ours(pipeline), unfused) < 1e-12
    assert difference(base, unfused) > 0.1
    worst = max(difference(found[key], expected[key]) for key in expected)
    title = name.partition(",")[0].partition(" ")[0]
    title = "DoRA" if title == "LoRA" and axis is not None else title
    if title != "LoRA":
        measured(title, "read", "LyCORIS' formula", "weights, float64", worst)


def test_a_file_may_hold_another_kind_in_every_layer(
    pipeline: Pipeline, loras: LoRAs, tmp_path: Path
) -> None:
    path, changes = lycoris_file(tmp_path / "x.safetensors", pipeline)
    file = read_lora(path, layers_per_block=1)
    assert is_lora(path)
    assert {kind(layer) for layer in file.unet.values()} == {
        *("LoRA", "LoHa", "LoKr", "DoRA", "LoHa with DoRA", "LoKr with DoRA")
    }
    loras.load(path)
    unfused = ours(pipeline)
    loras.unload()
    for i, name, module in layers(pipeline):
        module.weight.data += changes[i].get(name, 0)
    assert difference(unfused, ours(pipeline)) < 1e-12


def test_files_of_all_kinds_add_up_in_any_order_each_times_its_scale(
    pipeline: Pipeline, loras: LoRAs, tmp_path: Path
) -> None:
    """peft's DoRA would multiply what was loaded before it, and scale 0 would not be off."""
    scales = {"a": 0.5, "b": -1.25, "c": 0.75}  # exact in float32, which peft's LoHa computes with
    files = {
        name: lycoris_file(tmp_path / name, pipeline, ALL[i:] + ALL[:i], seed=i)
        for i, name in enumerate(scales)
    }
    base = {(i, name): module.weight.detach().clone() for i, name, module in layers(pipeline)}
    for name, scale in scales.items():
        loras.load(files[name][0], name=name, scale=scale)
    unfused = ours(pipeline)
    loras.unload()
    for name in reversed(scales):
        loras.load(files[name][0], name=name, scale=2)
    loras.set_scales(scales)
    assert difference(ours(pipeline), unfused) < 1e-12
    loras.fuse()
    for i, name, module in layers(pipeline):
        expected = base[i, name] + sum(
            scale * files[file][1][i].get(name, 0) for file, scale in scales.items()
        )
        assert difference(module.weight.detach(), expected) < 1e-12
    assert difference(ours(pipeline), unfused) < 1e-12
    for network in (pipeline.unet, pipeline.text_encoder.model):
        check_without_loras(network)


def test_scale_zero_and_unloading_give_the_networks_bit_for_bit(
    pipeline: Pipeline, loras: LoRAs, tmp_path: Path
) -> None:
    """And loading takes nothing from the global random numbers, and freezes no weight."""
    paths = [lycoris_file(tmp_path / f"{i}", pipeline, ALL[i:] + ALL[:i])[0] for i in range(2)]
    base, weights = ours(pipeline), dict(pipeline.unet.named_parameters())
    state = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    random_state = torch.get_rng_state()
    for path in paths:
        loras.load(path)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert difference(ours(pipeline), base) > 0.1
    with pytest.raises(ValueError, match="cannot be saved"):
        check_without_loras(pipeline.unet)
    loras.set_scales({"0": 0.0})
    assert torch.equal(ours(pipeline), base)
    loras.unload()
    assert torch.equal(ours(pipeline), base)
    found = dict(pipeline.unet.named_parameters())
    assert {name: id(parameter) for name, parameter in found.items()} == {
        name: id(parameter) for name, parameter in weights.items()
    }
    assert all(parameter.requires_grad for parameter in weights.values())
    assert all(torch.equal(pipeline.unet.state_dict()[name], state[name]) for name in state)


def test_what_is_zero_stays_zero_at_any_magnitude(
    pipeline: Pipeline, loras: LoRAs, tmp_path: Path
) -> None:
    """A model that was made to inpaint has inputs whose weights are zero: 0 / 0 is no number."""
    weight = pipeline.unet.conv_in.weight
    with torch.no_grad():
        weight[:, 3] = 0
    down, up = torch.ones(1, *weight.shape[1:]), torch.ones(len(weight), 1, 1, 1)
    down[:, 3] = 0
    name = "lora_unet_conv_in"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    save_file(tensors | {f"{name}.dora_scale": torch.ones(1, 4, 1, 1)}, tmp_path / "x.safetensors")
    loras.load(tmp_path / "x.safetensors")
    assert torch.isfinite(ours(pipeline)).all()
    loras.fuse()
    assert not pipeline.unet.conv_in.weight[:, 3].any()
    assert torch.allclose(pipeline.unet.conv_in.weight[:, 0].norm(), torch.ones(()).double())


def test_half_precision_networks_take_all_kinds_in_their_own_precision(
    pipeline: Pipeline, loras: LoRAs, tmp_path: Path
) -> None:
    path = lycoris_file(tmp_path / "x.safetensors", pipeline)[0]
    pipeline.to(torch.bfloat16)
    loras.load(path)
    assert {parameter.dtype for parameter in pipeline.unet.parameters()} == {torch.bfloat16}
    pipeline("a cat", steps=1, seed=0, progress=False)
    loras.fuse()
    assert {parameter.dtype for parameter in pipeline.unet.parameters()} == {torch.bfloat16}


def test_convert_merges_every_kind_and_rewrites_plain_loras_alone(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.to(torch.float32)
    pipeline.save_pretrained(tmp_path / "model")
    path = lycoris_file(tmp_path / "x.safetensors", pipeline.to(torch.float64))[0]
    merging = [
        "convert",
        str(tmp_path / "model"),
        str(tmp_path / "merged"),
        "--lora",
        f"{path}:0.5",
    ]
    assert main(merging) == 0
    merged, by_hand = (Pipeline.from_pretrained(tmp_path / n) for n in ("merged", "model"))
    by_hand.loras.load(path, scale=0.5)
    by_hand.loras.fuse()
    assert torch.equal(ours(merged), ours(by_hand))
    capsys.readouterr()
    for option in (["--lora_rank", "1"], ["--lora_names", "diffusers"], []):
        command = ["convert", str(path), str(tmp_path / "y.safetensors"), *option]
        assert main(command) == 2
        error = capsys.readouterr().err
        assert re.search(r"is a (DoRA|Lo[HK].*), and a plain LoRA alone can get another", error)
        assert error.count("\n") == 1
        assert not (tmp_path / "y.safetensors").exists()
