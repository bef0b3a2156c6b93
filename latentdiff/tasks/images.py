"""The batches of the scripts that train on images: read from disk, or held in memory."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from latentdiff.data.config import DataConfig
from latentdiff.data.dataset import CaptionedImages
from latentdiff.data.opening import ImageDataset
from latentdiff.data.resident import ResidentImages
from latentdiff.training.accelerator import ComputeConfig
from latentdiff.training.run import Run
from latentdiff.training.validation import Subset


def check_in_memory(compute: ComputeConfig, data: DataConfig) -> None:
    """Raise ValueError for a stream, whose images have no numbers by which they could be held."""
    if compute.in_memory and data.stream:
        raise ValueError(
            "in_memory=True must be False with stream=True: a stream is read in order, without an "
            "index of its images; leave out one of them"
        )


def hold_in_memory(dataset: ImageDataset, run: Run) -> ResidentImages:
    """Every image of the data set on the run's device; says what memory they take."""
    assert isinstance(dataset, CaptionedImages), "check_in_memory refuses a stream"
    resident = ResidentImages(dataset, run.device)
    run.accelerator.print(f"in memory: {resident.summary()}")
    return resident


def image_batches(
    start: int,
    *,
    dataset: ImageDataset,
    resident: ResidentImages | None,
    run: Run,
    val: np.ndarray | None = None,
) -> Iterator[dict[str, Any]]:
    """This process's batches from step `start` on; `val` (n,) are indices that are left out."""
    loop, processes = run.config.loop, run.processes
    options: dict[str, Any] = {
        "batch_size": loop.batch_size,
        "seed": loop.seed,
        "stop": loop.max_steps,
        "rank": processes.rank,
        "world_size": processes.count,
    }
    if resident is None:
        examples = None if val is None else Subset(dataset, val)
        return dataset.batches(start, examples=examples, **options)
    examples = None if val is None else np.delete(np.arange(len(resident.images)), val)
    return resident.batches(start, examples=examples, **options)
