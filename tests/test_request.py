"""What a call may ask for: one sentence for what it may not, and a record that asks again."""

import inspect
import json
import re
from typing import Any

import pytest
from PIL import Image

from latentdiff.pipeline import Pipeline
from latentdiff.request import Request

WHITE = Image.new("RGB", (16, 16), "white")


def test_the_arguments_of_a_call_are_the_fields_of_a_request_with_their_defaults() -> None:
    call, request = inspect.signature(Pipeline.__call__), inspect.signature(Request)
    _, *arguments = call.parameters.values()
    assert arguments == list(request.parameters.values())
    with pytest.raises(TypeError, match="guidance"):
        Request("a cat", guidance=3)  # pyright: ignore[reportCallIssue]


def test_images_come_prompt_by_prompt_with_seeds_that_count_up() -> None:
    request = Request(["a", "b"], negative_prompt=["c", "d"], num_images=2, seed=5)
    assert request.prompts == ("a", "a", "b", "b")
    assert request.negative_prompts == ("c", "c", "d", "d")
    assert request.seeds == (5, 6, 7, 8)


def test_variations_share_the_seed_and_count_up_their_own() -> None:
    request = Request("a", num_images=3, seed=5, variation_strength=0.1, variation_seed=9)
    assert request.seeds == (5, 5, 5)
    assert request.variation_seeds == (9, 10, 11)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps": 3, "guidance_scale": 2.5, "sampler": "dpmpp_2m", "level_spacing": "karras"},
        {"guidance_interval": (0.3, 5.0), "guidance_rescale": 0.7, "prompt_weighting": True},
        {"variation_strength": 0.2, "variation_seed": [3, 4, 5, 6], "height": 32, "width": 64},
        {"image": WHITE, "strength": 0.4},
    ],
)
def test_a_record_asks_for_its_image_again(options: dict[str, Any]) -> None:
    request = Request(["a", "猫"], negative_prompt=["x", "y"], num_images=2, seed=11, **options)
    for i in range(4):
        record = json.loads(json.dumps(request.record(i)))
        given = {name: options[name] for name in ("image",) if name in options}
        again = Request(**record, **given)
        assert again.prompts == (request.prompts[i],)
        assert again.negative_prompts == (request.negative_prompts[i],)
        assert again.seeds == (request.seeds[i],)
        assert again.guidance.scale == request.guidance.scale
        assert again.num_denoising_steps == request.num_denoising_steps
        if "variation_seed" in options:
            assert again.variation_seeds == (request.variation_seeds[i],)
        assert json.dumps(again.record(0)) == json.dumps(request.record(i))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prompt": []}, "prompt is an empty list; give at least a text"),
        ({"prompt": ["a", 3]}, "prompt holds 3; it must be a text or a list of them"),
        ({"negative_prompt": ["a", "b", "c"]}, "negative_prompt lists 3 for 2 prompts"),
        ({"steps": 0}, "steps=0 must be a whole number of at least 1"),
        ({"num_images": 0}, "num_images=0 must be a whole number of at least 1"),
        ({"height": 0}, "height=0 must be a whole number of at least 1"),
        ({"seed": [1]}, "seed lists 1 seeds for 2 images; give one for each"),
        ({"seed": -1}, "seed=-1 must be a whole number from 0 to 2**64 - 1"),
        ({"sampler": "hein"}, "sampler=hein is unknown; did you mean heun?"),
        ({"strength": 0.5}, "strength=0.5 needs an image to start from"),
        ({"strength": 1.5, "image": WHITE}, "strength=1.5 must be a number from 0 to 1"),
        ({"strength": 0.01, "image": WHITE}, "strength=0.01 leaves none of steps=50"),
        ({"mask_image": WHITE}, "mask_image needs an image"),
        ({"image": "cat.png"}, "image holds 'cat.png'; it must be an image or a list of them"),
        ({"variation_strength": 2}, "variation_strength=2 must be a number from 0 to 1"),
        ({"variation_seed": 3}, "variation_seed=3 needs a variation_strength above 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan must be a finite number >= 0"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence_that_names_the_field(
    options: dict[str, Any], sentence: str
) -> None:
    options = {"prompt": ["a", "b"], **options}
    with pytest.raises(ValueError, match=re.escape(sentence)) as raised:
        Request(**options)
    assert str(raised.value).startswith(sentence)
