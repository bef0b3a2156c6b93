"""From prompt to image: parity with diffusers both ways, seeds, round trips, refusals."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny import Recording, tiny_pipeline

from latentdiff.diffusion import Diffusion
from latentdiff.images import to_pil
from latentdiff.noise import ImageNoise
from latentdiff.pipeline import Pipeline
from latentdiff.samplers import SAMPLERS

# diffusers' own business, inside its DPMSolverMultistepScheduler.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPTS = ["a cat", "a dog", "red heart", "", "猫", "sunflower", "a", "rainbow"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return tiny_pipeline(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def beta_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """On a schedule of betas, for the samplers that have no meaning on a flow."""
    diffusion = Diffusion("scaled_linear", "epsilon", timestep_spacing="leading")
    return tiny_pipeline(tmp_path_factory.mktemp("tokenizer"), diffusion)


QUICK = ("euler_ancestral", "dpmpp_2m")  # one that draws noise, one that remembers


@pytest.fixture(
    params=[
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.exhaustive)
        for name in SAMPLERS
    ]
)
def sampler(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def fitting(sampler: str, pipeline: Pipeline, beta_pipeline: Pipeline) -> Pipeline:
    """A pipeline that the sampler can sample."""
    return pipeline if SAMPLERS[sampler].flow else beta_pipeline


@pytest.fixture(scope="module")
def folder(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    return folder


def make_images(
    pipeline: Pipeline, prompts: Sequence[str], seeds: Sequence[int], sampler: str
) -> list[bytes]:
    output = pipeline(
        prompts, seed=list(seeds), steps=4, sampler=sampler, guidance_scale=3.0, progress=False
    )
    assert output.seeds == list(seeds)
    return [image.tobytes() for image in output.images]


def test_same_seed_same_image_alone_in_a_batch_of_eight_and_in_any_order(
    fitting: Pipeline, sampler: str
) -> None:
    seeds = [3, 1, 4, 15, 9, 2, 6, 5]
    batch = make_images(fitting, PROMPTS, seeds, sampler)
    assert len(set(batch)) == 8
    assert make_images(fitting, PROMPTS[::-1], seeds[::-1], sampler) == batch[::-1]
    for i in (0, 4, 7):
        assert make_images(fitting, PROMPTS[i : i + 1], seeds[i : i + 1], sampler) == [batch[i]]


def test_the_first_noise_is_the_one_that_diffusers_users_know() -> None:
    noise = ImageNoise([7, 8], (4, 2, 3), device=torch.device("cpu"), dtype=torch.float32)
    first = noise()
    for i, seed in enumerate((7, 8)):
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(first[i : i + 1], torch.randn((1, 4, 2, 3), generator=generator))
    assert not torch.equal(noise(), first)


def test_seeds_count_up_and_fresh_ones_are_reported(pipeline: Pipeline) -> None:
    counted = pipeline(["a", "b"], num_images=2, seed=5, steps=1, progress=False)
    assert counted.seeds == [5, 6, 7, 8]
    fresh = pipeline(["a", "a"], steps=1, progress=False)
    assert len(set(fresh.seeds)) == 2
    again = pipeline(["a", "a"], seed=fresh.seeds, steps=1, progress=False)
    assert [i.tobytes() for i in again.images] == [i.tobytes() for i in fresh.images]


def test_images_come_prompt_by_prompt(pipeline: Pipeline) -> None:
    both = make_images(pipeline, ["a cat", "a cat", "a dog", "a dog"], [0, 1, 2, 3], "ddim")
    output = pipeline(
        ["a cat", "a dog"], num_images=2, seed=0, steps=4, guidance_scale=3.0, progress=False
    )
    assert [image.tobytes() for image in output.images] == both


def test_num_inference_steps_is_another_word_for_steps(pipeline: Pipeline) -> None:
    one = pipeline("a", seed=0, steps=3, progress=False).images[0]
    other = pipeline("a", seed=0, num_inference_steps=3, progress=False).images[0]
    assert one.tobytes() == other.tobytes()


def test_guidance_one_ignores_the_negative_prompt_and_others_do_not(pipeline: Pipeline) -> None:
    def draw(guidance_scale: float, negative_prompt: str) -> bytes:
        output = pipeline(
            "a cat",
            seed=0,
            steps=3,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            progress=False,
        )
        return output.images[0].tobytes()

    with pytest.warns(UserWarning, match="negative_prompt: without effect"):
        assert draw(1, "") == draw(1, "a dog")
    assert draw(3, "") != draw(3, "a dog")


def test_drawing_records_no_gradients(folder: Path) -> None:
    """It did: fifty steps' activations were kept, and memory grew with the number of steps."""
    pipeline = Recording.from_pretrained(folder)
    assert pipeline.unet.conv_in.weight.requires_grad
    pipeline("a cat", steps=2, progress=False)
    assert not pipeline.latents.requires_grad


def test_a_stream_previews_every_step_and_ends_on_the_image(
    fitting: Pipeline, sampler: str
) -> None:
    options: dict[str, Any] = {"seed": 0, "steps": 4, "sampler": sampler}
    previews = list(fitting.stream(["a cat", "a dog"], **options))
    assert [len(preview) for preview in previews] == [2] * 4
    finished = fitting(["a cat", "a dog"], progress=False, **options).images
    assert [i.tobytes() for i in previews[-1]] == [i.tobytes() for i in finished]


def test_a_bad_request_is_refused_before_the_first_preview(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="steps=0"):
        pipeline.stream("a cat", steps=0)


def test_the_progress_bar_is_shown_only_when_wanted(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline("a", steps=2, progress=False)
    assert capsys.readouterr().err == ""
    pipeline("a", steps=2)
    assert "2/2" in capsys.readouterr().err


def test_folder_single_file_folder_is_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    pipeline = Pipeline.from_pretrained(folder)
    sentences = pipeline.save_single_file(tmp_path / "model.safetensors")
    assert any("diffusers" in sentence for sentence in sentences)
    Pipeline.from_pretrained(tmp_path / "model.safetensors").save_pretrained(tmp_path / "again")
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    again = tmp_path / "again"
    assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    for name in files:
        assert (folder / name).read_bytes() == (again / name).read_bytes(), name


def test_a_saved_pipeline_comes_back_bit_for_bit(
    pipeline: Pipeline, folder: Path, tmp_path: Path
) -> None:
    loaded = Pipeline.from_pretrained(folder)
    assert loaded.diffusion == pipeline.diffusion
    for name in ("unet", "vae", "text_encoder"):
        before, after = getattr(pipeline, name).state_dict(), getattr(loaded, name).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    loaded.save_pretrained(tmp_path)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    for file in files:
        assert (folder / file).read_bytes() == (tmp_path / file).read_bytes(), file


def test_bfloat16_networks_draw_nearly_the_same_image(folder: Path) -> None:
    drawn = [
        Pipeline.from_pretrained(folder, dtype=dtype)("a", seed=0, steps=4, progress=False)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    full, half = (np.asarray(output.images[0], dtype=float) for output in drawn)
    assert np.abs(full - half).mean() < 8


def test_values_are_rounded_and_not_truncated() -> None:
    levels = torch.tensor([0.4, 0.6, 254.4, 254.6, -7.0, 300.0]) / 127.5 - 1
    image = to_pil(levels.reshape(1, 1, 6).expand(3, 1, 6))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 254, 255, 0, 255]


def test_an_image_that_is_not_finite_is_refused_and_not_drawn_black(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="not finite"):
        pipeline.decode(torch.full((1, 4, 8, 8), float("nan")))


def test_one_prompt_is_encoded_as_one(pipeline: Pipeline) -> None:
    """A text is a sequence of texts, too: its letters were encoded, each alone."""
    assert torch.equal(pipeline.encode("a cat"), pipeline.encode(["a cat"]))


def test_too_much_guidance_is_not_blamed_on_half_precision(pipeline: Pipeline) -> None:
    """Whatever was not finite was said to be half precision's overflow."""
    with pytest.raises(ValueError, match=r"guidance_scale=1e\+30 leads too far") as raised:
        pipeline("a cat", steps=2, seed=0, guidance_scale=1e30, progress=False)
    assert "float16" not in str(raised.value)


def test_a_size_beyond_what_is_read_is_refused_before_it_is_allocated(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="height=65536 and width=65536 are too large"):
        pipeline("a cat", height=65_536, width=65_536, progress=False)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"sampler": "dpmp_2m"}, "did you mean dpmpp_2m"),
        ({"steps": 0}, "steps=0 must be"),
        ({"steps": 2.5}, r"steps=2\.5 must be"),
        ({"num_inference_steps": -1}, "steps=-1 must be"),
        ({"steps": 1001}, "steps=1001"),
        ({"num_images": 0}, "num_images=0 must be"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan must be"),
        ({"guidance_scale": -1.0}, r"guidance_scale=-1\.0 must be"),
        ({"height": 17}, "height=17 must be divisible by 2"),
        ({"width": -16}, "width=-16 must be"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": ["a", 3]}, "prompt holds 3"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt lists 2 for 1 prompts"),
        ({"seed": [1, 2]}, "seed lists 2 seeds for 1 images"),
        ({"seed": -1}, "seed=-1 must be"),
        ({"seed": [0.5]}, r"seed=0\.5 must be"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(
    pipeline: Pipeline, request_: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(**{"prompt": "a", "progress": False, **request_})


def test_a_long_prompt_is_read_to_its_end_whatever_its_neighbours(pipeline: Pipeline) -> None:
    """The tower reads ten letters at once; it was cut off there, if with a warning."""
    long, longer = "a cat go on and on and on", "a cat go on and on and off"
    options: dict[str, Any] = {"steps": 2, "guidance_scale": 3.0, "progress": False}
    alone = [pipeline(text, seed=4, **options).images[0].tobytes() for text in (long, longer, "a")]
    assert len(set(alone)) == 3
    together = pipeline([long, longer, "a"], seed=[4, 4, 4], **options).images
    assert [image.tobytes() for image in together] == alone
    negative = pipeline("a", seed=4, negative_prompt=long, **options).images[0].tobytes()
    assert negative not in alone


def test_brackets_are_text_unless_weighting_is_asked_for(pipeline: Pipeline) -> None:
    def draw(prompt: str, **options: Any) -> bytes:
        return pipeline(prompt, seed=1, steps=2, progress=False, **options).images[0].tobytes()

    assert draw("(cat:1)", prompt_weighting=True) == draw("cat")
    assert draw("(cat:1)") != draw("cat")
    assert draw("(cat:1.5)", prompt_weighting=True) != draw("cat")


@pytest.mark.parametrize(
    "missing",
    [
        "model_index.json",
        "unet/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer",
        "scheduler/scheduler_config.json",
    ],
)
def test_a_folder_that_is_no_pipeline_says_what_is_missing(
    folder: Path, tmp_path: Path, missing: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    if (broken / missing).is_dir():
        shutil.rmtree(broken / missing)
    else:
        (broken / missing).unlink()
    with pytest.raises(ValueError, match=f"not a whole pipeline folder; missing: {missing}"):
        Pipeline.from_pretrained(broken)


def test_a_folder_in_a_pipeline_or_around_it_names_the_pipeline(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    for given, what in (("model/unet", "one component"), (".", "a run")):
        with pytest.raises(ValueError, match=f"{what}; the pipeline is {tmp_path / 'model'}$"):
            Pipeline.from_pretrained(tmp_path / given)
    model = tmp_path / "mine" / "unet" / "model"
    shutil.copytree(folder, model)
    with pytest.raises(ValueError, match=f"a project; the pipeline is {model}$"):
        Pipeline.from_pretrained(tmp_path / "mine")


@pytest.mark.gpu
def test_a_gpu_draws_the_cpu_image_up_to_rounding_alone_and_in_a_batch(folder: Path) -> None:
    on_cpu, on_gpu = (Pipeline.from_pretrained(folder, device=name) for name in ("cpu", "cuda"))
    options: dict[str, Any] = {"steps": 10, "guidance_scale": 3.0, "progress": False}
    expected = on_cpu(PROMPTS, seed=0, **options).images
    batch = on_gpu(PROMPTS, seed=0, **options).images
    alone = on_gpu(PROMPTS[5], seed=5, **options).images[0]
    for ours, reference in [*zip(batch, expected, strict=True), (alone, expected[5])]:
        difference = np.asarray(ours, dtype=int) - np.asarray(reference, dtype=int)
        assert np.abs(difference).max() <= 2
