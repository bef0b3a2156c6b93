"""What lies beside a single file, or is asked for: which of it counts, and where it disagrees."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.ldm import checkpoint
from support.tiny import tiny_tokenizer
from torch import Tensor

from latentdiff.cli import main
from latentdiff.diffusion import Diffusion
from latentdiff.formats.ldm.yaml_config import save_ldm_config, to_ldm_config
from latentdiff.formats.single_file import read_single_file, write_single_file
from latentdiff.formats.weights import load_json, save_safetensors
from latentdiff.models.unet import UNetConfig
from latentdiff.models.vae import VAEConfig
from latentdiff.pipeline import Pipeline

pytestmark = [
    pytest.mark.interchange,
    pytest.mark.filterwarnings("ignore:.*assumed:UserWarning"),
]

UNET = UNetConfig(
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=64,
)
VAE = VAEConfig(block_out_channels=(32, 64), layers_per_block=1)
TEXT = {"max_position_embeddings": 12}
WORDS = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
PREDICTIONS = ("epsilon", "v_prediction")


def weights() -> dict[str, Tensor]:
    """With as many words as the tiny tokenizer has."""
    return checkpoint(UNET, VAE) | {WORDS: torch.randn(514, 64)}


def ldm_config(prediction: str) -> dict[str, Any]:
    scheduler = Diffusion("scaled_linear", prediction).to_scheduler_config()
    return to_ldm_config(UNET.to_dict(), VAE.to_dict(), TEXT, scheduler, open_clip=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of SD 1.x's kind, in which nothing says what it predicts."""
    save_safetensors(weights(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def prediction(path: Path, **options: Any) -> str:
    return read_single_file(path, **options).scheduler_config["prediction_type"]


@pytest.mark.parametrize("said", PREDICTIONS)
def test_a_yaml_of_the_same_name_beside_a_file_says_what_it_predicts(
    model: Path, said: str
) -> None:
    """A v model of SD 1.x drew noise without a word, though A1111's own convention was kept."""
    assert prediction(model) == "epsilon"
    save_ldm_config(ldm_config(said), model.with_suffix(".yaml"))
    assert prediction(model) == said


def test_the_file_beside_is_found_beside_a_link(model: Path, tmp_path: Path) -> None:
    """In huggingface_hub's cache a file is a link to one whose name is a hash."""
    (tmp_path / "blobs").mkdir()
    model.rename(tmp_path / "blobs" / "0123")
    model.symlink_to(tmp_path / "blobs" / "0123")
    save_ldm_config(ldm_config("v_prediction"), model.with_suffix(".yaml"))
    assert prediction(model) == "v_prediction"


def test_what_is_asked_for_goes_before_what_lies_beside(model: Path, tmp_path: Path) -> None:
    save_ldm_config(ldm_config("v_prediction"), model.with_suffix(".yaml"))
    save_ldm_config(ldm_config("epsilon"), tmp_path / "other.yaml")
    assert prediction(model, config=tmp_path / "other.yaml") == "epsilon"


def test_our_own_metadata_go_before_what_lies_beside(model: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tiny_tokenizer(tmp_path / "scratch").save_pretrained(tokenizer)
    save_ldm_config(ldm_config("v_prediction"), model.with_suffix(".yaml"))
    pipeline = Pipeline.from_single_file(model, tokenizer=tokenizer)
    assert pipeline.diffusion.prediction == "v_prediction"
    ours = tmp_path / "ours.safetensors"
    pipeline.save_single_file(ours)
    assert prediction(ours) == "v_prediction"
    save_ldm_config(ldm_config("epsilon"), ours.with_suffix(".yaml"))
    assert prediction(ours) == "v_prediction"


@pytest.mark.parametrize(
    ("metadata", "marks"),
    [({"modelspec.prediction_type": "v"}, []), ({}, ["v_pred"])],
)
def test_a_file_that_says_otherwise_than_what_lies_beside_is_not_guessed_at(
    tmp_path: Path, metadata: dict[str, str], marks: list[str]
) -> None:
    path, beside = tmp_path / "model.safetensors", tmp_path / "model.yaml"
    tensors = weights() | {name: torch.empty(0) for name in marks}
    save_safetensors(tensors, path, metadata)
    save_ldm_config(ldm_config("epsilon"), beside)
    with pytest.raises(ValueError, match=r"predicts v_prediction, and model\.yaml beside it says"):
        read_single_file(path)
    assert prediction(path, config=beside) == "epsilon"
    save_ldm_config(ldm_config("v_prediction"), beside)
    assert prediction(path) == "v_prediction"


@pytest.mark.parametrize("text", ["learning_rate: 1e-4\n", "a: [", ""])
def test_a_yaml_beside_that_is_something_else_is_refused_with_a_way_out(
    model: Path, text: str
) -> None:
    model.with_suffix(".yaml").write_text(text)
    with pytest.raises(ValueError, match=r"model\.yaml: is no.* rename it .* config=") as refusal:
        read_single_file(model)
    assert "\n" not in str(refusal.value)


def test_a_yaml_beside_of_another_model_is_refused(model: Path) -> None:
    config = ldm_config("epsilon")
    config["model"]["params"]["unet_config"]["params"]["num_res_blocks"] = 2
    save_ldm_config(config, model.with_suffix(".yaml"))
    with pytest.raises(
        ValueError, match=r"the \.yaml beside it\) its unet's layers_per_block is 2"
    ):
        read_single_file(model)


def test_a_measured_latent_scale_goes_before_that_of_a_yaml(tmp_path: Path) -> None:
    """LDM's scale_by_std keeps it among the tensors, and its YAML then has the default, 1."""
    path = tmp_path / "model.safetensors"
    save_safetensors(weights() | {"scale_factor": torch.tensor(0.25)}, path)
    config = ldm_config("epsilon")
    config["model"]["params"] |= {"scale_by_std": True, "scale_factor": 1.0}
    save_ldm_config(config, tmp_path / "model.yaml")
    for asked in (None, tmp_path / "model.yaml"):
        assert read_single_file(path, config=asked).vae_config["scaling_factor"] == 0.25


def test_a_text_layer_that_is_not_read_is_refused(model: Path) -> None:
    """A config that skips CLIP's last layers was read as if it did not."""
    config = ldm_config("epsilon")
    config["model"]["params"]["cond_stage_config"]["params"] |= {"layer": "hidden", "layer_idx": 11}
    save_ldm_config(config, model.with_suffix(".yaml"))
    with pytest.raises(ValueError, match=r"cond_stage_config.layer='hidden' must be last"):
        read_single_file(model)


def test_a_yaml_that_is_no_config_is_not_overwritten(model: Path, tmp_path: Path) -> None:
    file = read_single_file(model)
    file.scheduler_config = Diffusion("scaled_linear", "v_prediction").to_scheduler_config()
    (tmp_path / "out.yaml").write_text("my notes")
    with pytest.raises(ValueError, match=r"out\.yaml: is no LDM config"):
        write_single_file(file, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    save_ldm_config(ldm_config("epsilon"), tmp_path / "out.yaml")
    write_single_file(file, tmp_path / "out.safetensors")
    assert "parameterization: v\n" in (tmp_path / "out.yaml").read_text()


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    tiny_tokenizer(tmp_path / "scratch").save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_convert_reads_the_file_beside(model: Path, tokenizer: Path, tmp_path: Path) -> None:
    save_ldm_config(ldm_config("v_prediction"), model.with_suffix(".yaml"))
    out = tmp_path / "out"
    assert main(["convert", str(model), str(out), "--tokenizer", str(tokenizer)]) == 0
    scheduler = load_json(out / "scheduler" / "scheduler_config.json")
    assert scheduler["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("out", ["new.safetensors", "folder"])
def test_a_converted_pickle_keeps_the_file_beside(
    tmp_path: Path, tokenizer: Path, out: str
) -> None:
    """Without it the safetensors file that is made of a v model would say nothing of it."""
    torch.save({"state_dict": weights()}, tmp_path / "old.ckpt")
    save_ldm_config(ldm_config("v_prediction"), tmp_path / "old.yaml")
    arguments = ["convert", "--unsafe_pickle", str(tmp_path / "old.ckpt"), str(tmp_path / out)]
    if out == "folder":
        assert main([*arguments, "--tokenizer", str(tokenizer)]) == 0
        assert Pipeline.from_pretrained(tmp_path / out).diffusion.prediction == "v_prediction"
        return
    assert main(arguments) == 0
    assert prediction(tmp_path / out) == "v_prediction"
    assert yaml.safe_load((tmp_path / "new.yaml").read_text()) == ldm_config("v_prediction")


def test_convert_overwrites_no_yaml(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It writes one beside a single file: somebody's notes of that name were gone."""
    (tmp_path / "out.yaml").write_text("my notes")
    assert main(["convert", str(model), str(tmp_path / "out.safetensors")]) == 2
    assert "out.yaml is there already" in capsys.readouterr().err
    assert (tmp_path / "out.yaml").read_text() == "my notes"
