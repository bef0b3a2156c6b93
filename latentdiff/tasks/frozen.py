"""The frozen networks of a training: which folder holds the VAE, and which the text encoder."""

from collections.abc import Callable
from pathlib import Path

from latentdiff.formats.diffusers import find_component

EMBEDDED, ITS_DATA = "emoji", "shapes"


def frozen_component(
    component: str, given: str | None, *, data: str | None, say: Callable[[str], object]
) -> Path:
    """The folder of `vae` or `text_encoder`, which is the embedded model's for the shapes alone.

    That is told by `say`. `data` is None where nobody knows it. Raises ValueError where data of
    one's own would be trained on without naming the component, which nobody can mean: another
    VAE's or text encoder's training would be wasted, and the model would not fit it.
    """
    if given is None and data != ITS_DATA:
        whose = "the cache is older and does not tell its data" if data is None else f"data={data}"
        raise ValueError(
            f"{component} must be given: {whose}, and the embedded model's is taken by itself for "
            f"data={ITS_DATA} alone; name its folder, or --{component} {EMBEDDED} where it is meant"
        )
    if given is None:
        say(f"chosen: --{component} {EMBEDDED}, the embedded model's")
    return find_component(EMBEDDED if given is None else given, component)
