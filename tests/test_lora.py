"""LoRAs: diffusers' and kohya's files, the same numbers as diffusers, and networks left whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from support.interchange_table import Measured
from support.loras import (
    ATTENTION,
    SOME,
    TEXT,
    UNET,
    Tensors,
    difference,
    in_kohya_names,
    in_peft_names,
    kohya_file,
    ours,
    outputs,
    random_lora,
)
from support.tiny import tiny_pipeline
from torch import nn

from latentdiff.diffusion import Diffusion
from latentdiff.formats.lora import check_without_loras
from latentdiff.models.lora import LoRAs
from latentdiff.pipeline import Pipeline

pytestmark = pytest.mark.interchange


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    return tiny_pipeline(tmp_path / "tokenizer", Diffusion("scaled_linear", "epsilon"))


@pytest.fixture
def loras(pipeline: Pipeline) -> LoRAs:
    return LoRAs(pipeline.unet, pipeline.text_encoder.model, pipeline.diffusion)


@pytest.fixture
def theirs(pipeline: Pipeline, tmp_path: Path) -> Any:
    """diffusers' pipeline of the same weights."""
    pipeline.save_pretrained(tmp_path / "pipeline")
    return StableDiffusionPipeline.from_pretrained(
        tmp_path / "pipeline", safety_checker=None, requires_safety_checker=False
    )


def trained_by_diffusers(theirs: Any, *, use_rslora: bool) -> tuple[Tensors, Tensors, list[Any]]:
    """Adapters that diffusers and transformers put on, as a training script does, and trained."""
    parts = []
    for network, names, pattern in (
        (theirs.unet, [*SOME, "to_q"], {"attn2.to_k": 2, "conv_in": 5}),
        (theirs.text_encoder, TEXT, {"fc1": 1}),
    ):
        ranks = {name: rank + 1 for name, rank in pattern.items()}
        config = LoraConfig(
            r=4,
            lora_alpha=6,
            rank_pattern=ranks,
            alpha_pattern=pattern,
            target_modules=names,
            use_rslora=use_rslora,
        )
        network.add_adapter(config)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.2)
        parts.append((get_peft_model_state_dict(network), network.peft_config["default"]))
    (unet, unet_config), (text, text_config) = parts
    return unet, text, [unet_config.to_dict(), text_config.to_dict()]


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_file_of_diffusers_gives_the_outputs_it_was_trained_to(
    pipeline: Pipeline,
    loras: LoRAs,
    theirs: Any,
    tmp_path: Path,
    use_rslora: bool,
    measured: Measured,
) -> None:
    """UNet and text tower, ranks and alphas by layer, which the metadata carry."""
    unet, text, configs = trained_by_diffusers(theirs, use_rslora=use_rslora)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=unet,
        text_encoder_lora_layers=text,
        unet_lora_adapter_metadata=configs[0],
        text_encoder_lora_adapter_metadata=configs[1],
    )
    base = ours(pipeline)
    assert loras.load(tmp_path / "pytorch_lora_weights.safetensors") == "pytorch_lora_weights"
    expected = outputs(theirs.unet, theirs.text_encoder)
    found = difference(ours(pipeline), expected)
    measured("LoRA", "read", "diffusers, peft", "outputs, float64, ranks by layer", found)
    assert found < 1e-12
    assert difference(base, expected) > 0.1


@pytest.mark.exhaustive
@pytest.mark.parametrize("naming", ["peft", "diffusers", "old"])
def test_every_naming_of_diffusers_is_read_as_by_diffusers(
    pipeline: Pipeline, loras: LoRAs, theirs: Any, tmp_path: Path, naming: str, measured: Measured
) -> None:
    names = [*ATTENTION, *SOME] if naming == "peft" else ATTENTION
    unet = random_lora(pipeline.unet, names, rank=3)
    names = TEXT[:4] if naming == "old" else TEXT
    text = random_lora(pipeline.text_encoder.model, names, rank=3)
    if naming == "diffusers":
        unet, text = convert_state_dict_to_diffusers(unet), convert_state_dict_to_diffusers(text)
    if naming == "old":
        halves = {"lora_A": "lora.down", "lora_B": "lora.up"}
        for old, new in halves.items():
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                after = f"processor.{name.removesuffix('.0')}_{new}"
                unet = {k.replace(f"{name}.{old}", after): v for k, v in unet.items()}
            for name in ("q", "k", "v", "out"):
                text = {
                    k.replace(f"{name}_proj.{old}", f"to_{name}_{new}"): v for k, v in text.items()
                }
        assert all("_lora." in name for name in [*unet, *text])
    path = tmp_path / "lora.safetensors"
    save_file(in_peft_names(unet, text), path)
    theirs.load_lora_weights(path)
    loras.load(path)
    found = difference(ours(pipeline), outputs(theirs.unet, theirs.text_encoder))
    measured("LoRA", "read", "diffusers, peft", "outputs, float64, three namings", found)
    assert found < 1e-12


def test_a_file_of_kohya_is_read_as_by_diffusers(
    pipeline: Pipeline, loras: LoRAs, theirs: Any, tmp_path: Path, measured: Measured
) -> None:
    path = kohya_file(tmp_path / "kohya.safetensors", pipeline, alpha=1.5, names=UNET)
    base = ours(pipeline)
    theirs.load_lora_weights(path)
    loras.load(path)
    expected = outputs(theirs.unet, theirs.text_encoder)
    found = difference(ours(pipeline), expected)
    measured("LoRA", "read", "kohya, which diffusers reads too", "outputs, float64", found)
    assert found < 1e-12
    assert difference(base, expected) > 0.1


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # diffusers' own
def test_several_files_with_scales_are_mixed_as_by_diffusers(
    pipeline: Pipeline, loras: LoRAs, theirs: Any, tmp_path: Path
) -> None:
    """The second has other layers, and none in the text tower."""
    first = kohya_file(tmp_path / "first.safetensors", pipeline, alpha=2)
    second = tmp_path / "second.safetensors"
    save_file(in_peft_names(random_lora(pipeline.unet, ATTENTION[:2], rank=2, seed=1)), second)
    for path, scale in ((first, 0.3), (second, -1.2)):
        theirs.load_lora_weights(path, adapter_name=path.stem)
        loras.load(path, scale=scale)
    assert loras.scales == {"first": 0.3, "second": -1.2}
    theirs.set_adapters(["first", "second"], [0.3, -1.2])
    assert difference(ours(pipeline), outputs(theirs.unet, theirs.text_encoder)) < 1e-12
    loras.set_scales({"second": 0.7})
    theirs.set_adapters("second", 0.7)
    assert difference(ours(pipeline), outputs(theirs.unet, theirs.text_encoder)) < 1e-12


def test_loras_change_weights_by_the_sum_of_scale_alpha_over_rank_up_down(
    pipeline: Pipeline, loras: LoRAs, tmp_path: Path
) -> None:
    """Alphas differ by layer, and some have none, which is alpha = rank."""
    layers = [n for n, m in pipeline.unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    expected = {name: tensor.double() for name, tensor in pipeline.unet.state_dict().items()}
    files = [random_lora(pipeline.unet, UNET, rank=rank, seed=rank) for rank in (4, 3)]
    for i, (lora, scale) in enumerate(zip(files, (0.8, -0.5), strict=True)):
        rank = 4 - i
        alphas = {layer: 0.5 * (j % 5) for j, layer in enumerate(layers) if j % 7}
        path = tmp_path / f"{i}.safetensors"
        save_file(in_kohya_names(lora, "lora_unet_", alphas), path)
        loras.load(path, scale=scale)
        for name in {name.partition(".lora_")[0] for name in lora}:
            down, up = (lora[f"{name}.lora_{half}.weight"].double() for half in "AB")
            change = torch.einsum("or...,ri...->oi...", up, down)
            factor = scale * alphas.get(name, rank) / rank
            expected[f"{name}.weight"] = expected[f"{name}.weight"] + factor * change
    unfused = ours(pipeline)
    loras.fuse()
    assert difference(ours(pipeline), unfused) < 1e-12
    found = pipeline.unet.state_dict()
    assert found.keys() == expected.keys()
    assert all(difference(found[name], expected[name]) < 1e-12 for name in expected)


def test_fused_float32_networks_compute_the_same_but_for_rounding(
    pipeline: Pipeline, loras: LoRAs, tmp_path: Path
) -> None:
    """9e-7 here; another processor's order of adding has to fit in too."""
    loras.load(kohya_file(tmp_path / "a.safetensors", pipeline, alpha=1), scale=0.5)
    context = pipeline.encode(["red"])
    noise, timestep = torch.randn(1, 4, 8, 8), torch.tensor([300])
    with torch.no_grad():
        unfused = pipeline.unet(noise, timestep, context)
        loras.fuse()
        fused = pipeline.unet(noise, timestep, context)
    for after, before in ((pipeline.encode(["red"]), context), (fused, unfused)):
        assert (after - before).norm() < 3e-6 * before.norm()


def test_networks_are_the_old_ones_bit_for_bit_at_scale_zero_and_after_unloading(
    pipeline: Pipeline, loras: LoRAs, tmp_path: Path
) -> None:
    """And loading takes nothing from the global random numbers, and freezes no weight."""
    path = kohya_file(tmp_path / "x.safetensors", pipeline, alpha=1)
    base, weights = ours(pipeline), dict(pipeline.unet.named_parameters())
    state = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    random_state = torch.get_rng_state()
    for name in "ab":
        loras.load(path, name=name)
    assert torch.equal(torch.get_rng_state(), random_state)
    with_both = ours(pipeline)
    loras.set_scales({"a": 0.0})
    assert torch.equal(ours(pipeline), base)
    loras.set_scales({"a": 1, "b": 1})
    assert torch.equal(ours(pipeline), with_both)
    loras.unload()
    assert loras.scales == {}
    assert torch.equal(ours(pipeline), base)
    assert {n: id(p) for n, p in pipeline.unet.named_parameters()} == {
        n: id(p) for n, p in weights.items()
    }
    assert all(parameter.requires_grad for parameter in weights.values())
    found = pipeline.unet.state_dict()
    assert list(found) == list(state)
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_networks_with_loras_are_not_saved_under_the_names_of_peft(
    pipeline: Pipeline, loras: LoRAs, tmp_path: Path
) -> None:
    networks = (pipeline.unet, pipeline.text_encoder)
    loras.load(kohya_file(tmp_path / "x.safetensors", pipeline, alpha=1))
    for network in networks:
        with pytest.raises(ValueError, match=r"cannot be saved.*fuse_loras.*unload_loras"):
            check_without_loras(network)
    loras.fuse()
    for network in networks:
        check_without_loras(network)


def test_unloading_after_fusing_says_that_it_is_impossible(
    pipeline: Pipeline, loras: LoRAs, tmp_path: Path
) -> None:
    loras.load(kohya_file(tmp_path / "x.safetensors", pipeline, alpha=1))
    loras.fuse()
    for action in (loras.unload, loras.fuse):
        with pytest.raises(ValueError, match="fused into the weights already"):
            action()


def test_half_precision_networks_take_loras_in_their_own_precision(
    pipeline: Pipeline, loras: LoRAs, tmp_path: Path
) -> None:
    pipeline.to(torch.bfloat16)
    loras.load(kohya_file(tmp_path / "x.safetensors", pipeline, alpha=1))
    assert {parameter.dtype for parameter in pipeline.unet.parameters()} == {torch.bfloat16}
    loras.fuse()
    assert {parameter.dtype for parameter in pipeline.unet.parameters()} == {torch.bfloat16}


def test_fusing_what_overflows_changes_nothing(
    pipeline: Pipeline, loras: LoRAs, tmp_path: Path
) -> None:
    pipeline.to(torch.float16)
    state = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    loras.load(kohya_file(tmp_path / "x.safetensors", pipeline, alpha=1), scale=1e6)
    with pytest.raises(ValueError, match=r"cannot be fused.*too large for torch.float16"):
        loras.fuse()
    loras.unload()
    assert all(torch.equal(pipeline.unet.state_dict()[name], state[name]) for name in state)
