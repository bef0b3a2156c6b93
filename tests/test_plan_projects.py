"""`latentdiff plan` of a project: its parts are found, and planned one after the other."""

from pathlib import Path

import pytest
import yaml
from support.settings import ANY, clip, unet, vae
from transformers import CLIPTextConfig

from latentdiff.cli import main
from latentdiff.models.vae import VAE, VAEConfig
from latentdiff.planning.plan import make_plan
from latentdiff.planning.settings import read_settings


def test_a_projects_parts_are_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its configurations name each other's folders; from beside it they were asked of the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    path = Path("mine/unet.yaml")
    path.write_text("vae: vae/model\ntext_encoder: own/name\n")
    assert read_settings(path, {}) == {"vae": "vae/model", "text_encoder": "own/name"}
    (tmp_path / "mine" / "vae.yaml").write_text("output_dir: vae")
    assert read_settings(path, {})["vae"] == "mine/vae.yaml"  # by which it will be trained
    assert read_settings(path, {"vae": "emoji"})["vae"] == "emoji"
    (tmp_path / "mine" / "vae" / "model").mkdir(parents=True)
    assert read_settings(path, {})["vae"] == "mine/vae/model"
    path.write_text("init: base/model\n")
    (tmp_path / "mine" / "base.yaml").write_text("output_dir: base")
    with pytest.raises(ValueError, match=r"init=base/model in mine/unet.yaml is not trained yet; "):
        read_settings(path, {})
    path.write_text("vae: vae/model\n")
    monkeypatch.chdir(tmp_path / "mine")
    assert read_settings(Path("unet.yaml"), {})["vae"] == "vae/model"


def test_a_new_project_is_planned_whole_as_a_trained_one_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The UNet's shapes follow from a VAE, a CLIP and a cache that are not there yet."""
    parts = {"vae": vae(32, 2, 16), "clip": clip(2), "cache": {"image_size": 32, "flip": True}}
    parts["unet"] = unet(32, 2, 16) | {"vae": "vae/model", "text_encoder": "clip/model"}
    parts["unet"] |= {"cache": "cache"}
    del parts["unet"]["image_size"]
    for part, settings in parts.items():
        (tmp_path / f"{part}.yaml").write_text(yaml.safe_dump(settings))
    assert main(["plan", str(tmp_path), "--device", "t4", "--images", "1000"]) == 0
    said = capsys.readouterr().out
    titles = [line.split(":")[0] for line in said.splitlines() if "micro-batches" in line]
    assert titles == ["vae", "clip", "unet"]
    assert "disk, latents of 1,000 images" in said
    found = make_plan(read_settings(tmp_path / "unet.yaml", {}), device=ANY, gpu=True)
    # Mean and variance of 4 channels in float16, as they are and mirrored.
    assert found.cache_bytes_per_image == 2 * 2 * 2 * 4 * 16 * 16
    VAE(VAEConfig(**parts["vae"]["vae"])).save_pretrained(tmp_path / "vae/model/vae")
    tower = CLIPTextConfig(
        vocab_size=600,
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
    )
    tower.save_pretrained(tmp_path / "clip/model/text_encoder")
    trained = make_plan(read_settings(tmp_path / "unet.yaml", {}), device=ANY, gpu=True)
    assert trained.resident == found.resident
    assert trained.footprint == found.footprint


def test_a_plan_of_a_project_has_no_options_of_one_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("vae", "clip", "cache", "unet"):
        (tmp_path / f"{part}.yaml").write_text("{}")
    assert main(["plan", str(tmp_path), "--batch_size", "2"]) == 2
    assert "--batch_size is for one training" in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "nowhere")]) == 2
    assert "is no project" in capsys.readouterr().err
