"""From prompt to picture: parity with diffusers both ways, seeds, round trips, refusals."""

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tiny import CONTEXT_DIM, tiny_pipeline, tiny_text_encoder
from torch import Tensor

from latentdiff.diffusion import Diffusion
from latentdiff.formats.diffusers import check_pipeline_folder, find_model
from latentdiff.pictures import to_pil
from latentdiff.pipeline import PictureNoise, Pipeline
from latentdiff.samplers import SAMPLERS

# diffusers' own business, inside its DPMSolverMultistepScheduler.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPTS = ["a cat", "a dog", "red heart", "", "猫", "sunflower", "a", "rainbow"]
DIFFUSIONS = {
    "flow": Diffusion("flow", "flow_prediction"),
    "epsilon": Diffusion(
        "scaled_linear", "epsilon", timestep_spacing="leading", set_alpha_to_one=False
    ),
    "v": Diffusion("scaled_linear", "v_prediction"),
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return tiny_pipeline(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def folder(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    return folder


class Recording(Pipeline):
    """Keeps the latents that it decodes, which pictures have rounded away."""

    latents: Tensor

    def decode(self, latents: Tensor) -> list[Image.Image]:
        self.latents = latents
        return super().decode(latents)


@contextmanager
def no_log_above_info() -> Iterator[None]:
    """Fail if diffusers or transformers log a warning; they don't pass them on to the root."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert [record.getMessage() for record in records] == []


def first_noise(seed: int, size: tuple[int, int] = (8, 8)) -> Tensor:
    return torch.randn((1, 4, *size), generator=torch.Generator().manual_seed(seed))


def decibels(ours: Tensor, theirs: Tensor) -> float:
    """Peak signal-to-noise ratio of pictures in [0, 1]."""
    return float(-10 * torch.log10((ours.double() - theirs.double()).square().mean() + 1e-30))


def assert_same_picture(folder: Path, diffusers_pipeline: Any, sampler: str, **size: int) -> None:
    """Our pipeline of the folder and diffusers' draw the same picture from the same latents."""
    ours = Recording.from_pretrained(folder)
    diffusers_pipeline.set_progress_bar_config(disable=True)
    latent_size = (size["height"] // 2, size["width"] // 2) if size else (8, 8)
    theirs = diffusers_pipeline(
        "a cat",
        negative_prompt="a dog",
        latents=first_noise(3, latent_size),
        num_inference_steps=20,
        guidance_scale=4.0,
        output_type="pt",
        **size,
    ).images
    output = ours(
        "a cat",
        negative_prompt="a dog",
        seed=3,
        steps=20,
        guidance_scale=4.0,
        sampler=sampler,
        progress=False,
        **size,
    )
    with torch.no_grad():
        floats = (ours.vae.decode(ours.latents) / 2 + 0.5).clamp(0, 1)
    assert decibels(floats, theirs) > 100
    picture = np.asarray(output.images[0], dtype=np.float32) / 255
    assert np.abs(picture - theirs[0].permute(1, 2, 0).numpy()).max() < 0.51 / 255  # rounded


def load_in_diffusers(folder: Path) -> Any:
    with no_log_above_info():
        return StableDiffusionPipeline.from_pretrained(folder)


def test_diffusers_opens_our_flow_folder_without_a_warning_and_draws_our_picture(
    folder: Path,
) -> None:
    theirs = load_in_diffusers(folder)
    assert theirs.scheduler.config.prediction_type == "flow_prediction"
    assert_same_picture(folder, theirs, "dpmpp_2m")


@pytest.mark.parametrize("kind", ["epsilon", "v"])
@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [("ddim", DDIMScheduler), ("dpmpp_2m", DPMSolverMultistepScheduler)],
)
def test_diffusers_opens_our_beta_folder_without_a_warning_and_draws_our_picture(
    tmp_path: Path, kind: str, sampler: str, scheduler: Any
) -> None:
    tiny_pipeline(tmp_path / "tokens", DIFFUSIONS[kind]).save_pretrained(tmp_path / "model")
    theirs = load_in_diffusers(tmp_path / "model")
    theirs.scheduler = scheduler.from_config(theirs.scheduler.config)
    assert_same_picture(tmp_path / "model", theirs, sampler)


def test_a_picture_that_is_not_square_is_diffusers_too(folder: Path) -> None:
    assert_same_picture(folder, load_in_diffusers(folder), "dpmpp_2m", height=24, width=40)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_we_open_a_folder_that_diffusers_wrote_and_draw_its_picture(
    tmp_path: Path, prediction: str
) -> None:
    text_encoder = tiny_text_encoder(tmp_path / "tokens")
    theirs = StableDiffusionPipeline(
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=CONTEXT_DIM,
            attention_head_dim=(2, 4),
            norm_num_groups=4,
            use_linear_projection=True,
        ),
        vae=AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            sample_size=16,
        ),
        text_encoder=text_encoder.model,
        tokenizer=text_encoder.tokenizer,
        scheduler=PNDMScheduler(  # as in SD 1.x and 2.x
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction,
            set_alpha_to_one=False,
            skip_prk_steps=True,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    theirs.save_pretrained(tmp_path / "model")
    # SD's published configurations hold clip_sample too, although PNDMScheduler has no such key.
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config, clip_sample=False)
    assert_same_picture(tmp_path / "model", theirs, "ddim")


def pictures(
    pipeline: Pipeline, prompts: Sequence[str], seeds: Sequence[int], sampler: str
) -> list[bytes]:
    output = pipeline(
        prompts, seed=list(seeds), steps=4, sampler=sampler, guidance_scale=3.0, progress=False
    )
    assert output.seeds == list(seeds)
    return [image.tobytes() for image in output.images]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_same_seed_same_picture_alone_in_a_batch_of_eight_and_in_any_order(
    pipeline: Pipeline, sampler: str
) -> None:
    seeds = [3, 1, 4, 15, 9, 2, 6, 5]
    batch = pictures(pipeline, PROMPTS, seeds, sampler)
    assert len(set(batch)) == 8
    assert pictures(pipeline, PROMPTS[::-1], seeds[::-1], sampler) == batch[::-1]
    for i in (0, 4, 7):
        assert pictures(pipeline, PROMPTS[i : i + 1], seeds[i : i + 1], sampler) == [batch[i]]


def test_the_first_noise_is_the_one_that_diffusers_users_know() -> None:
    noise = PictureNoise([7, 8], (4, 2, 3), device=torch.device("cpu"), dtype=torch.float32)
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


def test_pictures_come_prompt_by_prompt(pipeline: Pipeline) -> None:
    both = pictures(pipeline, ["a cat", "a cat", "a dog", "a dog"], [0, 1, 2, 3], "ddim")
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

    assert draw(1, "") == draw(1, "a dog")
    assert draw(3, "") != draw(3, "a dog")


def test_drawing_records_no_gradients(folder: Path) -> None:
    """It did: fifty steps' activations were kept, and memory grew with the number of steps."""
    pipeline = Recording.from_pretrained(folder)
    assert pipeline.unet.conv_in.weight.requires_grad
    pipeline("a cat", steps=2, progress=False)
    assert not pipeline.latents.requires_grad


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_stream_previews_every_step_and_ends_on_the_picture(
    pipeline: Pipeline, sampler: str
) -> None:
    options: dict[str, Any] = {"seed": 0, "steps": 4, "sampler": sampler}
    previews = list(pipeline.stream(["a cat", "a dog"], **options))
    assert [len(preview) for preview in previews] == [2] * 4
    finished = pipeline(["a cat", "a dog"], progress=False, **options).images
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


def test_half_precision_on_disk_is_float32_when_loaded(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path, dtype=torch.float16)
    loaded = Pipeline.from_pretrained(tmp_path)
    for name in ("unet", "vae", "text_encoder"):
        before, after = getattr(pipeline, name).state_dict(), getattr(loaded, name).state_dict()
        for key, tensor in before.items():
            assert after[key].dtype == tensor.dtype
            half = tensor.half().float() if tensor.is_floating_point() else tensor
            assert torch.equal(after[key], half), key
    sizes = [path.stat().st_size for path in tmp_path.glob("unet/*.safetensors")]
    assert sum(sizes) < 2.5 * sum(parameter.numel() for parameter in pipeline.unet.parameters())
    load_in_diffusers(tmp_path)


def test_bfloat16_networks_draw_nearly_the_same_picture(folder: Path) -> None:
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


def test_a_picture_that_is_not_finite_is_refused_and_not_drawn_black(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="not finite"):
        pipeline.decode(torch.full((1, 4, 8, 8), float("nan")))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"sampler": "dpmpp2m"}, "dpmpp_2m"),
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
        ({"negative_prompt": ["a", "b"]}, "negative_prompt lists 2 texts for 1 prompts"),
        ({"seed": [1, 2]}, "seed lists 2 seeds for 1 pictures"),
        ({"seed": -1}, "seed=-1 must be"),
        ({"seed": [0.5]}, r"seed=0\.5 must be"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(
    pipeline: Pipeline, request_: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(**{"prompt": "a", "progress": False, **request_})


def test_a_prompt_that_is_too_long_warns_with_the_words_that_were_cut(pipeline: Pipeline) -> None:
    with pytest.warns(UserWarning, match="cut off: 'd on'"):
        pipeline("a cat go on and on", steps=1, progress=False)


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


@pytest.mark.gpu
def test_a_gpu_draws_the_cpu_picture_up_to_rounding_alone_and_in_a_batch(folder: Path) -> None:
    on_cpu, on_gpu = (Pipeline.from_pretrained(folder, device=name) for name in ("cpu", "cuda"))
    options: dict[str, Any] = {"steps": 10, "guidance_scale": 3.0, "progress": False}
    expected = on_cpu(PROMPTS, seed=0, **options).images
    batch = on_gpu(PROMPTS, seed=0, **options).images
    alone = on_gpu(PROMPTS[5], seed=5, **options).images[0]
    for ours, reference in [*zip(batch, expected, strict=True), (alone, expected[5])]:
        difference = np.asarray(ours, dtype=int) - np.asarray(reference, dtype=int)
        assert np.abs(difference).max() <= 2
