"""Model cards: what a run leaves beside its model, for people and for the hub."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image
from support.runs import options
from support.small_run import small_run

from latentdiff.formats.diffusers import LORA
from latentdiff.formats.model_card import public_name
from latentdiff.training.logging.card import write_card


def run_folder(folder: Path, **settings: object) -> Path:
    given = {"batch_size": 4, "optimizer": "adamw", "learning_rate": 1e-3, "seed": 7}
    (folder / "model").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**given, **settings}))
    records = [{"step": 5, "loss": 0.5}, {"step": 10, "loss": 0.25}, {"step": 10, "val_loss": 0.3}]
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    facts = {"data": "/home/me/x", "samples": 1234, "num_val": 12, "sizes": {"32x32": 1234}}
    (folder / "data.json").write_text(json.dumps(facts))
    (folder / "previews").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "previews" / "step-0000010.png")
    return folder


def read(folder: Path) -> tuple[dict[str, object], str]:
    text = (folder / "model" / "README.md").read_text(encoding="utf-8")
    _, matter, body = text.split("---\n", 2)
    return yaml.safe_load(matter), body


def test_a_card_has_what_was_trained_on_and_no_path(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", data="/home/me/x", license="cc-by-4.0")
    (folder / "model" / "model_index.json").touch()
    write_card(folder)
    matter, body = read(folder)
    assert matter == {
        "license": "cc-by-4.0",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["latentdiff", "latent-diffusion"],
    }
    for row in ("1,234, 12 held out", "10 of 4 images", "| images seen | 40 |", "| seed | 7 |"):
        assert row in body
    assert "| loss, last logged | 0.25 |" in body
    assert "| loss on held-out images | 0.3 |" in body
    assert "/home" not in body
    assert str(tmp_path) not in body
    assert (folder / "model" / "preview.png").is_file()


@pytest.mark.parametrize(
    ("file", "settings", "tag", "words"),
    [
        (LORA, {"init": "some/model"}, "lora", "--model some/model --lora"),
        ("clip/config.json", {}, "clip", "--text_encoder"),
        ("config.json", {}, "autoencoder", "latentdiff.scripts.cache_latents --vae"),
        ("model_index.json", {"teacher": "some/model"}, "progressive-distillation", "few steps"),
    ],
)
def test_each_kind_of_model_has_its_card(
    tmp_path: Path, file: str, settings: dict[str, str], tag: str, words: str
) -> None:
    folder = run_folder(tmp_path / "run", **settings)
    (folder / "model" / file).parent.mkdir(exist_ok=True)
    (folder / "model" / file).touch()
    write_card(folder)
    matter, body = read(folder)
    assert tag in str(matter["tags"])
    assert matter["license"] == "unknown"
    assert matter.get("base_model") == ((settings and "some/model") or None)
    assert words in body


def test_a_run_leaves_a_card(tmp_path: Path) -> None:
    small_run(tmp_path / "run")
    _, body = read(tmp_path / "run")
    assert body.startswith("# run\n")
    assert "| steps | 6 of " in body


@pytest.mark.parametrize(
    ("name", "public"),
    [("a/b", "a/b"), ("emoji", "emoji"), ("/a/b", None), ("a/b/c", None), ("../a", None)],
)
def test_only_names_that_are_no_paths_are_public(name: str, public: str | None) -> None:
    assert public_name(name) == public
    assert public_name(None) is None


def test_a_licence_is_a_name_of_the_hub() -> None:
    with pytest.raises(ValueError, match=r"license='My own' must be a name as the hub has it"):
        options(license="My own")
