"""ahead: a step's random numbers and tokens, made while the step before it is computed."""

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch

from latentdiff.data.prefetch import prefetch
from latentdiff.data.resident import pinned, to_device

Loader = Callable[[int], Iterator[dict[str, Any]]]


def ahead(
    loader: Loader,
    prepare: Callable[[dict[str, Any], int], dict[str, Any]],
    device: torch.device,
    *,
    threads: int | None = None,
) -> Loader:
    """A loader of prepared batches on the device.

    `prepare(batch, step)` runs in `threads` threads, which are a few steps ahead of the caller. By
    default it is one for a CUDA device, whose copies the host then does not wait for either, and
    none for a CPU, where it would take the cores that train. The batches are the same.
    """
    if threads is None:
        threads = 1 if device.type == "cuda" else 0

    def work(item: tuple[dict[str, Any], int]) -> dict[str, Any]:
        return {name: pinned(value, device) for name, value in prepare(*item).items()}

    def batches(start: int) -> Iterator[dict[str, Any]]:
        # Opened at once: the data's worker processes should begin before anything else does.
        source = loader(start)
        return placed(prefetch(work, zip(source, count(start), strict=False), threads=threads))

    def placed(done: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for batch in done:
            yield {name: to_device(value, device) for name, value in batch.items()}

    return batches
