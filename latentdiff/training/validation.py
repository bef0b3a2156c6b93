"""Held-out loss: how well the averaged network does on examples that are never trained on.

It is given for equal bins of t, since a loss means little across them: a network that learns only
what is easy, at high noise, has a falling mean. Examples, noise and t are the same each time, so
that two values differ by the weights alone.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from latentdiff.diffusion import Diffusion
from latentdiff.training.meter import Metrics
from latentdiff.training.processes import Processes
from latentdiff.training.randomness import generator

BINS = 8
"""Of t, from little noise to much."""
MOST = 256
"""Examples held out, however many there are: scoring takes BINS forward passes of each."""


def held_out(num_samples: int, share: float, *, seed: int) -> np.ndarray:
    """(n,) numbers of the examples to hold out, ascending; none if the share is less than one.

    Which they are is a function of the numbers of examples and the seed.
    """
    count = min(int(share * num_samples), MOST)
    if count == 0:
        return np.empty(0, dtype=np.int64)
    draws = torch.rand(num_samples, generator=generator(seed, 0, "held out"), dtype=torch.float64)
    return draws.topk(count, largest=False).indices.sort().values.numpy()


class Rest(Dataset[Any]):
    """A data set without some examples, the others in their order; an index may be (number, …)."""

    def __init__(self, dataset: Any, left_out: np.ndarray) -> None:
        self.dataset = dataset
        # How many are left out before a place does not need a list as long as the data.
        self._before = left_out - np.arange(len(left_out))
        self._length = len(dataset) - len(left_out)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int | tuple[int, Any]) -> Any:
        if isinstance(index, tuple):
            return self.dataset[self.number(index[0]), *index[1:]]
        return self.dataset[self.number(index)]

    def number(self, place: int) -> int:
        """The number that an example has in the whole data set."""
        return int(place + np.searchsorted(self._before, place, side="right"))


def stratified_t(diffusion: Diffusion, count: int, *, seed: int) -> Tensor:
    """(count, BINS): a time in each bin for each example, evenly spread over the bin by them all.

    As `Objective.sample_t` gives them: real numbers for `flow`, else whole ones.
    """
    draw = generator(seed, 0, "held out t")
    places = torch.stack([torch.randperm(count, generator=draw) for _ in range(BINS)], dim=1)
    t = (torch.arange(BINS) + (places + 0.5) / count) / BINS * diffusion.num_timesteps
    return t if diffusion.schedule == "flow" else t.ceil().long()


def held_out_loss(
    score: Callable[[Sequence[int]], Tensor],
    buckets: Sequence[int],
    *,
    batch_size: int,
    processes: Processes,
) -> Metrics:
    """`held_out_loss`, the mean, and `held_out_loss_0` … of the bins, by all processes together.

    `score(places)` gives the losses, (len(places), BINS), of up to `batch_size` of the held-out
    examples, all of one of `buckets`, which has each example's. Every process must call it.
    """
    own = sorted(range(len(buckets)), key=lambda place: buckets[place])
    own = own[processes.rank :: processes.count]

    def losses() -> dict[int, list[float]]:
        found: dict[int, list[float]] = {}
        for places in _batches(own, buckets, batch_size):
            found |= zip(places, score(places).double().tolist(), strict=True)
        return found

    found = {}
    for part in processes.gather(processes.everywhere(losses)):
        found |= part
    # In the order of examples: a sum does not depend on who gave what.
    means = torch.tensor([found[place] for place in sorted(found)], dtype=torch.float64).mean(dim=0)
    names = {f"held_out_loss_{number}": mean for number, mean in enumerate(means)}
    return {"held_out_loss": means.mean(), **names}


def _batches(
    places: Sequence[int], buckets: Sequence[int], batch_size: int
) -> Iterator[Sequence[int]]:
    for _, group in groupby(places, key=lambda place: buckets[place]):
        same = list(group)
        for start in range(0, len(same), batch_size):
            yield same[start : start + batch_size]
