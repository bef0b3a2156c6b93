"""`latentdiff plan` of a project: its parts are found, and planned one after the other."""

from pathlib import Path

import pytest
import yaml
from support.settings import clip, unet, vae

from latentdiff.cli import main
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
    with pytest.raises(ValueError, match=r"vae=vae/model in mine/unet.yaml is not trained yet; .*"):
        read_settings(path, {})
    assert read_settings(path, {"vae": "emoji"})["vae"] == "emoji"
    (tmp_path / "mine" / "vae" / "model").mkdir(parents=True)
    assert read_settings(path, {})["vae"] == "mine/vae/model"
    monkeypatch.chdir(tmp_path / "mine")
    assert read_settings(Path("unet.yaml"), {})["vae"] == "vae/model"


def test_a_project_is_planned_part_by_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    untrained = unet(32, 2, 16) | {"vae": "vae/model"}
    parts = {"vae": vae(32, 2, 16), "clip": clip(2), "cache": {}, "unet": untrained}
    for part, settings in parts.items():
        (tmp_path / f"{part}.yaml").write_text(yaml.safe_dump(settings))
    assert main(["plan", str(tmp_path), "--device", "t4"]) == 2
    said = capsys.readouterr()
    assert [line.split(":")[0] for line in said.out.splitlines() if "micro-batches" in line] == [
        "vae",
        "clip",
    ]
    assert "is not trained yet; train it first" in said.err
    assert main(["plan", str(tmp_path), "--batch_size", "2"]) == 2
    assert "--batch_size is for one training" in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "nowhere")]) == 2
    assert "is no project" in capsys.readouterr().err
