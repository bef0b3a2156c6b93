"""What a sampler is called elsewhere: A1111's, ComfyUI's and other spellings of ours."""

import difflib
import re
from collections.abc import Collection
from typing import Any

from latentdiff.formats.a1111 import OTHER_TYPES, SAMPLERS, SCHEDULE_TYPES
from latentdiff.levels import LevelSpacing

# By their letters and digits alone; they name a family, of which this is the usual one.
GUESSES: dict[str, str] = dict.fromkeys(("dpm", "dpmpp", "dpmsolver", "dpmsolverpp"), "dpmpp_2m")


def our_names(
    name: str, spacing: LevelSpacing | None, known: Collection[str]
) -> tuple[str, LevelSpacing | None]:
    """A1111's or ComfyUI's name of a sampler of `known`, and of its noise levels, as ours.

    "DPM++ 2M Karras" is dpmpp_2m with the level spacing karras. Another name is left as it is.
    Raises ValueError if `spacing` is another than the name says.
    """
    if (found := _found(name, known)) is None:
        return name, spacing
    ours, named = found
    if named is not None and spacing not in (None, named):
        raise ValueError(
            f"sampler={name} is {ours} with level_spacing={named}, and level_spacing={spacing} is "
            "given; leave one of the two out"
        )
    return ours, spacing if named is None else named


def likely_meant(name: str, known: Collection[str]) -> str | None:
    """The sampler of `known` that a name is near to, if any is; no other program has the name."""
    if ours := GUESSES.get(_key(name)):
        return ours
    if near := difflib.get_close_matches(name.lower(), known, n=1):
        return near[0]
    keys = {_key(ours): ours for ours in known}
    return next((keys[one] for one in difflib.get_close_matches(_key(name), keys, n=1)), None)


def _found(name: str, known: Collection[str]) -> tuple[str, LevelSpacing | None] | None:
    samplers = {_key(ours): ours for ours in known}
    samplers |= {_key(theirs): ours for ours, theirs in SAMPLERS.items() if ours in known}
    spacings: dict[str, Any] = {_key(t): ours for ours, t in reversed(SCHEDULE_TYPES.items())}
    spacings |= {_key(theirs): ours for theirs, ours in OTHER_TYPES.items()}
    key = _key(name)
    for suffix in ("", *sorted(spacings, key=len, reverse=True)):
        for start in (key, key.removeprefix("k")):  # k-diffusion's: k_euler_a
            if start.endswith(suffix) and (ours := samplers.get(start.removesuffix(suffix))):
                return ours, spacings[suffix] if suffix else None
    return None


def _key(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower().replace("++", "pp"))
