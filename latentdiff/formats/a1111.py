"""The `parameters` line of AUTOMATIC1111's web UI: how an image was drawn, as people share it.

The rules are those of its modules/processing.py (create_infotext), infotext_utils.py and
sd_samplers.py, version 1.10. A prompt that has a line "Negative prompt: ...", or whose last line
looks like settings, is misread by the web UI and by us: the format has no escape for it.
"""

import json
import re
from collections.abc import Container, Mapping
from typing import Any

# Ours -> the name in the web UI; DDPM is that of its descendant Forge.
SAMPLERS = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "lcm": "LCM",
    "lms": "LMS",
    "pndm": "PLMS",
    "unipc": "UniPC",
}
# Ours -> the schedule type in the web UI that takes the same timesteps.
SCHEDULE_TYPES = {
    "leading": "DDIM",
    "trailing": "Simple",
    "linspace": "Uniform",
    "karras": "Karras",
    "exponential": "Exponential",
    "log_snr": "Exponential",
}
# Other schedule types that take the same timesteps, up to rounding.
OTHER_TYPES = {"Normal": "linspace", "SGM Uniform": "trailing", "Polyexponential": "exponential"}
# What "Automatic" is for the samplers that the web UI draws with k-diffusion; for the others, and
# in files older than the schedule types, there is no choice to name.
AUTOMATIC = {"dpmpp_2m": "karras", "dpmpp_sde": "karras", "dpmpp_2m_sde": "exponential"}
UNIFORM = ("euler", "euler_ancestral", "heun", "lms", *AUTOMATIC)

# A value is quoted as in JSON if the line would break at one of its characters.
BREAKS = re.compile(r'[,:"\n]|^\s|\s$|^$')
ENTRY = re.compile(r'\s*([^,:"]+):\s*(?:("(?:[^"\\]|\\.)*")\s*|([^,]*))(?:,|$)')
EXTRA_NETWORK = re.compile(r"<\w+:[^>]+>")  # such as <lora:ink:0.8>
NEGATIVE = "Negative prompt:"
SETTINGS = "Steps: "  # how their line begins
FEWEST_ENTRIES = 3  # fewer in the last line, and it is a prompt
QUIET = ("Prompt", "Negative prompt", "Model hash", "Version", "User")
# A setting's option, and what kind of number it is.
NUMBERS: dict[str, tuple[str, type[int] | type[float]]] = {
    "Steps": ("steps", int),
    "CFG scale": ("guidance_scale", float),
    "Seed": ("seed", int),
    "Variation seed": ("variation_seed", int),
    "Variation seed strength": ("variation_strength", float),
    "Denoising strength": ("strength", float),
}


def format_parameters(
    *,
    prompt: str,
    negative_prompt: str = "",
    steps: int,
    sampler: str,
    level_spacing: str | None,
    guidance_scale: float,
    seed: int,
    width: int,
    height: int,
    version: str,
    model: str | None = None,
    model_hash: str | None = None,
    strength: float | None = None,
    variation_seed: int | None = None,
    variation_strength: float = 0.0,
) -> str:
    """The text of one image: its prompts, and a line of settings.

    `level_spacing` is the one that was used; None leaves it out. `model_hash` is the first ten
    digits of the SHA-256 of the weights, `version` ours. `RNG: CPU` is there because the web UI
    draws the same noise for the same seed with that setting, and on a GPU another by default.
    """
    varied = variation_seed is not None and variation_strength > 0
    settings = {
        "Steps": steps,
        "Sampler": SAMPLERS.get(sampler, sampler),
        "Schedule type": None if level_spacing is None else SCHEDULE_TYPES[level_spacing],
        "CFG scale": guidance_scale,
        "Seed": seed,
        "Size": f"{width}x{height}",
        "Model hash": model_hash,
        "Model": model,
        "Variation seed": variation_seed if varied else None,
        "Variation seed strength": variation_strength if varied else None,
        "Denoising strength": strength,
        "RNG": "CPU",
        "Version": f"latentdiff {version}",
    }
    line = ", ".join(f"{key}: {_quote(v)}" for key, v in settings.items() if v is not None)
    negative = f"\n{NEGATIVE} {negative_prompt}" if negative_prompt else ""
    return f"{prompt}{negative}\n{line}".strip()


def parse_parameters(text: str) -> dict[str, str]:
    """Parse such a text: settings by their names in the web UI, "Prompt" and "Negative prompt" too.

    As in the web UI, spaces at both ends of a line are lost, and a last line of fewer than three
    settings belongs to the prompt. Unlike there, lines of extensions may follow the settings, such
    as "Template: ...", each of which is a setting; there they make all settings a prompt. Takes
    time linear in the text.
    """
    lines, settings = _split(text.strip().split("\n"))
    prompts: list[list[str]] = [[], []]
    negative = False
    for line in map(str.strip, lines):
        if line.startswith(NEGATIVE):
            negative, line = True, line.removeprefix(NEGATIVE).strip()
        if line or prompts[negative]:  # as there, empty lines before the first are lost
            prompts[negative].append(line)
    return {
        **settings,
        "Prompt": "\n".join(prompts[False]),
        "Negative prompt": "\n".join(prompts[True]),
    }


def _split(lines: list[str]) -> tuple[list[str], dict[str, str]]:
    """The lines of the prompts, and the settings of the last line that has some."""
    for i in reversed(range(len(lines))):
        if i == len(lines) - 1 or lines[i].startswith(SETTINGS):
            settings = _entries(lines[i])
            if len(settings) >= FEWEST_ENTRIES:
                further = (line.partition(":") for line in lines[i + 1 :] if line.strip())
                return lines[:i], settings | {
                    key.strip(): value.strip() for key, _, value in further
                }
    return lines, {}


def pipeline_options(settings: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Translate parsed settings into options of `pipe(...)`; returns also those without an option.

    A setting that is absent gives no option, and the caller chooses the model. In a prompt that we
    did not write, brackets weight words, as always in the web UI, and a `<lora:…>` is left out.
    A denoising strength is that of image-to-image, unless there was a second pass ("hires fix") or
    it is 0, which the web UI's API writes for text-to-image. A variation seed needs its strength.
    Raises ValueError, naming setting and value, for an invalid number and for a sampler or schedule
    type that we do not have; see `without` to choose another.
    """
    texts = [settings.get("Prompt", ""), settings.get("Negative prompt", "")]
    networks: list[str] = []
    options: dict[str, Any] = {}
    if not is_ours(settings):
        networks = [tag for text in texts for tag in EXTRA_NETWORK.findall(text)]
        texts = [EXTRA_NETWORK.sub("", text).strip() for text in texts]
        if re.search(r"[()\[\]\\]", "".join(texts)):
            options["prompt_weighting"] = True
    options["prompt"], options["negative_prompt"] = texts
    numbers = {key: NUMBERS[key] for key in NUMBERS if key in settings}
    for key, (option, kind) in numbers.items():
        options[option] = _number(key, settings[key], kind)
    second_pass = any(key.startswith(("Hires ", "First pass ")) for key in settings)
    without_effect = ["Denoising strength"] if second_pass or not options.get("strength") else []
    if not options.get("variation_strength"):
        without_effect.append("Variation seed")
    for key in without_effect:
        numbers.pop(key, None)
        options.pop(NUMBERS[key][0], None)
    if "Size" in settings:
        options["width"], options["height"] = _size(settings["Size"])
    if "Sampler" in settings:
        options["sampler"], spacing = _sampler_and_spacing(settings)
        if spacing is not None:
            options["level_spacing"] = spacing
    used = {*numbers, "Size", *QUIET}
    if "Sampler" in settings:  # a schedule type alone has no meaning: it goes with a sampler
        used |= {"Sampler", "Schedule type"}
    rest = [f"{key}: {value}" for key, value in settings.items() if key not in used]
    return options, networks + rest


def without(settings: Mapping[str, str], given: Container[str]) -> dict[str, str]:
    """The settings without those whose options are given."""
    options = {key: (option,) for key, (option, _) in NUMBERS.items()}
    options |= {
        "Sampler": ("sampler",),
        "Schedule type": ("level_spacing",),
        "Size": ("width", "height"),
    }
    replaced = {key for key, names in options.items() if all(name in given for name in names)}
    return {key: value for key, value in settings.items() if key not in replaced}


def is_ours(settings: Mapping[str, str]) -> bool:
    """Whether we wrote them, and not the web UI or one of its kin."""
    return settings.get("Version", "").startswith("latentdiff")


def _quote(value: float | str) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if BREAKS.search(text) else text


def _entries(line: str) -> dict[str, str]:
    entries, position = {}, 0
    while position < len(line):
        match = ENTRY.match(line, position)
        if match is None:
            position = line.find(",", position) + 1 or len(line)
            continue
        key, quoted, plain = match.groups()
        entries[key.strip()] = plain if quoted is None else _unquote(quoted)
        position = match.end()
    return entries


def _unquote(quoted: str) -> str:
    try:
        return json.loads(quoted)
    except ValueError:  # an escape that JSON does not have: as there, the text as it stands
        return quoted


def _number(key: str, value: str, kind: type[int] | type[float]) -> float:
    try:
        return kind(value)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{key}: {value[:40]!r} in the parameters is not {what}") from None


def _size(value: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", value.strip())
    if match is None:
        raise ValueError(f"Size: {value[:40]!r} in the parameters is not like 512x768")
    return int(match[1]), int(match[2])


def _sampler_and_spacing(settings: Mapping[str, str]) -> tuple[str, str | None]:
    """Our sampler and level spacing; before 1.9 one name meant both: "DPM++ 2M Karras"."""
    spacings = {name.lower(): ours for ours, name in reversed(SCHEDULE_TYPES.items())}
    spacings |= {name.lower(): ours for name, ours in OTHER_TYPES.items()}
    samplers = {name.lower(): ours for ours, name in SAMPLERS.items()}
    given = settings["Sampler"].strip()
    name, schedule_type = given.lower(), settings.get("Schedule type", "").strip().lower()
    for suffix in spacings:
        if name.endswith(f" {suffix}"):
            name, schedule_type = name.removesuffix(f" {suffix}"), suffix
    sampler = given if given.endswith("Scheduler") else samplers.get(name)  # diffusers' own names
    if sampler is None:
        raise ValueError(
            f"Sampler: {given[:40]!r} in the parameters is none of ours; "
            f"choose one of {', '.join(SAMPLERS)}"
        )
    if schedule_type in ("", "automatic"):
        if is_ours(settings) or sampler not in UNIFORM:
            return sampler, None
        return sampler, AUTOMATIC.get(sampler, "linspace") if schedule_type else "linspace"
    if schedule_type not in spacings:
        raise ValueError(
            f"Schedule type: {settings['Schedule type'][:40]!r} in the parameters is none of ours; "
            f"choose a level_spacing of {', '.join(SCHEDULE_TYPES)}"
        )
    return sampler, spacings[schedule_type]
