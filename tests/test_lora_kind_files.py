"""LoHa, LoKr and DoRA in files: peft's, diffusers', every naming; and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from support.interchange_table import Measured
from support.loras import SOME, TEXT, UNET, difference, ours, outputs
from support.lycoris import ALL, in_lycoris_names, lycoris_file, random_change
from support.tiny import double_pipeline

from latentdiff.formats.ldm.keys import unet_to_ldm
from latentdiff.formats.lora import read_lora
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


def by_diffusers(pipeline: Pipeline, folder: Path) -> Any:
    """diffusers' pipeline of the same weights, in float64."""
    pipeline.save_pretrained(folder / "pipeline")
    return StableDiffusionPipeline.from_pretrained(
        folder / "pipeline", safety_checker=None, requires_safety_checker=False, dtype=torch.float64
    )


PEFT: dict[str, Any] = {
    "LoHa": LoHaConfig(r=4, alpha=6, rank_pattern={"to_k": 2}, alpha_pattern={"conv_in": 3}),
    "LoHa with cores": LoHaConfig(r=4, alpha=6, use_effective_conv2d=True),
    "LoKr": LoKrConfig(r=4, alpha=6, alpha_pattern={"conv1": 3}),
    "LoKr of whole matrices": LoKrConfig(r=64, alpha=16, rank_pattern={"conv1": 32}),
    "LoKr, both factored": LoKrConfig(r=1, alpha=2, decompose_both=True, decompose_factor=8),
    "LoKr with cores": LoKrConfig(r=2, alpha=3, use_effective_conv2d=True),
    "DoRA": LoraConfig(r=4, lora_alpha=6, use_dora=True, rank_pattern={"to_k": 2}),
    "DoRA, rank-stabilised": LoraConfig(r=4, lora_alpha=6, use_dora=True, use_rslora=True),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
@pytest.mark.parametrize("name", PEFT)
def test_what_peft_saves_gives_the_outputs_it_was_trained_to(
    pipeline: Pipeline, loras: LoRAs, tmp_path: Path, name: str, measured: Measured
) -> None:
    theirs = by_diffusers(pipeline, tmp_path)
    base = ours(pipeline)
    for part, network, targets in (
        ("unet", theirs.unet, [*SOME, "to_q", "to_out.0", "downsamplers.0.conv"]),
        ("text", theirs.text_encoder, TEXT),
    ):
        options = PEFT[name].to_dict() | {"target_modules": targets}
        if part == "text":  # peft warns of patterns for layers that are not there
            options |= {"rank_pattern": {}, "alpha_pattern": {}}
        config = type(PEFT[name])(**options)
        model = get_peft_model(network, config)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "magnitude" in parameter_name:
                    parameter *= 1 + 0.3 * torch.rand_like(parameter)
                elif any(mark in parameter_name for mark in ("lora_", "hada_", "lokr_")):
                    parameter.normal_(std=0.3)
        model.save_pretrained(tmp_path / part)
        loras.load(tmp_path / part / "adapter_model.safetensors", name=part)
    expected = outputs(theirs.unet, theirs.text_encoder)
    found = difference(ours(pipeline), expected)
    measured(name.partition(",")[0].partition(" ")[0], "read", "peft", "outputs, float64", found)
    assert found < 1e-12
    assert difference(base, expected) > 0.1


@pytest.mark.parametrize("kohya", [False, True])
def test_a_dora_of_diffusers_gives_the_outputs_it_was_trained_to(
    pipeline: Pipeline, loras: LoRAs, tmp_path: Path, kohya: bool, measured: Measured
) -> None:
    """By its own names, and by kohya's with `dora_scale`, which diffusers reads of one axis too."""
    theirs = by_diffusers(pipeline, tmp_path)
    config = LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=[*SOME, "to_q"])
    theirs.unet.add_adapter(config)
    with torch.no_grad():
        for name, parameter in theirs.unet.named_parameters():
            if "lora_" in name:
                parameter += 0.2 * torch.rand_like(parameter)
    state = get_peft_model_state_dict(theirs.unet)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    if kohya:
        ends = {"lora_magnitude_vector": "dora_scale"}
        ends |= {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
        named = [(*name.partition(".lora_")[::2], tensor) for name, tensor in state.items()]
        save_file(
            {
                f"lora_unet_{layer.replace('.', '_')}.{ends[f'lora_{end}']}": tensor.flatten()
                if end == "magnitude_vector"
                else tensor
                for layer, end, tensor in named
            },
            path,
        )
    else:
        metadata = theirs.unet.peft_config["default"].to_dict()
        StableDiffusionPipeline.save_lora_weights(
            tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=metadata
        )
    loras.load(path)
    found = difference(ours(pipeline), outputs(theirs.unet, theirs.text_encoder))
    measured("DoRA", "read", "diffusers, peft", "outputs, float64", found)
    assert found < 1e-12


@pytest.mark.parametrize("naming", ["lycoris", "LDM", "ComfyUI", "peft", "diffusers"])
def test_every_naming_is_understood(pipeline: Pipeline, tmp_path: Path, naming: str) -> None:
    plain, _ = random_change(pipeline.unet, UNET, ALL, seed=0)
    ldm = unet_to_ldm(pipeline.unet.state_dict())
    if naming in ("LDM", "ComfyUI"):
        plain = {ldm[f"{n}.weight"].removesuffix(".weight"): some for n, some in plain.items()}
    if naming in ("lycoris", "LDM"):
        prefix = {"lycoris": "lycoris_", "LDM": "lora_unet_"}[naming]
        tensors = in_lycoris_names(plain, prefix)
    else:
        prefix = {"ComfyUI": "diffusion_model.", "peft": "unet.base_model.model."}
        tensors = {
            f"{prefix.get(naming, 'unet.')}{name}.{end}": tensor
            for name, some in plain.items()
            for end, tensor in some.items()
        }
        if naming == "peft":
            halves = {".lora_down.": ".lora_A.", ".lora_up.": ".lora_B."}
            for old, new in halves.items():
                tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    expected = lycoris_file(tmp_path / "plain.safetensors", pipeline)[0]
    found = read_lora(tmp_path / "x.safetensors", layers_per_block=1).unet
    wanted = read_lora(expected, layers_per_block=1).unet
    assert found.keys() == wanted.keys()
    for name, layer in wanted.items():
        assert kind(found[name]) == kind(layer)
        assert torch.equal(found[name].change(), layer.change())


NAME = "lora_unet_mid_block_attentions_0_proj_in"
SHAPES = {"hada_w1_a": (32, 2), "hada_w1_b": (2, 32), "hada_w2_a": (32, 2), "hada_w2_b": (2, 32)}
KRON = {"lokr_w1": (4, 4), "lokr_w2": (8, 8, 1, 1)}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            SHAPES | {"hada_w2_b": None},
            r"there is only .*hada_w2_a'\]; each has .* or all of a LoHa",
        ),
        (SHAPES | {"hada_t1": (2, 2, 1, 1)}, "there is only"),
        (SHAPES | {"lokr_w1": (4, 4)}, "there is only"),
        ({"lokr_w1": (4, 4)}, r"there is only \['lora_unet_.*lokr_w1'\]"),
        ({"dora_scale": (32, 1, 1, 1)}, "there is only"),
        (KRON | {"lokr_w2_a": (8, 2)}, "there is only"),
        (KRON | {"dora_scale": (32, 1, 1, 1), "lora_magnitude_vector": (32,)}, "one magnitude"),
        (KRON | {"lokr_t1": (2, 2)}, "lokr_t1', are no part of a LoRA, LoHa, LoKr or DoRA"),
        (KRON | {"oft_blocks": (2, 2)}, "all other kinds of LyCORIS and peft are not read"),
        (SHAPES | {"hada_w1_b": (3, 32)}, r"hada_w1_b \(3, 32\), .* which cannot be multiplied"),
        (SHAPES | {"hada_w2_a": (16, 2)}, "which cannot be multiplied"),
        (SHAPES | {"hada_w2_a": (32, 0), "hada_w2_b": (0, 32)}, "in which nothing may be empty"),
        (
            SHAPES | {"hada_w1_a": (16, 2), "hada_w2_a": (16, 2)},
            r"first mid_block.attentions.0.proj_in, have other widths than this model: LoHa of "
            r"hada_w1_a \(16, 2\), .* for a weight of \(32, 32, 1, 1\)",
        ),
        (KRON | {"lokr_w1": (4, 2)}, r"other widths .* LoKr of lokr_w1 \(4, 2\)"),
        (KRON | {"dora_scale": (16, 1, 1, 1)}, r"LoKr with DoRA of .* magnitude \(16, 1, 1, 1\)"),
        (KRON | {"dora_scale": (32, 1)}, r"magnitude \(32, 1\) for a weight of"),
        (KRON | {"lokr_w1": (5000, 4)}, "other widths"),
        (
            {"lokr_w1": (4, 4), "lokr_w2_a": (8, 5000), "lokr_w2_b": (5000, 8)},
            "rank 5000 of .* must be from 1 to 4096",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused_in_a_sentence_and_changes_nothing(
    pipeline: Pipeline,
    loras: LoRAs,
    tmp_path: Path,
    shapes: dict[str, tuple[int, ...] | None],
    message: str,
) -> None:
    tensors = {f"{NAME}.{k}": torch.ones(s) for k, s in shapes.items() if s is not None}
    save_file(tensors, tmp_path / "bad.safetensors")
    names = list(pipeline.unet.state_dict())
    with pytest.raises(ValueError, match=message) as refusal:
        loras.load(tmp_path / "bad.safetensors")
    assert str(tmp_path / "bad.safetensors") in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert loras.scales == {}
    assert list(pipeline.unet.state_dict()) == names


@pytest.mark.parametrize(
    ("kinds", "number", "message"),
    [
        (KRON, torch.nan, "NaN or infinite"),
        (KRON | {"dora_scale": (32, 1, 1, 1)}, 1e38, "too large for torch.float16"),
        (SHAPES, 1e6, "too large for torch.float16"),
    ],
)
def test_numbers_that_the_precision_cannot_hold_are_refused(
    pipeline: Pipeline,
    loras: LoRAs,
    tmp_path: Path,
    kinds: dict[str, tuple[int, ...]],
    number: float,
    message: str,
) -> None:
    pipeline.to(torch.float16)
    tensors = {f"{NAME}.{name}": torch.ones(shape) for name, shape in kinds.items()}
    tensors[next(reversed(tensors))].fill_(number)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        loras.load(tmp_path / "x.safetensors")
    assert loras.scales == {}
    assert not any("lokr" in name for name, _ in pipeline.unet.named_modules())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 0}, "r or rank_pattern has rank 0, not a whole number from 1 to 4096"),
        ({"r": 4, "rank_pattern": {"proj_in": 1.5}}, "r or rank_pattern has rank 1.5"),
        ({"rank_pattern": {"(a+)+$": 1}}, "rank_pattern names .* not a layer"),
        ({"alpha": "6"}, "alpha or alpha_pattern has alpha '6', not a number"),
    ],
)
def test_a_config_of_peft_that_makes_no_sense_is_refused(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    name = "base_model.model.mid_block.attentions.0.proj_in"
    tensors = {f"{name}.{kind}": torch.ones(shape) for kind, shape in KRON.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOKR"} | config))
    with pytest.raises(ValueError, match=message) as refusal:
        read_lora(tmp_path / "adapter_model.safetensors", layers_per_block=1)
    assert "adapter_config.json" in str(refusal.value)


def test_two_whole_matrices_have_a_rank_in_pefts_config_alone(tmp_path: Path) -> None:
    """Written by peft they are scaled by alpha / r; by LyCORIS not, whatever its alpha is."""
    layer = "mid_block.attentions.0.proj_in"
    tensors = {kind: torch.ones(shape) for kind, shape in KRON.items()}
    by_peft = {f"base_model.model.{layer}.{kind}": tensor for kind, tensor in tensors.items()}
    save_file(by_peft, tmp_path / "adapter_model.safetensors")
    config = {
        "peft_type": "LOKR",
        "r": 64,
        "alpha": 16,
        "rank_pattern": {"attentions.0.proj_in": 32},
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    by_lycoris = {f"{NAME}.{kind}": tensor for kind, tensor in tensors.items()}
    save_file(by_lycoris | {f"{NAME}.alpha": torch.tensor(16.0)}, tmp_path / "x.safetensors")
    for name, scale in (("adapter_model", 0.5), ("x", 1.0)):
        file = read_lora(tmp_path / f"{name}.safetensors", layers_per_block=1)
        assert torch.equal(file.unet[layer].change(), torch.full((32, 32, 1, 1), scale).double())
