"""LoRAs as peft itself and ComfyUI write them: each network's own names, alpha in another file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.interchange_table import Measured
from support.loras import (
    ATTENTION,
    SOME,
    TEXT,
    UNET,
    Tensors,
    difference,
    in_peft_names,
    ours,
    outputs,
    random_lora,
)
from support.tiny import tiny_pipeline

from latentdiff.cli import main
from latentdiff.diffusion import Diffusion
from latentdiff.formats.ldm.keys import unet_to_ldm
from latentdiff.formats.lora import read_lora
from latentdiff.models.lora import LoRAs
from latentdiff.pipeline import Pipeline

pytestmark = pytest.mark.interchange

CONFIG, FILE = "adapter_config.json", "adapter_model.safetensors"
# Of the UNet; alpha by layer, rank by layer, and divided by the rank's root.
PATTERNS = {"rank_pattern": {"attn2.to_k": 3}, "alpha_pattern": {"attn2.to_k": 2, "conv_in": 5}}


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    return tiny_pipeline(tmp_path / "tokenizer", Diffusion("scaled_linear", "epsilon"))


@pytest.fixture
def loras(pipeline: Pipeline) -> LoRAs:
    return LoRAs(pipeline.unet, pipeline.text_encoder.model, pipeline.diffusion)


def by_peft(network: Any, folder: Path, **options: Any) -> PeftModel:
    """A network as peft trains it, and its LoRA as peft saves it into `folder`."""
    model = get_peft_model(network, LoraConfig(r=4, lora_alpha=6, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
@pytest.mark.parametrize("options", [{}, PATTERNS, PATTERNS | {"use_rslora": True}])
def test_what_peft_saves_gives_the_outputs_it_was_trained_to(
    pipeline: Pipeline,
    loras: LoRAs,
    tmp_path: Path,
    options: dict[str, Any],
    measured: Measured,
) -> None:
    """It was "for another architecture", though the page on LoRAs promised it."""
    pipeline.save_pretrained(tmp_path / "pipeline")
    theirs: Any = StableDiffusionPipeline.from_pretrained(
        tmp_path / "pipeline", safety_checker=None, requires_safety_checker=False
    )
    by_peft(theirs.unet, tmp_path / "unet", target_modules=[*SOME, "to_q"], **options)
    by_peft(theirs.text_encoder, tmp_path / "text", target_modules=TEXT)
    names = load_file(tmp_path / "unet" / FILE)
    assert all(name.startswith("base_model.model.") for name in names)
    base = ours(pipeline)
    loras.load(tmp_path / "unet" / FILE, name="unet")
    loras.load(tmp_path / "text" / FILE, name="text")
    expected = outputs(theirs.unet, theirs.text_encoder)
    found = difference(ours(pipeline), expected)
    measured("LoRA", "read", "peft's own save", "outputs, float64, ranks by layer", found)
    assert found < 1e-12
    assert difference(base, expected) > 0.1


def test_the_loras_of_both_networks_are_drawn_with_by_one_command(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both of peft's files have the same name, which was taken for the same LoRA."""
    pipeline.save_pretrained(tmp_path / "model")
    for part, network, names in (
        ("unet", pipeline.unet, ATTENTION),
        ("text", pipeline.text_encoder.model, TEXT),
    ):
        lora = random_lora(network, names, rank=2)
        tensors = {f"base_model.model.{name}": tensor for name, tensor in lora.items()}
        with_config(tmp_path / part, tensors, {"lora_alpha": 3})
    command = ["generate", "a cat", "--model", str(tmp_path / "model"), "--steps", "1"]
    command += ["--seed", "1", "--height", "16", "--width", "16", "--out", str(tmp_path / "out")]
    loras = [
        argument
        for part in ("unet", "text")
        for argument in ("--lora", str(tmp_path / part / FILE))
    ]
    assert main([*command, *loras]) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 1
    assert main([*command, *loras[:2], *loras[:2]]) == 2
    assert "must be new; loaded are" in capsys.readouterr().err


def with_config(folder: Path, tensors: Tensors, config: dict[str, Any] | None) -> Path:
    folder.mkdir()
    save_file(tensors, folder / FILE)
    if config is not None:
        (folder / CONFIG).write_text(json.dumps(config))
    return folder / FILE


NAMINGS: dict[str, Callable[[str], str]] = {
    "peft": lambda name: f"base_model.model.{name}",
    "adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "both": lambda name: "base_model.model." + name.replace(".weight", ".my_style.weight"),
    "after the component": lambda name: f"unet.base_model.model.{name}",
    "compiled": lambda name: f"base_model.model._orig_mod.{name}",
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_name_that_peft_makes_is_understood(
    pipeline: Pipeline, tmp_path: Path, naming: str
) -> None:
    lora = random_lora(pipeline.unet, UNET, rank=2)
    tensors = {NAMINGS[naming](name): tensor for name, tensor in lora.items()}
    path = with_config(tmp_path / "x", tensors, {"peft_type": "LORA", "lora_alpha": 3})
    save_file(in_peft_names(lora), tmp_path / "plain.safetensors")
    plain = read_lora(tmp_path / "plain.safetensors", layers_per_block=1).unet
    found = read_lora(path, layers_per_block=1).unet
    assert found.keys() == plain.keys()
    assert all(torch.equal(layer.up, plain[name].up) for name, layer in found.items())
    assert {layer.alpha for layer in found.values()} == {3}


def test_one_file_may_hold_both_networks_and_two_adapters_are_refused(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    unet = random_lora(pipeline.unet, SOME, rank=2)
    text = random_lora(pipeline.text_encoder.model, TEXT, rank=2)
    both = {
        f"base_model.model.{name}": tensor for name, tensor in in_peft_names(unet, text).items()
    }
    config = {"lora_alpha": 3, "alpha_pattern": {"unet.conv_in": 7, "text_model.encoder": 1}}
    file = read_lora(with_config(tmp_path / "x", both, config), layers_per_block=1)
    assert {name.partition(".lora_")[0] for name in unet} == file.unet.keys()
    assert {name.partition(".lora_")[0] for name in text} == file.text_encoder.keys()
    assert file.unet["conv_in"].alpha == 7
    assert {layer.alpha for layer in file.text_encoder.values()} == {3}
    first, second = (
        {name.replace(".weight", f".{adapter}.weight"): t.clone() for name, t in unet.items()}
        for adapter in ("a", "b")
    )
    path = with_config(tmp_path / "two", first | second, config)
    with pytest.raises(ValueError, match="are the same weight"):
        read_lora(path, layers_per_block=1)


def test_an_alpha_that_nobody_says_is_said_to_be_assumed(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    lora = random_lora(pipeline.unet, ATTENTION, rank=2)
    tensors = {f"base_model.model.{name}": tensor for name, tensor in lora.items()}
    path = with_config(tmp_path / "x", tensors, None)
    with pytest.warns(UserWarning, match=r"no adapter_config\.json lies beside it.* was assumed"):
        layers = read_lora(path, layers_per_block=1).unet.values()
    assert {layer.alpha for layer in layers} == {2}


def test_a_config_beside_is_not_that_of_any_other_file(pipeline: Pipeline, tmp_path: Path) -> None:
    lora = in_peft_names(random_lora(pipeline.unet, ATTENTION, rank=2))
    with_config(tmp_path / "x", lora, {"lora_alpha": 64})
    save_file(lora, tmp_path / "x" / "style.safetensors")
    layers = read_lora(tmp_path / "x" / "style.safetensors", layers_per_block=1).unet.values()
    assert {layer.alpha for layer in layers} == {2}
    layers = read_lora(tmp_path / "x" / FILE, layers_per_block=1).unet.values()
    assert {layer.alpha for layer in layers} == {64}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_bias": True}, "lora_bias=True is not read"),
        ({"layer_replication": [[0, 4]]}, "layer_replication="),
        ({"peft_type": "OFT"}, "peft_type='OFT' is not read, only LORA, LOHA, LOKR"),
        ({"peft_type": "LOHA"}, "peft_type='LOHA' is not that of the tensors, first"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not read: it changes the"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"lora_alpha": "6"}, "has alpha '6', not a number"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "alpha_pattern names"),
        ({"alpha_pattern": [1]}, "alpha_pattern is .*not an object"),
    ],
)
def test_what_the_config_asks_for_and_is_not_read_is_refused_by_name(
    pipeline: Pipeline, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    """A PiSSA's numbers fit a model from which their first values were taken away."""
    lora = random_lora(pipeline.unet, ATTENTION, rank=2)
    tensors = {f"base_model.model.{name}": tensor for name, tensor in lora.items()}
    path = with_config(tmp_path / "x", tensors, config)
    with pytest.raises(ValueError, match=message) as refusal:
        read_lora(path, layers_per_block=1)
    assert CONFIG in str(refusal.value)
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in config.items()})}
    save_file(in_peft_names(lora), tmp_path / "diffusers.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=rf"diffusers\.safetensors: unet\..*{message}"):
        read_lora(tmp_path / "diffusers.safetensors", layers_per_block=1)


def test_a_config_without_alpha_has_that_of_peft(pipeline: Pipeline, tmp_path: Path) -> None:
    lora = random_lora(pipeline.unet, ATTENTION, rank=2)
    path = with_config(tmp_path / "x", lora, {"peft_type": "LORA"})
    layers = read_lora(path, layers_per_block=1).unet.values()
    assert {layer.alpha for layer in layers} == {LoraConfig().lora_alpha}


@pytest.mark.parametrize("prefix", ["diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize("ldm", [True, False], ids=["LDM", "diffusers"])
@pytest.mark.parametrize("halves", [("lora_down", "lora_up"), ("lora_A", "lora_B")])
def test_the_names_of_comfyui_are_understood(
    pipeline: Pipeline, tmp_path: Path, prefix: str, ldm: bool, halves: tuple[str, str]
) -> None:
    """Its node that extracts a LoRA writes LDM's names with their dots, and no alpha."""
    lora = random_lora(pipeline.unet, UNET, rank=2)
    text = random_lora(pipeline.text_encoder.model, TEXT, rank=2)
    names = unet_to_ldm(pipeline.unet.state_dict())
    tensors: Tensors = {}
    for name, tensor in lora.items():
        layer, _, kind = name.partition(".lora_")
        module = names[f"{layer}.weight"].removesuffix(".weight") if ldm else layer
        tensors[f"{prefix}{module}.{halves[kind != 'A.weight']}.weight"] = tensor
    tensors["diffusion_model.conv_in.alpha"] = torch.tensor(1.5)
    if ldm:
        tensors["diffusion_model.input_blocks.0.0.alpha"] = tensors.pop(
            "diffusion_model.conv_in.alpha"
        )
    for name, tensor in text.items():
        kind = name.replace("lora_A", halves[0]).replace("lora_B", halves[1])
        tensors[f"text_encoders.clip_l.transformer.text_model.{kind}"] = tensor
    save_file(tensors, tmp_path / "x.safetensors")
    save_file(in_peft_names(lora, text), tmp_path / "plain.safetensors")
    found, plain = (
        read_lora(tmp_path / f"{name}.safetensors", layers_per_block=1) for name in ("x", "plain")
    )
    for ours_, theirs in ((found.unet, plain.unet), (found.text_encoder, plain.text_encoder)):
        assert ours_.keys() == theirs.keys()
        assert all(torch.equal(ours_[n].down, layer.down) for n, layer in theirs.items())
    assert found.unet["conv_in"].alpha == 1.5
    assert found.unet["mid_block.attentions.0.proj_in"].alpha == 2


def test_a_lora_of_comfyui_for_sdxl_is_refused_as_one(tmp_path: Path) -> None:
    name = "text_encoders.clip_g.transformer.text_model.encoder.layers.0.mlp.fc1.lora_up.weight"
    save_file({name: torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="is a LoRA for SDXL"):
        read_lora(tmp_path / "x.safetensors", layers_per_block=2)
