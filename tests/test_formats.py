"""Pipeline folders on disk: what is missing or unknown is named before anything is loaded."""

import json
import shutil
from pathlib import Path

import pytest
from tiny import tiny_pipeline

from latentdiff.formats.diffusers import check_pipeline_folder, find_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline(tmp_path_factory.mktemp("tokenizer")).save_pretrained(folder)
    return folder


def test_an_empty_folder_lists_all_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model_index\.json, unet/config\.json, .*scheduler"):
        check_pipeline_folder(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("_class_name", "StableDiffusionXLPipeline"),
        ("unet", ["evil_module", "UNet3DConditionModel"]),
        ("unet", ["my_unet", "UNet2DConditionModel"]),
        ("text_encoder", [None, None]),
    ],
)
def test_classes_that_are_not_ours_are_refused_by_name(
    folder: Path, tmp_path: Path, field: str, value: object
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, field: value}))
    with pytest.raises(ValueError, match=rf"model_index\.json: {field} is .*allowed: "):
        check_pipeline_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nobody/nothing", "could not be fetched"),
        ("no/such/folder", "is neither a folder nor a hub id"),
        (Path("nowhere"), "is not a folder"),
    ],
)
def test_a_model_that_is_not_there_names_what_is_allowed(name: str | Path, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"{reason}.*allowed are emoji \(embedded\)"):
        find_model(name)
