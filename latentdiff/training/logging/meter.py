"""Meter: metrics and throughput between two records of the log."""

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
    """Averages metrics over steps and processes from one record to the next, and measures time.

    A record has `step`, each metric's mean over the steps whose gradient was finite, `skipped`
    (the number of the other steps), `learning_rate`, `samples_per_second`, `data_wait` (the
    fraction of the time in which this process waited for data) and `memory` (this process's peak in
    bytes: of the GPU, or else of host memory).
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
        self.start = step
        self.sums: Metrics = {}
        self.counts = Counter[str]()
        self.waited = 0.0
        self.clock = time.perf_counter()

    def add(self, metrics: Metrics) -> None:
        """Add a step's metrics. Sums stay on the device, for which the host would else wait."""
        skipped = torch.stack([learner.skipped for learner in self.learners.values()]).amax()
        for name, value in metrics.items():
            summand = torch.where(skipped > 0, 0.0, value)
            self.sums[name] = self.sums.get(name, 0) + summand
            self.counts[name] += 1
        self.sums["skipped"] = self.sums.get("skipped", 0) + skipped

    def read(self, done: int) -> dict[str, float] | None:
        """The record of the steps since the last one; every process must call it.

        It is None if all of them were skipped; the next record then covers these steps as well.
        """
        sums = self.accelerator.reduce(self.sums, "mean")
        assert isinstance(sums, dict)
        skipped = round(float(sums.pop("skipped")))
        steps = done - self.start
        if skipped == steps:
            return None
        record: dict[str, float] = {"step": done}
        # Some metrics begin in the middle of a run, such as those of a discriminator.
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
        """Count the time in this context as waiting for data."""
        before = time.perf_counter()
        yield
        self.waited += time.perf_counter() - before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time in this context out of the throughput."""
        before = time.perf_counter()
        yield
        self.clock += time.perf_counter() - before


def peak_memory(device: torch.device) -> int:
    """The peak memory of this process in bytes: on its GPU, or else resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kilobytes on Linux
