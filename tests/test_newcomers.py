"""What people mistype, mistake and leave out: each is answered in a sentence that helps."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.command import run
from support.tiny import tiny_pipeline

import latentdiff
from latentdiff.cli import drawing
from latentdiff.explaining.record import explain
from latentdiff.pipeline import Pipeline
from latentdiff.request import Request


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return tiny_pipeline(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def folder(pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    pipe.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["genrate", "a cat"], "did you mean generate?"),
        (["a cat"], 'an image is drawn by: latentdiff generate "a cat"'),
        (["generate", "a cat", "--steps", "abc"], "--steps: 'abc' must be a whole number"),
        (["generate", "a cat", "--strength", "x"], "--strength: 'x' must be a number"),
        (["generate", "a cat", "--dtype", "fp16"], "did you mean float16?"),
        (["generate", "a cat", "--stpes", "5"], "did you mean --steps?"),
        (["generate", "--prompts_file", "x.txt"], "did you mean --prompts?"),
        (["generate"], "nothing to draw; give a PROMPT"),
    ],
)
def test_a_mistyped_command_line_is_answered(
    typed: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*typed) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_an_option_that_is_near_to_none_is_given_no_other(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("generate", "--wildcards", "x.txt") == 2
    assert "did you mean" not in capsys.readouterr().err


def test_help_answers_to_an_option_and_to_a_word_of_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for asked in ("sampler", "--sampler"):
        assert run("generate", f"--help={asked}") == 0
        said = capsys.readouterr().out
        assert "dpmpp_2m" in said
        assert "--steps" not in said
    assert run("generate", "--help", "mask") == 0
    assert "--mask_image" in capsys.readouterr().out


@pytest.mark.parametrize("sampler", ["foo", "restart", "zzz"])
def test_a_sampler_that_is_near_to_none_is_given_no_other(sampler: str) -> None:
    with pytest.raises(ValueError, match=f"sampler={sampler} is unknown \\(known: ddpm"):
        Request("a cat", sampler=sampler)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"steps": True}, "steps=True must be a whole number"),
        ({"seed": True}, "seed=True must be a whole number"),
        ({"guidance_scale": True}, "guidance_scale=True must be a number"),
        ({"progress": "no"}, "progress='no' must be True or False"),
        ({"prompt_weighting": "yes"}, "prompt_weighting='yes' must be True or False"),
        ({"sampler": "dpm"}, "did you mean dpmpp_2m?"),
        ({"callback_on_step_end": 3}, "callback_on_step_end=3 must be a function"),
        ({"callback_on_step_end": lambda *_: 3}, "callback_on_step_end returned 3"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "inputs='latents' must be"),
    ],
)
def test_a_value_of_another_type_is_refused(
    option: dict[str, Any], said: str, pipe: Pipeline
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        pipe("a cat", **{"steps": 1, "seed": 0, "progress": False} | option)


def test_an_array_in_a_message_takes_one_line() -> None:
    with pytest.raises(ValueError, match="must be a PIL image") as refused:
        Request("a cat", image=np.zeros((64, 64, 3)))  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(refused.value)


def test_a_device_or_dtype_that_there_is_not_is_refused(pipe: Pipeline, folder: Path) -> None:
    for device in ("gpu", "float16"):
        with pytest.raises(ValueError, match=f"device='{device}' cannot be used"):
            pipe.to(device)
        with pytest.raises(ValueError, match=f"device='{device}' cannot be used"):
            Pipeline.from_pretrained(folder, device=device)
    with pytest.raises(ValueError, match=r"dtype=torch.int32 must be a torch.dtype such as"):
        pipe.to(torch.int32)
    with pytest.raises(ValueError, match=r"dtype=3 must be a dtype such as torch.float16"):
        Pipeline.from_pretrained(folder, dtype=3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_model_without_a_name_is_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="must be a name or a path"):
        Pipeline.from_pretrained(name)


def test_a_file_that_is_missing_is_not_looked_for_on_the_hub() -> None:
    with pytest.raises(ValueError, match=r"model='nope.safetensors': no such file"):
        Pipeline.from_pretrained("nope.safetensors")


def test_an_unknown_option_of_explain_is_named(pipe: Pipeline) -> None:
    with pytest.raises(TypeError, match="there is no option 'num_steps'; give steps"):
        explain(pipe, "a cat", num_steps=2)


def test_the_package_lists_what_it_offers() -> None:
    assert "Pipeline" in dir(latentdiff)
    assert "TYPE_CHECKING" not in dir(latentdiff)


def test_a_tokenizer_is_a_folder_of_one_or_a_pipelines(folder: Path, tmp_path: Path) -> None:
    """transformers makes an empty tokenizer of any other folder, and all prompts alike."""
    file = tmp_path / "model.safetensors"
    Pipeline.from_pretrained(folder).save_single_file(file)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds none: give the folder of a vocab.json"):
        Pipeline.from_single_file(file, tokenizer=tmp_path / "empty")
    for place in (folder, folder / "tokenizer"):
        loaded = Pipeline.from_single_file(file, tokenizer=place)
        states = loaded.encode(["a cat", "a dog"])
        assert not torch.equal(states[0], states[1])


def test_a_checkpoint_given_as_a_lora_is_recognised(pipe: Pipeline, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    pipe.save_single_file(file)
    with pytest.raises(ValueError, match="whole checkpoint and no LoRA; give it as the model"):
        pipe.loras.load(file)


def test_a_card_goes_along_with_a_single_file_and_back(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    (source / "README.md").write_text("# Mine", encoding="utf-8")
    (source / "preview.png").write_bytes(b"image")
    assert run("convert", str(source), str(tmp_path / "one.safetensors")) == 0
    assert (tmp_path / "one.md").read_text("utf-8") == "# Mine"
    assert (tmp_path / "one.preview.png").read_bytes() == b"image"
    assert run("convert", str(tmp_path / "one.safetensors"), str(tmp_path / "back")) == 0
    assert (tmp_path / "back" / "README.md").read_text("utf-8") == "# Mine"
    assert (tmp_path / "back" / "preview.png").read_bytes() == b"image"
    assert run("convert", str(folder), str(tmp_path / "bare.safetensors")) == 0
    assert not (tmp_path / "bare.md").exists()  # nothing to say that the file does not


def test_a_card_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one.md").write_text("my notes", encoding="utf-8")
    assert run("convert", str(folder), str(tmp_path / "one.safetensors")) == 2
    assert (tmp_path / "one.md").read_text("utf-8") == "my notes"


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_that_the_processor_only_imitates_is_said(
    tmp_path: Path,
    native: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """14 times as slow as float32 on an AMD EPYC with AVX2, without a word."""
    monkeypatch.setattr(drawing, "computes_bf16", lambda device: native)
    options = ("--steps", "1", "--dtype", "bfloat16", "--device", "cpu", "--out", str(tmp_path))
    assert run("generate", "a cat", *options) == 0
    assert ("does not compute in bfloat16" in capsys.readouterr().err) != native
