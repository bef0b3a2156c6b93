"""Options by diffusers' names do what they do there, or are answered with what to give instead."""

import inspect
import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny import tiny_pipeline
from torch import Tensor

import latentdiff
from latentdiff.noise import ImageNoise
from latentdiff.pipeline import Pipeline
from latentdiff.request import Request


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return tiny_pipeline(tmp_path_factory.mktemp("tokens"))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_both_names_of_an_option_are_one(pipe: Pipeline) -> None:
    theirs = pipe("a", num_images_per_prompt=2, num_inference_steps=2, seed=1, progress=False)
    ours = pipe("a", num_images=2, steps=2, seed=1, progress=False)
    assert theirs == ours
    with pytest.raises(ValueError, match="num_images=3 and num_images_per_prompt=2 are two names"):
        pipe("a", num_images=3, num_images_per_prompt=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [(4, 8, 8), (3, 5, 5)])
def test_a_generators_noise_is_what_diffusers_draws(
    size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Of one generator it draws all images at once, of a list each alone, in the model's dtype."""
    randn_tensor = pytest.importorskip("diffusers.utils.torch_utils").randn_tensor
    cpu = torch.device("cpu")
    for given in ([generator(3)] * 3, [generator(seed) for seed in (3, 4, 5)]):
        again = generator(3) if given[0] is given[1] else [generator(seed) for seed in (3, 4, 5)]
        noise = ImageNoise(given, size, device=cpu, dtype=torch.float32, theirs=dtype)
        for _ in range(2):  # as a sampler that adds noise
            theirs = randn_tensor((3, *size), generator=again, device=cpu, dtype=dtype)
            assert noise().equal(theirs.float())


def test_a_generator_draws_as_its_seed_and_moves_on(pipe: Pipeline) -> None:
    options: dict[str, Any] = {"steps": 2, "progress": False, "sampler": "euler_ancestral"}
    given = generator(7)
    first = pipe("a", generator=given, **options)
    assert first.images == pipe("a", seed=7, **options).images
    assert first.seeds == []
    assert pipe("a", generator=given, **options).images != first.images
    each = pipe(["a", "b"], generator=[generator(1), generator(2)], **options).images
    assert each == pipe(["a", "b"], seed=[1, 2], **options).images


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"generator": 3}, "generator holds 3; it must be a torch.Generator or a list"),
        ({"generator": [generator(1)] * 3}, "generator lists 3 for 2 images"),
        ({"generator": generator(1), "seed": 2}, "generator is in place of seed"),
        ({"generator": generator(1), "variation_strength": 0.2}, "generator is in place of seed"),
    ],
)
def test_a_generator_that_cannot_be_is_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Request(["a", "b"], **options)
    with pytest.raises(ValueError, match="generator cannot be recorded"):
        Request("a", generator=generator(1)).record(0)


def test_output_types_hold_the_same_images(pipe: Pipeline) -> None:
    def drawn(output_type: Any) -> Any:
        options: dict[str, Any] = {"num_images": 2, "steps": 2, "seed": 0, "progress": False}
        return pipe("a", **options, output_type=output_type).images

    images, array, tensor, latents = map(drawn, ("pil", "np", "pt", "latent"))
    assert (array.shape, tensor.shape) == ((2, 16, 16, 3), (2, 3, 16, 16))
    assert np.array_equal((array * 255).round().astype(np.uint8), np.stack(images))
    assert np.array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert pipe.decode(latents) == images
    with pytest.raises(ValueError, match="output_type='jpeg' must be one of pil, np, pt, latent"):
        drawn("jpeg")


def test_a_callback_sees_each_step_as_stream_does(pipe: Pipeline) -> None:
    seen: list[tuple[int, float, Tensor]] = []

    def note(one: Pipeline, step: int, timestep: Tensor, given: dict[str, Any]) -> dict[str, Any]:
        assert one is pipe
        seen.append((step, float(timestep), given["latents"]))
        return given

    options: dict[str, Any] = {"steps": 3, "seed": 0}
    drawn = pipe("a", **options, progress=False, callback_on_step_end=note)
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert seen[0][1] > seen[1][1] > seen[2][1]
    assert [pipe.decode(latents) for _, _, latents in seen] == list(pipe.stream("a", **options))
    assert pipe.decode(seen[-1][2]) == drawn.images


def test_a_callback_ends_a_call_with_what_is_there_or_without(pipe: Pipeline) -> None:
    previews = list(pipe.stream("a", steps=4, seed=0))

    def enough(one: Pipeline, step: int, *_: Any) -> None:
        one._interrupt = step == 1

    def lost(*_: Any) -> None:
        raise TimeoutError("too long")

    options: dict[str, Any] = {"steps": 4, "seed": 0, "progress": False}
    assert pipe("a", **options, callback_on_step_end=enough).images == previews[1]
    assert pipe("a", **options).images == previews[-1]  # the next call is whole again
    with pytest.raises(TimeoutError, match="too long"):
        pipe("a", **options, callback_on_step_end=lost)


@pytest.mark.parametrize(
    "change",
    [
        lambda *given: {"latents": given[3]["latents"] * 2},
        lambda *given: {"latents": given[3]["latents"].mul_(2)},
        lambda *_: {"prompt_embeds": 1},
    ],
)
def test_what_a_callback_changes_is_refused(pipe: Pipeline, change: Any) -> None:
    with pytest.raises(ValueError, match="has no effect here"):
        pipe("a", steps=2, progress=False, callback_on_step_end=change)
    with pytest.raises(ValueError, match=r"tensor_inputs=\['prompt_embeds'\] must be"):
        pipe("a", callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_to_takes_device_and_dtype_and_loading_torch_dtype() -> None:
    pipe = Pipeline.from_pretrained("emoji", torch_dtype=torch.bfloat16)
    assert (pipe.device, pipe.dtype) == (torch.device("cpu"), torch.bfloat16)
    assert pipe.to("cpu", torch.float32).dtype == torch.float32
    assert pipe.to(device="cpu", dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="give a device and a dtype, in this order"):
        pipe.to(torch.float32, torch.float32)
    with pytest.raises(ValueError, match=r"dtype=torch.float16 and torch_dtype=torch.bfloat16"):
        Pipeline.from_pretrained("emoji", dtype=torch.float16, torch_dtype=torch.bfloat16)


def test_a_model_is_loaded_onto_the_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stayed on the CPU, and the command line had the GPU."""
    monkeypatch.setattr("latentdiff.device.accelerator", lambda: torch.device("meta"))
    assert Pipeline.from_pretrained("emoji").device.type == "meta"
    assert Pipeline.from_pretrained("emoji", device="cpu").device.type == "cpu"


def test_help_dir_and_repr_say_what_there_is(pipe: Pipeline) -> None:
    """`dir(latentdiff)` had no Pipeline, and a pipeline was <... object at 0x7f...>."""
    assert {"Pipeline", "PipelineOutput", "Request"} <= set(dir(latentdiff))
    assert latentdiff.Request is Request
    assert re.fullmatch(
        r"<Pipeline: UNet for 16 x 16 pixels \(.*\); 0\.\d M .*; float32 on cpu by torch>",
        repr(pipe),
    )
    documented = inspect.getdoc(Pipeline.__call__) or ""
    assert "output_type" in documented


@pytest.mark.processes
def test_bars_are_off_for_all_calls_by_tqdms_variable() -> None:
    code = "import latentdiff as l; l.Pipeline.from_pretrained('emoji')('a', steps=1)"
    env = os.environ | {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True
    )
    assert "it/s" not in done.stderr
    assert "1/1" not in done.stderr
