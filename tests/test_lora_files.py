"""LoRA files: every layer of SD by both trainers' names, and a sentence for what is refused."""

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors.torch import save_file
from support.loras import (
    ATTENTION,
    SOME,
    TEXT,
    UNET,
    Tensors,
    in_kohya_names,
    in_peft_names,
    random_lora,
)
from support.tiny import tiny_pipeline
from torch import Tensor, nn

from latentdiff.formats.ldm.keys import unet_to_ldm
from latentdiff.formats.lora import read_lora
from latentdiff.models.lora import LoRAs
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.pipeline import Pipeline

SD2 = UNetConfig(attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return tiny_pipeline(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def loras(pipeline: Pipeline) -> LoRAs:
    return LoRAs(pipeline.unet, pipeline.text_encoder.model, pipeline.diffusion)


@pytest.mark.parametrize("config", [UNetConfig(), SD2], ids=["SD 1.5", "SD 2.1"])
@pytest.mark.parametrize("ldm", [False, True], ids=["diffusers", "LDM"])
def test_kohyas_name_of_every_layer_of_sd_is_understood(
    tmp_path: Path, config: UNetConfig, ldm: bool
) -> None:
    with torch.device("meta"):
        unet = UNet(config)
    layers = [n for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    names = unet_to_ldm(unet.state_dict()) if ldm else {n: n for n in unet.state_dict()}
    tensors: Tensors = {}
    for i, layer in enumerate(layers):
        module = "lora_unet_" + names[f"{layer}.weight"].removesuffix(".weight").replace(".", "_")
        tensors[f"{module}.lora_down.weight"] = torch.full((1, 2), float(i))
        tensors[f"{module}.lora_up.weight"] = torch.ones(2, 1)
    save_file(tensors, tmp_path / "x.safetensors")
    file = read_lora(tmp_path / "x.safetensors", layers_per_block=config.layers_per_block)
    assert {name: int(layer.down[0, 0]) for name, layer in file.unet.items()} == {
        layer: i for i, layer in enumerate(layers)
    }
    assert not file.text_encoder


def test_a_file_may_mix_the_namings(pipeline: Pipeline, tmp_path: Path) -> None:
    """As diffusers' scripts write them: `lora.down` in attention, `lora_A` in all else.

    diffusers 0.42 judges by the first name and then misses every layer of the other naming.
    """
    lora = random_lora(pipeline.unet, UNET, rank=2)
    save_file(in_peft_names(lora), tmp_path / "one")
    save_file(in_peft_names(convert_state_dict_to_diffusers(lora)), tmp_path / "two")
    one, two = (read_lora(tmp_path / name, layers_per_block=1).unet for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name].up, two[name].up) for name in one)


def test_the_first_files_of_unets_alone_need_no_prefix(tmp_path: Path) -> None:
    tensors = {
        "mid_block.attentions.0.proj_in.lora.down.weight": torch.ones(2, 4),
        "mid_block.attentions.0.proj_in.lora.up.weight": torch.ones(4, 2),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    (name,) = read_lora(tmp_path / "x.safetensors", layers_per_block=2).unet
    assert name == "mid_block.attentions.0.proj_in"


LAYER = "lora_unet_mid_block_attentions_0_proj_in"
DOWN, UP, ALPHA = (f"{LAYER}.{kind}" for kind in ("lora_down.weight", "lora_up.weight", "alpha"))
DEEPER = LAYER.replace("_0_", "_9_")


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({UP: None}, r"'mid_block.attentions.0.proj_in' there is only .*_down.weight.*two weights"),
        ({UP: None, DOWN: None}, "there is only .*alpha"),
        (
            {f"{LAYER}.bias_values": ones(32)},
            r"1 of its \d+ tensors, first 'lora_unet_mid.*bias_values', are no part.*DoRA",
        ),
        (
            {"model.diffusion_model.out.2.weight": ones(4, 16, 3, 3)},
            r"first 'model.diffusion_model.out.2.weight', are no part",
        ),
        ({"lora_te2_text_projection.alpha": ones()}, "LoRA for SDXL, which has a second text"),
        (
            {
                "lora_unet_input_blocks_9_9_9.lora_down.weight": ones(2, 2),
                "lora_unet_input_blocks_x.lora_up.weight": ones(2, 2),
            },
            r"2 of its \d+ tensors, first 'lora_unet_input_blocks_9_9_9.* no part of a LoRA",
        ),
        (
            {f"{DEEPER}.lora_down.weight": ones(4, 32), f"{DEEPER}.lora_up.weight": ones(32, 4)},
            r"1 of its \d+ layers for the UNet, first 'mid_block.attentions.9.proj_in', are not in",
        ),
        (
            {"unet.mid_block.attentions.0.proj_in.lora_A.weight": ones(4, 32, 1, 1)},
            "are the same weight",
        ),
        (
            {DOWN: ones(4, 7, 1, 1)},
            r"1 of its \d+ layers for the UNet, first mid_block.attentions.0.proj_in, have other "
            r"widths than this model: LoRA of down \(4, 7, 1, 1\), up \(32, 4, 1, 1\) for a weight "
            r"of \(32, 32, 1, 1\)",
        ),
        ({DOWN: ones(5, 32, 1, 1)}, r"down \(5, 32, 1, 1\) and up .*, expected \(r, in\)"),
        ({DOWN: ones(0, 32, 1, 1), UP: ones(32, 0, 1, 1)}, "rank 0 of .* must be from 1 to 4096"),
        ({DOWN: ones(4, 32, 1, 1).to(torch.int8)}, "holds torch.int8, expected floating point"),
        ({DOWN: ones(4, 32, 1, 1) * torch.nan}, "NaN"),
        ({ALPHA: ones() * torch.inf}, "infinite"),
        ({ALPHA: ones() * 1e7}, "alpha=10000000.0 of .* must be a number within"),
        ({ALPHA: ones(3)}, "holds 3 numbers"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_a_sentence_and_changes_nothing(
    pipeline: Pipeline,
    loras: LoRAs,
    tmp_path: Path,
    change: dict[str, Tensor | None],
    message: str,
) -> None:
    names = [*SOME, "proj_in"]
    tensors = in_kohya_names(random_lora(pipeline.unet, names, rank=4), "lora_unet_", {})
    changed = tensors | {ALPHA: ones()} | change
    path = tmp_path / "bad.safetensors"
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)
    names = list(pipeline.unet.state_dict())
    with pytest.raises(ValueError, match=message) as refusal:
        loras.load(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert loras.scales == {}
    assert list(pipeline.unet.state_dict()) == names


def test_a_file_without_tensors_is_refused(loras: LoRAs, tmp_path: Path) -> None:
    save_file({}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="holds no LoRA"):
        loras.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("package", ["peft", "diffusers"])
def test_without_the_optional_packages_nothing_is_loaded(
    pipeline: Pipeline,
    loras: LoRAs,
    tmp_path: Path,
    package: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    save_file(in_peft_names(random_lora(pipeline.unet, ATTENTION, rank=2)), tmp_path / "x")
    with pytest.raises(ModuleNotFoundError, match=package):
        loras.load(tmp_path / "x")
    assert loras.scales == {}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "nested too deep"),
        ("[]", "not an object"),
        ({"unet.use_dora": True}, "to_k' has no lora_magnitude_vector, and use_dora=true"),
        ({"unet.lora_alpha": "4"}, "has alpha '4', not a number"),
        ({"unet.lora_alpha": 10**400}, "not a number within"),
        ({"unet.alpha_pattern": {"to_q": float("nan")}}, "has alpha nan"),
        ({"unet.alpha_pattern": {"(a+)+$": 1}}, r"names '\(a\+\)\+\$', not a layer"),
        ({"unet.alpha_pattern": ["to_q"]}, "not an object"),
    ],
)
def test_metadata_that_make_no_sense_are_refused(
    loras: LoRAs, pipeline: Pipeline, tmp_path: Path, metadata: str | dict, message: str
) -> None:
    text = metadata if isinstance(metadata, str) else json.dumps(metadata)
    tensors = in_peft_names(random_lora(pipeline.unet, ATTENTION, rank=2))
    save_file(tensors, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": text})
    with pytest.raises(ValueError, match=message):
        loras.load(tmp_path / "x.safetensors")


def test_a_pickled_lora_is_refused(loras: LoRAs, tmp_path: Path) -> None:
    torch.save({"lora_unet_x.alpha": torch.ones(1)}, tmp_path / "x.bin")
    with pytest.raises(ValueError, match="pickled checkpoint"):
        loras.load(tmp_path / "x.bin")


def test_names_and_scales_are_checked(loras: LoRAs, pipeline: Pipeline, tmp_path: Path) -> None:
    """Any text is a name, also such that peft could not make a module's name of."""
    path = tmp_path / "détail v1.2.safetensors"
    text = random_lora(pipeline.text_encoder.model, TEXT, rank=2)
    save_file(in_kohya_names(text, "lora_te_text_model_", {}), path)
    for scale in (float("nan"), float("inf"), True):
        with pytest.raises(ValueError, match=r"scale=.* must be a finite number"):
            loras.load(path, scale=scale)
    assert loras.load(path) == "détail v1.2"
    assert loras.load(path, name="keys", scale=2) == "keys"
    with pytest.raises(ValueError, match=r"name='keys' must be new; loaded are \['détail v1.2'"):
        loras.load(path, name="keys")
    with pytest.raises(ValueError, match="no LoRA 'style' is loaded; loaded are"):
        loras.set_scales({"style": 1})
    with pytest.raises(ValueError, match="scale=nan"):
        loras.set_scales({"keys": float("nan")})
    assert loras.scales == {"détail v1.2": 1, "keys": 2}
    loras.unload()
