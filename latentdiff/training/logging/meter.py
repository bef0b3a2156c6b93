"""Meter: what a run measures of itself between two records of its log."""

import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor

from latentdiff.training.learner import Learner

Metrics = dict[str, Tensor]


class Meter:
    """Means of metrics from one log to the next, of all processes, and where the time went.

    A record has `step`, each metric's mean over the steps whose gradient was finite, `skipped`
    (the number of the others), `learning_rate`, `samples_per_second`, `data_wait` (the share of
    the time in which this process waited for data) and `memory` (this process's peak, in bytes, of
    the accelerator if there is one).
    """

    def __init__(
        self,
        accelerator: Accelerator,
        learners: Mapping[str, Learner],
        start: int,
        *,
        batch_size: int,
    ) -> None:
        self.accelerator = accelerator
        self.learners = learners
        self.batch_size = batch_size
        self._begin(start)

    def _begin(self, step: int) -> None:
        self.since = step
        self.sums: Metrics = {}
        self.counts = Counter[str]()
        self.waited = 0.0
        self.clock = time.perf_counter()

    def add(self, metrics: Metrics) -> None:
        """Count one step. Sums stay on the device: reading one would wait for it in every step."""
        skipped = torch.stack([learner.skipped for learner in self.learners.values()]).amax()
        for name, value in metrics.items():
            kept = torch.where(skipped > 0, 0.0, value)
            self.sums[name] = self.sums.get(name, 0) + kept
            self.counts[name] += 1
        self.sums["skipped"] = self.sums.get("skipped", 0) + skipped

    def read(self, done: int) -> dict[str, float] | None:
        """The record of the steps since the last; None, and later one of more, if all were bad.

        Every process must call it.
        """
        sums = self.accelerator.reduce(self.sums, "mean")
        assert isinstance(sums, dict)
        skipped = round(float(sums.pop("skipped")))
        steps = done - self.since
        if skipped == steps:
            return None
        record: dict[str, float] = {"step": done}
        # Some metrics begin amid a run, such as those of a discriminator.
        counts = {name: max(1, self.counts[name] - skipped) for name in sums}
        record |= {name: float(value) / counts[name] for name, value in sums.items()}
        learner = next(iter(self.learners.values()))
        record["learning_rate"] = learner.learning_rate
        seconds = time.perf_counter() - self.clock
        record["samples_per_second"] = self.batch_size * steps / seconds
        record["data_wait"] = self.waited / seconds
        record["memory"] = peak_memory(self.accelerator.device)
        record["skipped"] = skipped
        self._begin(done)
        return record

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in which training waits for data."""
        before = time.perf_counter()
        yield
        self.waited += time.perf_counter() - before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not training's."""
        before = time.perf_counter()
        yield
        self.clock += time.perf_counter() - before


def peak_memory(device: torch.device) -> int:
    """The most memory, in bytes, that this process has had: on the GPU, or else in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kilobytes on Linux
