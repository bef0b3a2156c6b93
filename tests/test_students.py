"""Students on disk: how they draw by themselves, here, in diffusers and as a single file."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from support.students import DIFFUSIONS, student_of
from support.tiny import Recording
from test_interchange import decibels

from latentdiff.cli import main
from latentdiff.diffusion import Diffusion
from latentdiff.pipeline import Pipeline
from latentdiff.request import Request


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_a_student_draws_by_itself_in_its_steps_without_guidance(tmp_path: Path, name: str) -> None:
    pipe = Recording.from_pretrained(student_of(tmp_path, DIFFUSIONS[name], steps=3))
    own = {"steps": 3, "guidance_scale": 1.0, "sampler": "ddim"}
    drawn = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({}, own, {"num_inference_steps": 3}, {"steps": 2}, {"sampler": "dpmpp_2m"}):
            pipe("a cat", seed=1, progress=False, **options)
            drawn.append(pipe.latents)
        stream = list(pipe.stream("a cat", seed=1))
    assert len(stream) == 3
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[3])
    assert not torch.equal(drawn[0], drawn[4])
    with pytest.warns(UserWarning, match="guidance_scale=7.5: the model is a student"):
        pipe.draw(Request("a cat", seed=1, progress=False, steps=2))


def test_other_models_draw_as_before() -> None:
    request = Request.of(DIFFUSIONS["sd"], "a cat", steps=None, guidance_scale=None, seed=1)
    assert request.record(0) == Request("a cat", seed=1).record(0)
    config = DIFFUSIONS["sd"].to_scheduler_config()
    assert not [key for key in config if key.startswith("_d")]


@pytest.mark.interchange
# diffusers hands tensors to numpy in a way that numpy 2 deprecates.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "steps"), [("sd", 4), ("sd", 1), ("zero snr", 4), ("flow", 1), ("flow", 4)]
)
def test_diffusers_draws_the_same_image(tmp_path: Path, name: str, steps: int) -> None:
    folder = student_of(tmp_path, DIFFUSIONS[name], steps)
    theirs: Any = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    kind = DPMSolverMultistepScheduler if name == "flow" else DDIMScheduler
    assert type(theirs.scheduler) is kind
    theirs.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(3)
    images = theirs(
        "a cat",
        num_inference_steps=steps,
        guidance_scale=1.0,
        generator=rng,
        height=16,
        width=16,
        output_type="pt",
    ).images
    ours = Recording.from_pretrained(folder)
    ours("a cat", seed=3, progress=False)
    decoded = ours.vae.decode(ours.latents).detach()
    assert decibels((decoded / 2 + 0.5).clamp(0, 1), images) > 60


def test_the_command_line_draws_a_student_in_its_steps(tmp_path: Path) -> None:
    folder = student_of(tmp_path, DIFFUSIONS["flow"])
    drawn = ["--model", str(folder), "--seed", "1", "--device", "cpu", "a cat"]
    main(["generate", *drawn, "--out", str(tmp_path / "own")])
    options = ["--steps", "4", "--guidance_scale", "1", "--sampler", "ddim"]
    main(["generate", *drawn, *options, "--out", str(tmp_path / "given")])
    own, given = ((tmp_path / name / "0000-1.png").read_bytes() for name in ("own", "given"))
    assert own == given


def test_a_single_file_remembers_that_it_is_a_student(tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(student_of(tmp_path, DIFFUSIONS["flow"]))
    sentences = pipe.save_single_file(tmp_path / "student.safetensors")
    assert (
        "the sampler Euler, the schedule SGM Uniform, 4 steps and a CFG scale of 1" in sentences[-1]
    )
    again = Pipeline.from_pretrained(tmp_path / "student.safetensors")
    assert again.diffusion == pipe.diffusion


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"distilled_steps": 0}, "distilled_steps=0 must be 1 to 50"),
        ({"distilled_steps": 51}, "distilled_steps=51 must be 1 to 50"),
        (
            {"distilled_steps": 4, "learned_variance": True},
            "learned_variance=True is not for a student",
        ),
    ],
)
def test_no_diffusion_is_such_a_student(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(DIFFUSIONS["sd"], **fields)
    config = DIFFUSIONS["sd"].to_scheduler_config() | {"_distilled_steps": "four"}
    with pytest.raises(ValueError, match="_distilled_steps='four' must be a whole number"):
        Diffusion.from_scheduler_config(config)
