"""The web UI's parameters line: read there and here as it was meant, and files of its own."""

import json
import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.interchange_table import Measured

from latentdiff.formats.a1111 import (
    SAMPLERS,
    SCHEDULE_TYPES,
    format_parameters,
    parse_parameters,
    pipeline_options,
    without,
)

# AUTOMATIC1111/stable-diffusion-webui, modules/infotext_utils.py, version 1.10.
THEIR_ENTRY = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
PLAIN: dict[str, Any] = {
    "prompt": "a cat",
    "steps": 20,
    "sampler": "dpmpp_2m",
    "level_spacing": "karras",
    "guidance_scale": 7.0,
    "seed": 2**64 - 1,
    "width": 512,
    "height": 768,
    "version": "0.1",
}
THEIRS = """masterpiece, (cat:1.2), <lora:fur:0.8>
second line
Negative prompt: ugly, (blurry)
extra
Steps: 25, Sampler: DPM++ 2M SDE, Schedule type: Karras, CFG scale: 4.5, Seed: 965400086, \
Size: 512x704, Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, Denoising strength: 0.6, \
Clip skip: 2, Lora hashes: "fur: 1a2b3c, ink: 4d5e6f", Version: v1.10.1"""


def their_reading(text: str) -> dict[str, str]:
    """What the web UI understands of a text, written from the rules of its parser."""
    *lines, last = text.strip().split("\n")
    entries = THEIR_ENTRY.findall(last)
    if len(entries) < 3:
        lines, entries = [*lines, last], []
    texts, negative = {"Prompt": "", "Negative prompt": ""}, False
    for line in lines:
        line = line.strip()
        if line.startswith("Negative prompt:"):
            negative, line = True, line[16:].strip()
        field = "Negative prompt" if negative else "Prompt"
        texts[field] += line if texts[field] == "" else "\n" + line
    for key, value in entries:
        if value == "":
            continue  # there an error message
        texts[key] = json.loads(value) if value[0] == value[-1] == '"' else value
    return texts


def words(*, lines: bool = False) -> st.SearchStrategy[str]:
    """Prompts that the format can hold; a whole line may be anything but the format's own."""
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
    return text.filter(
        lambda prompt: (
            (lines or "\n" not in prompt)
            and "Negative prompt:" not in prompt
            and all(line == line.strip() for line in prompt.split("\n"))
            and prompt == prompt.strip()
        )
    )


def test_the_line_is_the_one_that_the_web_ui_writes() -> None:
    text = format_parameters(
        **{**PLAIN, "seed": 1},
        negative_prompt="ugly",
        model="v1-5, pruned",
        model_hash="6ce0161689",
        strength=0.75,
        variation_seed=3,
        variation_strength=0.25,
    )
    assert text == (
        "a cat\nNegative prompt: ugly\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, "
        'Size: 512x768, Model hash: 6ce0161689, Model: "v1-5, pruned", Variation seed: 3, '
        "Variation seed strength: 0.25, Denoising strength: 0.75, RNG: CPU, Version: latentdiff 0.1"
    )


@given(prompt=words(lines=True), negative=words(lines=True), model=st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_the_web_ui_understands_what_we_write_and_so_do_we(
    prompt: str, negative: str, model: str
) -> None:
    """Any prompt in any script, and any file name as the model."""
    text = format_parameters(**{**PLAIN, "prompt": prompt}, negative_prompt=negative, model=model)
    expected = {
        "Prompt": prompt,
        "Negative prompt": negative,
        "Steps": "20",
        "Sampler": "DPM++ 2M",
        "Schedule type": "Karras",
        "CFG scale": "7",
        "Seed": str(2**64 - 1),
        "Size": "512x768",
        "Model": model,
        "RNG": "CPU",
        "Version": "latentdiff 0.1",
    }
    assert parse_parameters(text) == expected
    assert their_reading(text) == expected


@pytest.mark.parametrize("sampler", [*SAMPLERS, "DEISMultistepScheduler"])
@pytest.mark.parametrize("spacing", [None, *SCHEDULE_TYPES])
def test_options_written_are_the_options_read(sampler: str, spacing: str | None) -> None:
    text = format_parameters(
        **{**PLAIN, "sampler": sampler, "level_spacing": spacing},
        strength=0.5,
        variation_seed=7,
        variation_strength=0.1,
    )
    options, left_out = pipeline_options(parse_parameters(text))
    spacing = "exponential" if spacing == "log_snr" else spacing  # one name there for both
    assert options == {
        "prompt": "a cat",
        "negative_prompt": "",
        "steps": 20,
        "sampler": sampler,
        **({} if spacing is None else {"level_spacing": spacing}),
        "guidance_scale": 7.0,
        "seed": 2**64 - 1,
        "width": 512,
        "height": 768,
        "strength": 0.5,
        "variation_seed": 7,
        "variation_strength": 0.1,
    }
    assert left_out == ["RNG: CPU"]


def test_a_image_of_the_web_ui_gives_what_it_can(measured: Measured) -> None:
    parsed = parse_parameters(THEIRS)
    assert parsed == their_reading(THEIRS)
    measured("PNG parameters", "read and written", "A1111's rules", "every setting", 0)
    options, left_out = pipeline_options(parsed)
    assert options == {
        "prompt_weighting": True,  # as always there
        "prompt": "masterpiece, (cat:1.2), \nsecond line",
        "negative_prompt": "ugly, (blurry)\nextra",
        "steps": 25,
        "sampler": "dpmpp_2m_sde",
        "level_spacing": "karras",
        "guidance_scale": 4.5,
        "seed": 965400086,
        "width": 512,
        "height": 704,
        "strength": 0.6,
    }
    assert left_out == [
        "<lora:fur:0.8>",
        "Model: v1-5-pruned-emaonly",
        "Clip skip: 2",
        "Lora hashes: fur: 1a2b3c, ink: 4d5e6f",
    ]


@pytest.mark.parametrize(
    ("sampler", "schedule_type", "expected"),
    [
        ("DPM++ 2M", "Automatic", ("dpmpp_2m", "karras")),
        ("DPM++ 2M SDE", "Automatic", ("dpmpp_2m_sde", "exponential")),
        ("Euler a", "Automatic", ("euler_ancestral", "linspace")),
        ("Euler", "SGM Uniform", ("euler", "trailing")),
        ("DPM++ 2M", None, ("dpmpp_2m", "linspace")),  # up to 1.8 nothing was automatic
        ("DPM++ 2M Karras", None, ("dpmpp_2m", "karras")),
        ("DPM++ 2M SDE Exponential", None, ("dpmpp_2m_sde", "exponential")),
        ("PLMS", "Automatic", ("pndm", None)),
        ("DDIM", None, ("ddim", None)),
    ],
)
def test_a_schedule_type_is_found_wherever_a_version_of_the_web_ui_kept_it(
    sampler: str, schedule_type: str | None, expected: tuple[str, str | None]
) -> None:
    settings = {"Sampler": sampler, "Version": "v1.10.1"}
    if schedule_type is not None:
        settings["Schedule type"] = schedule_type
    options, _ = pipeline_options(settings)
    assert (options["sampler"], options.get("level_spacing")) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"Denoising strength": "0.4", "Hires upscale": "2"},
        {"Denoising strength": "0.7", "First pass size": "0x0"},  # before 2023
        {"Denoising strength": "0"},  # of the API
        {"Variation seed": "5"},  # of no strength
    ],
)
def test_what_had_no_effect_there_is_no_option_here(settings: dict[str, str]) -> None:
    options, left_out = pipeline_options(settings)
    assert options == {"prompt": "", "negative_prompt": ""}
    assert left_out == [f"{key}: {value}" for key, value in settings.items()]


def test_a_schedule_type_without_its_sampler_is_named() -> None:
    """With another sampler given it was dropped without a word."""
    settings = without({"Sampler": "DPM fast", "Schedule type": "Karras"}, {"sampler"})
    assert pipeline_options(settings)[1] == ["Schedule type: Karras"]


def test_every_setting_that_an_option_replaces_is_not_read() -> None:
    """A damaged setting was a dead end: the option in its place did not help."""
    settings = {"Steps": "many", "CFG scale": "7,5", "Size": "big", "Seed": "?", "Sampler": "?"}
    given = {"steps", "guidance_scale", "width", "height", "seed", "sampler"}
    assert without(settings, given) == {}
    assert without(settings, given - {"width"}) == {"Size": "big"}


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("Sampler", "DPM adaptive", "choose one of ddim"),
        ("Sampler", "", "choose one of ddim"),
        ("Steps", "many", "not a whole number"),
        ("Steps", "9" * 5000, "not a whole number"),
        ("CFG scale", "7,5", "not a number"),
        ("Size", "512", "like 512x768"),
        ("Size", "9999999x1", "like 512x768"),
    ],
)
def test_a_setting_that_we_cannot_take_is_named(key: str, value: str, part: str) -> None:
    with pytest.raises(ValueError, match=f"^{key}: .*{part}") as caught:
        pipeline_options({key: value})
    assert len(str(caught.value)) < 250
    with pytest.raises(ValueError, match=r"^Schedule type: 'KL Optimal'"):
        pipeline_options({"Sampler": "Euler", "Schedule type": "KL Optimal"})


def test_lines_of_extensions_after_the_settings_are_no_prompt() -> None:
    """The web UI makes a prompt of all settings then, and we drew that with every default."""
    text = "a cat\nNegative prompt: ugly\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 9\n"
    parsed = parse_parameters(f"{text}Template: a {{cat|dog}}: 2\nNegative Template: ugly")
    assert parsed["Prompt"] == "a cat"
    assert parsed["Negative prompt"] == "ugly"
    options, left_out = pipeline_options(parsed)
    assert (options["steps"], options["seed"]) == (20, 9)
    assert left_out == ["Template: a {cat|dog}: 2", "Negative Template: ugly"]


def test_a_text_without_settings_is_a_prompt() -> None:
    assert parse_parameters("a cat: black, a dog") == {
        "Prompt": "a cat: black, a dog",
        "Negative prompt": "",
    }


@pytest.mark.parametrize("piece", ["a", "a ", 'a: "', 'a: "\\', "a,", "a:", '",', "\\", "\n", ": "])
def test_a_hostile_text_takes_no_longer_than_its_length(piece: str) -> None:
    """The web UI's own expression takes the square of it: minutes for the first of these."""
    start = time.perf_counter()
    pipeline_options(
        {"Steps": "1", **parse_parameters("Steps: 1, " + piece * (300_000 // len(piece)))}
    )
    assert time.perf_counter() - start < 2
