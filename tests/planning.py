"""What a real training run of some steps takes in memory; `python planning.py` prints it.

The peak of the process is Linux's own count (VmHWM), from which what it had before is taken: the
same kind of network, tiny, has then been trained, so that libraries and kernels are loaded.
"""

import copy
import ctypes
import gc
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.training.footprint import Work, autocast, nbytes


def train(work: Work, batch: int, *, steps: int, precision: str, accumulation: int = 1) -> None:
    """The steps of a Learner: AdamW, clipping and an average, on numbers that are made up."""
    model, frozen = work.model(), work.frozen()
    average = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    called = autocast(model, precision)
    beside = [autocast(network, precision) for network in frozen]
    for _ in range(steps):
        for _ in range(accumulation):
            (work.loss(called, beside, batch) / accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        pairs: list[list[Tensor]] = [[p.data for p in m.parameters()] for m in (average, model)]
        torch._foreach_lerp_(pairs[0], pairs[1], 0.1)
    assert nbytes(average) == nbytes(model)


def status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{name}:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1]) * 1024


def measure(settings: Mapping[str, Any], tiny: Mapping[str, Any]) -> int:
    """Bytes above what the process has before; `tiny` settings warm the libraries up."""
    from latentdiff.training.plan import work_of

    torch.set_num_threads(1)
    precision = settings["mixed_precision"]
    train(work_of(tiny)[1], 2, steps=2, precision=precision)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free is not counted as had before
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    train(work_of(settings)[1], settings["batch_size"], steps=4, precision=precision)
    return status("VmHWM") - before


if __name__ == "__main__":
    print(measure(*map(json.loads, sys.argv[1:3])))
