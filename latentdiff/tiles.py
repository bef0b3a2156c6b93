"""Batches of images on the CPU that give each image the bits that it has when it is drawn alone.

A matrix product may add up in another order in a batch of another size, and fifty steps of guidance
make that visible. Which products do depends on the precision, the shapes, the library and the
processor (docs/decisions/0003), so it is not assumed but seen, at the first evaluation of each run.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from latentdiff.guidance import Evaluate

TILE = 8
"""Images that are evaluated at once, at most: more need more memory and are hardly faster."""


def tiles(rows: Sequence[int]) -> list[tuple[int, ...]]:
    """The rows of a batch in groups of at most `TILE`."""
    return [tuple(rows[i : i + TILE]) for i in range(0, len(rows), TILE)]


def likely_exact(dtype: torch.dtype, guidance_scale: float) -> bool:
    """Whether tiles will be exact, as far as is known before a run.

    They are but for one image without guidance in float32, which oneDNN convolves by another
    algorithm than several (docs/decisions/0003).
    """
    return dtype != torch.float32 or guidance_scale != 1


def exact(make: Callable[[tuple[int, ...]], Evaluate], rows: tuple[int, ...]) -> Evaluate:
    """An evaluation of these images at once, or one by one where that would change a bit of them.

    `make` gives the evaluation of any rows; its output has one or both halves of guidance, rows by
    rows. At the first call the first image and the last, where a kernel treats what is left over,
    are evaluated alone as well. The order of a sum depends on shapes, not on numbers, and another
    order shows: an evaluation has millions of sums.
    """
    together = make(rows)
    alone = [make((row,)) for row in rows]
    chosen: Evaluate | None = together if len(rows) == 1 else None

    def one_by_one(x: Tensor, timestep: Tensor) -> Tensor:
        images = zip(alone, x.split(1), strict=True)
        outputs = [evaluate_one(image, timestep) for evaluate_one, image in images]
        return torch.stack(outputs, dim=1).flatten(0, 1)

    def evaluate(x: Tensor, timestep: Tensor) -> Tensor:
        nonlocal chosen
        if chosen is not None:
            return chosen(x, timestep)
        output = together(x, timestep)
        halves = output.unflatten(0, (-1, len(rows)))
        ends = ((0, x[:1]), (-1, x[-1:]))
        same = all(alone[i](image, timestep).equal(halves[:, i]) for i, image in ends)
        chosen = together if same else one_by_one
        return output if same else one_by_one(x, timestep)

    return evaluate
