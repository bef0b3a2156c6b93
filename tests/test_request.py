"""What a call may ask for: one sentence for what it may not, and a record that asks again."""

import inspect
import json
import re
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff.pipeline import Pipeline
from latentdiff.request import Request

WHITE = Image.new("RGB", (16, 16), "white")


def grey(value: float, dtype: type[np.generic], size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.fromarray(np.full(size[::-1], value, dtype))


def test_the_arguments_of_a_call_are_the_fields_of_a_request_with_their_defaults() -> None:
    call, request = inspect.signature(Pipeline.__call__), inspect.signature(Request)
    _, *arguments, others = call.parameters.values()
    assert others.kind is inspect.Parameter.VAR_KEYWORD
    of_the_model = ("steps", "guidance_scale", "sampler")  # a student has others
    assert all(call.parameters[name].default is None for name in of_the_model)
    of_the_call = ("output_type", "callback_on_step_end", "callback_on_step_end_tensor_inputs")
    arguments = [one for one in arguments if one.name not in of_the_call]
    assert [one.name for one in arguments] == list(request.parameters)
    for one in arguments:
        assert one.name in of_the_model or one == request.parameters[one.name]
    with pytest.raises(TypeError, match="guidance"):
        Request("a cat", guidance=3)  # pyright: ignore[reportCallIssue]


def test_help_has_a_word_on_each_option() -> None:
    """It listed them, and said nothing of what they mean."""
    text = inspect.getdoc(Pipeline.__call__) or ""
    names = [*inspect.signature(Pipeline.__call__).parameters]
    names = [name for name in names if name not in ("self", "prompt", "unknown")]
    assert {one.name for one in fields(Request) if one.init and one.name != "prompt"} <= {*names}
    lists = [line.partition(": ")[0].split(", ") for line in text.split("\n") if ": " in line]
    assert {name for one in lists for name in one} == {*names}


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("eta", "sampler"),
        ("negative_prompt_embeds", "give negative_prompt"),
        ("callback", "give callback_on_step_end"),
        ("cfg_scale", "give guidance_scale"),
        ("negativ_prompt", "give negative_prompt"),
        ("frobnicate", "known are prompt, steps"),
    ],
)
def test_an_option_of_another_program_is_answered_with_ours(name: str, ours: str) -> None:
    """It was "Request.__init__() got an unexpected keyword argument"."""
    pipe: Any = Pipeline.from_pretrained("emoji")
    for draw in (pipe, pipe.stream):
        with pytest.raises(TypeError, match=f"there is no option '{name}'.*{re.escape(ours)}"):
            draw("a cat", **{name: 1})


def test_an_option_of_diffusers_loading_is_answered_with_ours() -> None:
    for load in (Pipeline.from_pretrained, Pipeline.from_single_file):
        from_elsewhere: Any = load
        with pytest.raises(TypeError, match="no option 'device_map'; give device"):
            from_elsewhere("emoji", device_map="auto")


def test_a_weight_that_is_not_read_is_said() -> None:
    with pytest.warns(UserWarning, match=r"prompt: '\(cat:1.3\)' is read as it stands"):
        Request("a (cat:1.3)")
    for prompt, weighting in (("a (cat)", False), ("a cat :)", False), ("a (cat:1.3)", True)):
        Request(prompt, prompt_weighting=weighting)


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
        ({"prompt": None}, "prompt holds None; it must be a text or a list of them"),
        ({"prompt": 3}, "prompt holds 3; it must be a text or a list of them"),
        ({"prompt": ["a", None]}, "prompt holds None; it must be a text"),
        ({"prompt": b"a cat"}, "prompt holds b'a cat'; it must be a text"),
        ({"negative_prompt": None}, "negative_prompt holds None; it must be a text"),
        ({"negative_prompt": ["a", 0.5]}, "negative_prompt holds 0.5; it must be a text"),
        ({"prompt": "caf\udce9"}, "prompt: 'caf\\udce9' is not valid Unicode at character 4"),
        ({"prompt": ["a", "\ud83d"]}, "prompt: '\\ud83d' is not valid Unicode at character 1"),
        ({"negative_prompt": "\udc00"}, "negative_prompt: '\\udc00' is not valid Unicode"),
        ({"negative_prompt": ["a", "b", "c"]}, "negative_prompt lists 3 for 2 prompts"),
        ({"steps": 0}, "steps=0 must be a whole number from 1 to 1,000,000"),
        ({"steps": 2.5}, "steps=2.5 must be a whole number from 1"),
        ({"steps": None}, "steps=None must be a whole number"),
        ({"steps": 10**12}, "steps=1000000000000 must be a whole number from 1 to 1,000,000"),
        ({"steps": 20, "num_inference_steps": 30}, "steps=20 and num_inference_steps=30 are two"),
        ({"num_images": 0}, "num_images=0 must be a whole number from 1 to 100,000"),
        ({"num_images": 60_000}, "num_images=60000 of 2 prompts are more than 100,000 images"),
        ({"height": 0}, "height=0 must be a whole number from 1 to 65,536"),
        ({"width": float("inf")}, "width=inf must be a whole number"),
        ({"seed": [1]}, "seed lists 1 seeds for 2 images; give one for each"),
        ({"seed": -1}, "seed=-1 must be a whole number from 0 to 2**64 - 1"),
        ({"seed": 5.0}, "seed=5.0 must be a whole number from 0 to 2**64 - 1"),
        ({"seed": "5"}, "seed='5' must be a whole number"),
        ({"seed": [1, 2.0]}, "seed=2.0 must be a whole number"),
        ({"seed": torch.tensor(1.0)}, "seed=tensor(1.) must be a whole number"),
        ({"seed": float("nan")}, "seed=nan must be a whole number"),
        ({"sampler": "hein"}, "sampler=hein is unknown; did you mean heun?"),
        ({"strength": 0.5}, "strength=0.5 needs an image to start from"),
        ({"strength": 1.5, "image": WHITE}, "strength=1.5 must be a number from 0 to 1"),
        ({"strength": 0.01, "image": WHITE}, "strength=0.01 leaves none of steps=50"),
        (
            {"strength": 0.333, "steps": 3, "image": WHITE},
            "strength=0.333 leaves none of steps=3: it must be at least 1/3, such as 0.334",
        ),
        ({"strength": "half", "image": WHITE}, "strength='half' must be a number from 0 to 1"),
        ({"image": grey(70_000, np.int32)}, "image: mode I with values from 70000 to 70000; white"),
        ({"image": grey(3, np.float32)}, "image: mode F with values from 3 to 3; white is known"),
        ({"image": grey(float("nan"), np.float32)}, "image: mode F with values from nan to nan"),
        (
            {"image": [WHITE, Image.new("RGB", (32, 16))]},
            "image lists images of 16 x 16 and of 32 x 16, which are drawn in one size; give",
        ),
        (
            {"image": WHITE, "mask_image": Image.new("L", (32, 16), 255)},
            "mask_image has 32 x 16 pixels and its image 16 x 16; give a mask of the image's shape",
        ),
        (
            {"image": WHITE, "mask_image": grey(1, np.uint8)},
            "mask_image is white nowhere, so that nothing would be drawn: its lightest pixel is 1",
        ),
        (
            {"image": WHITE, "mask_image": Image.new("RGBA", (16, 16))},
            "mask_image: a mask with transparent pixels does not say what becomes of them",
        ),
        (
            {"prompt_weighting": True, "negative_prompt": "a (b:-1)"},
            "negative_prompt: the weight '-1' in '(b:-1)' must be a number from 0 to 10",
        ),
        ({"mask_image": WHITE}, "mask_image needs an image"),
        ({"image": "cat.png"}, "image holds 'cat.png'; it must be a PIL image or a list of them"),
        ({"variation_strength": 2}, "variation_strength=2 must be a number from 0 to 1"),
        ({"variation_seed": 3}, "variation_seed=3 needs a variation_strength above 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan must be a finite number >= 0"),
        ({"guidance_scale": None}, "guidance_scale=None must be a number"),
        ({"guidance_scale": "7"}, "guidance_scale='7' must be a number"),
        ({"guidance_momentum": [1]}, "guidance_momentum=[1] must be a number"),
        ({"guidance_interval": 3}, "guidance_interval=3 must be two finite numbers"),
        ({"guidance_interval": ("a", "b")}, "guidance_interval=('a', 'b') must be two finite"),
        ({"sampler": None}, "sampler=None must be a name: ddpm"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence_that_names_the_field(
    options: dict[str, Any], sentence: str
) -> None:
    options = {"prompt": ["a", "b"], **options}
    with pytest.raises(ValueError, match=re.escape(sentence)) as raised:
        Request(**options)
    assert str(raised.value).startswith(sentence)


@pytest.mark.parametrize(
    "seed", [5, np.int64(5), np.uint8(5), torch.tensor(5), [5, 6], np.array([5, 6]), (5, 6)]
)
def test_any_integer_is_a_seed(seed: Any) -> None:
    """NumPy's integers and tensors, which come out of loops and files, were tracebacks."""
    request = Request("a cat", num_images=2, seed=seed)
    assert request.seeds == (5, 6)
    assert all(type(one) is int for one in request.seeds)
    numbers: dict[str, Any] = {"seed": np.int64(3), "steps": np.int64(4), "height": np.int32(8)}
    json.dumps(Request("a", **numbers).record(0))


@pytest.mark.parametrize(
    ("steps", "strength", "taken"),
    [(100, 0.29, 29), (3, 1 / 3, 1), (3, 0.334, 1), (50, 0.8, 40), (50, 0.999, 49), (10, 1.0, 10)],
)
def test_strength_is_the_share_of_the_steps_that_its_digits_say(
    steps: int, strength: float, taken: int
) -> None:
    """100 * 0.29 is 28.999999999999996, of which 28 steps were made."""
    assert Request("a", steps=steps, strength=strength, image=WHITE).num_denoising_steps == taken


def test_images_are_upright_and_their_greys_are_read_as_in_training() -> None:
    """A phone's photo was stretched into its sideways size, and floats were clipped to white."""
    sideways = Image.new("RGB", (32, 16), "red")
    sideways.getexif()[0x0112] = 6  # turn 90 degrees clockwise
    greys = (grey(0.5, np.float32), grey(128 * 257, np.uint16), grey(128, np.uint8))
    request = Request(["a"] * 4, image=(sideways, *greys), height=16, width=16)
    assert request.images[0].size == (16, 32)
    assert {image.getpixel((3, 3)) for image in request.images[1:]} == {(128, 128, 128)}


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ((16, 16), (16, 16)),
        ((512, 384), (4000, 3000)),
        ((500, 375), (4001, 3000)),
        ((9, 9), (3, 3)),
    ],
)
def test_a_mask_has_the_shape_of_its_image_in_any_size(
    image: tuple[int, int], mask: tuple[int, int]
) -> None:
    Request("a", image=Image.new("RGB", image), mask_image=Image.new("L", mask, 255))


def test_a_mask_is_read_as_a_viewer_shows_it() -> None:
    """One of 16 bits was white all over, and one that lies sideways kept and drew other places."""

    def read(mask: Image.Image) -> Image.Image:
        return Request("a", image=WHITE, mask_image=mask).masks[0]

    left = np.zeros((16, 16), np.uint16)
    left[:, :8] = 65_535
    mask = Image.fromarray((left // 257).astype(np.uint8))
    assert read(Image.fromarray(left)) == mask
    with pytest.raises(ValueError, match="white nowhere"):
        read(grey(0, np.uint16))
    assert read(Image.merge("LA", [mask, Image.new("L", (16, 16), 255)])) == mask
    mask.getexif()[0x0112] = 6
    turned = read(mask)
    assert (turned.getpixel((15, 0)), turned.getpixel((0, 15))) == (255, 0)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"negative_prompt": "green"}, "negative_prompt"),
        ({"guidance_rescale": 0.7}, "guidance_rescale"),
        ({"guidance_interval": [0.1, 1], "guidance_eta": 0.0}, "guidance_interval, guidance_eta"),
    ],
)
def test_what_does_nothing_without_guidance_is_said(options: dict[str, Any], names: str) -> None:
    """A negative prompt did nothing at guidance_scale=1, which few-step models want, unsaid."""
    with pytest.warns(UserWarning, match=f"^{names}: without effect, since guidance_scale=1"):
        Request("a", guidance_scale=1.0, **options)
    Request("a", guidance_scale=1.0)
