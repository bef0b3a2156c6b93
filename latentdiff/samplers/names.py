"""What a sampler is called elsewhere: A1111's, ComfyUI's and other spellings of ours."""

import difflib
import re
from collections.abc import Collection

from latentdiff.formats.a1111 import OTHER_TYPES, SAMPLERS, SCHEDULE_TYPES

# By their letters and digits alone. ComfyUI's own names are ours, but for uni_pc and the schedules.
ELSEWHERE = {"dpmpp": "dpmpp_2m", "dpmsolverpp": "dpmpp_2m", "dpmsolver": "dpmpp_2m"}


def likely_meant(name: str, known: Collection[str]) -> str:
    """The sampler of `known` that a name stands for elsewhere, or else the nearest, in words.

    "DPM++ 2M Karras" is "dpmpp_2m with level_spacing=karras".
    """
    samplers = {_key(ours): ours for ours in known} | ELSEWHERE
    samplers |= {_key(theirs): ours for ours, theirs in SAMPLERS.items() if ours in known}
    spacings = {_key(theirs): ours for ours, theirs in reversed(SCHEDULE_TYPES.items())}
    spacings |= {_key(theirs): ours for theirs, ours in OTHER_TYPES.items()}
    key = _key(name)
    for suffix in ("", *sorted(spacings, key=len, reverse=True)):
        for start in (key, key.removeprefix("k")):  # k-diffusion's: k_euler_a
            if start.endswith(suffix) and (ours := samplers.get(start.removesuffix(suffix))):
                return ours + (f" with level_spacing={spacings[suffix]}" if suffix else "")
    return difflib.get_close_matches(name.lower(), known, n=1, cutoff=0)[0]


def _key(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower().replace("++", "pp"))
