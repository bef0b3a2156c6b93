"""Micro-batches of a global batch: every row once, in the order of processes."""

import pytest
import torch

from latentdiff.training.randomness import MicroBatch, micro_batches


@pytest.mark.parametrize(("processes", "steps"), [(1, 1), (1, 4), (2, 2), (4, 3)])
def test_micro_batches_make_up_the_global_batch_in_order(processes: int, steps: int) -> None:
    full = torch.arange(24)
    count = processes * steps
    concatenated = torch.cat([MicroBatch(index, count).rows(full) for index in range(count)])
    assert torch.equal(concatenated, full)
    for rank in range(processes):
        batch = {
            "x": MicroBatch(rank, processes).rows(full),
            "words": list(range(24 // processes)),
        }
        slices = micro_batches(batch, steps)
        for number, found in enumerate(slices):
            micro_batch = MicroBatch(rank * steps + number, count)
            assert torch.equal(found["x"], micro_batch.rows(full))
        assert [word for found in slices for word in found["words"]] == batch["words"]
