"""Shares of a global batch: every row once, in the order of processes and parts."""

import pytest
import torch

from latentdiff.training.randomness import Share, parts


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (1, 4), (2, 2), (4, 3)])
def test_shares_make_up_the_global_batch_in_order(processes: int, accumulation: int) -> None:
    whole = torch.arange(24)
    count = processes * accumulation
    joined = torch.cat([Share(index, count).rows(whole) for index in range(count)])
    assert torch.equal(joined, whole)
    for rank in range(processes):
        batch = {"x": Share(rank, processes).rows(whole), "words": list(range(24 // processes))}
        cut = list(parts(iter([batch]), accumulation))
        for part, found in enumerate(cut):
            share = Share(rank * accumulation + part, count)
            assert torch.equal(found["x"], share.rows(whole))
        assert [word for found in cut for word in found["words"]] == batch["words"]
