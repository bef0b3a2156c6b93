"""Pipeline folders on disk: what is missing or unknown is named before anything is loaded."""

import json
import shutil
from pathlib import Path

import pytest
from support.tiny import tiny_pipeline

from latentdiff.formats.diffusers import check_pipeline_folder, find_model, save_model_index
from latentdiff.pipeline import Pipeline


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
        ("unet", ["diffusers", "UNet2DConditionModel", "more"]),
        ("text_encoder", [None, None]),
        ("tokenizer", "CLIPTokenizer"),
        ("_class_name", ["pipeline", "StableDiffusionPipeline"]),
        ("safety_checker", ["safety", "StableDiffusionSafetyChecker"]),
        ("feature_extractor", ["os", "system"]),
        ("image_encoder", ["transformers", "CLIPTextModel"]),
    ],
)
def test_classes_that_are_not_ours_are_refused_by_name(
    folder: Path, tmp_path: Path, field: str, value: object
) -> None:
    with pytest.raises(ValueError, match=rf"model_index\.json: {field} is .*allowed: "):
        check_pipeline_folder(changed(folder, tmp_path, {field: value}))


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("auto_map", {"AutoModel": "evil.Model"}, "code from elsewhere, which never runs here"),
        ("custom_pipeline", "evil", "code from elsewhere, which never runs here"),
        ("scheduler", ["evil", "DDIMScheduler"], "which is not read here"),
        ("prior", ["diffusers", "PriorTransformer"], "which is not read here"),
        ("prior", {"class": "evil"}, "which is not read here"),
    ],
)
def test_what_could_name_code_is_refused(
    folder: Path, tmp_path: Path, field: str, value: object, reason: str
) -> None:
    with pytest.raises(ValueError, match=rf"model_index\.json: {field} .*{reason}"):
        check_pipeline_folder(changed(folder, tmp_path, {field: value}))


def changed(folder: Path, copy: Path, entries: dict[str, object]) -> Path:
    """A copy of the folder with other entries in its model_index.json."""
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | entries))
    return copy


@pytest.mark.parametrize(
    "entries",
    [
        {  # SD 1.5
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
            "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
            "requires_safety_checker": True,
        },
        {"feature_extractor": ["transformers", "CLIPImageProcessor"], "safety_checker": None},
        {"_class_name": "StableDiffusionImg2ImgPipeline", "_name_or_path": "somewhere/else"},
        {"_class_name": "StableDiffusionInpaintPipeline"},
        {"tokenizer": ["transformers", "CLIPTokenizerFast"]},
    ],
)
def test_what_published_folders_hold_besides_is_tolerated_and_not_opened(
    folder: Path, tmp_path: Path, entries: dict[str, object]
) -> None:
    model = changed(folder, tmp_path, entries)
    for part in ("safety_checker", "feature_extractor"):
        (model / part).mkdir()
        (model / part / "pytorch_model.bin").write_bytes(b"not even a pickle")
        (model / part / "config.json").write_text("not even JSON")
    Pipeline.from_pretrained(model)


def test_python_files_in_a_folder_are_never_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers before 0.38 ran a local folder's `.py` although remote code was off."""
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w').close()"
    for part in (".", "unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        for name in ("pipeline", "__init__", "modeling_clip", "tokenization_clip", "evil"):
            (model / part / f"{name}.py").write_text(code)
    for path in ("text_encoder/config.json", "tokenizer/tokenizer_config.json"):
        content = json.loads((model / path).read_text())
        content["auto_map"] = {
            "AutoConfig": "evil.C",
            "AutoModel": "evil.M",
            "AutoTokenizer": "evil.T",
        }
        (model / path).write_text(json.dumps(content))
    monkeypatch.chdir(model)
    Pipeline.from_pretrained(model)
    Pipeline.from_pretrained(Path("."))
    assert not canary.exists()


@pytest.mark.parametrize("name", ["unet", "vae"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("auto_map", {"AutoModel": "evil.M"}),
        ("_class_name", "EvilModel"),
        ("quantization_config", {}),
    ],
)
def test_a_networks_configuration_is_that_of_its_class_alone(
    folder: Path, tmp_path: Path, name: str, key: str, value: object
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / name / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=rf"{name}/config\.json: .*{key}"):
        Pipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("ending", [".bin", ".ckpt", ".pt", ".BIN"])
def test_a_folder_of_pickles_is_refused_with_the_command_that_converts_it(
    folder: Path, tmp_path: Path, ending: str
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(ending))
    with pytest.raises(ValueError, match=rf"model{ending}: .*`latentdiff convert --unsafe_pickle`"):
        check_pipeline_folder(tmp_path)


def test_a_folder_without_plain_weights_names_the_variants_that_it_has(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    with pytest.raises(ValueError, match="no such file; variants found: fp16"):
        check_pipeline_folder(tmp_path)
    assert check_pipeline_folder(tmp_path, variant="fp16")["unet"] == "fp16"
    with pytest.raises(
        ValueError, match="no weights of variant='ema'; variants found: fp16, plain"
    ):
        check_pipeline_folder(tmp_path, variant="ema")


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.bin", "model.CKPT"])
def test_a_pickled_checkpoint_is_no_model(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(ValueError, match=rf"{name}: .*`latentdiff convert --unsafe_pickle`"):
        find_model(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: .*`latentdiff convert --unsafe_pickle`"):
        find_model(str(tmp_path / name))


def test_an_inpainting_unet_is_written_with_its_pipeline(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for channels, name in ((4, "StableDiffusionPipeline"), (9, "StableDiffusionInpaintPipeline")):
        path = tmp_path / "unet" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"in_channels": channels}))
        save_model_index(tmp_path, scheduler_class="DDIMScheduler")
        assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == name


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nobody/nothing", "could not be fetched"),
        ("no/such/folder", "is neither a file, a folder nor a hub id"),
        (Path("nowhere"), "is not a folder"),
    ],
)
def test_a_model_that_is_not_there_names_what_is_allowed(name: str | Path, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"{reason}.*allowed are emoji \(embedded\)"):
        find_model(name)
