"""What a real training run of some steps takes in memory: run as a script, this prints it.

The peak of the process is Linux's own count (VmHWM), from which what it had before is taken: the
same kind of network, tiny, has then been trained, so that libraries and kernels are loaded.
With RANK and the like in the environment it is one of several processes.
"""

import ctypes
import gc
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from latentdiff.planning.footprint import autocast
from latentdiff.planning.workload import make_workload
from latentdiff.training.randomness import MicroBatch
from support.runs import make_learner

OF_THE_LEARNER = ("gradient_checkpointing", "ema_lengths", "sharding")


def train(settings: Mapping[str, Any], accelerator: Accelerator, *, steps: int) -> None:
    """The steps of a Learner on numbers that are made up."""
    workload = make_workload(
        settings, processes=accelerator.num_processes, precision=settings["mixed_precision"]
    )
    options = {key: settings[key] for key in OF_THE_LEARNER if key in settings}
    learner = make_learner(workload.model(), accelerator, **options)
    frozen = [autocast(one, settings["mixed_precision"]) for one in workload.frozen()]
    per_process = settings.get("gradient_accumulation_steps", 1)
    count = accelerator.num_processes * per_process
    for _ in range(steps):
        for number in range(per_process):
            loss = workload.loss(learner.forward_model, frozen, settings["batch_size"] // count)
            index = accelerator.process_index * per_process + number
            learner.update(loss, MicroBatch(index, count))
            del loss


def status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{name}:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1]) * 1024


def measure(settings: Mapping[str, Any], tiny: Mapping[str, Any]) -> int:
    """Bytes above what the process has before; `tiny` settings warm the libraries up."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, mixed_precision=settings["mixed_precision"])
    train(tiny, accelerator, steps=2)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free is not counted as had before
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    train(settings, accelerator, steps=settings.get("steps", 4))
    peak = status("VmHWM")
    accelerator.end_training()
    return peak - before


if __name__ == "__main__":
    print(measure(*map(json.loads, sys.argv[1:3])))
