"""The order in which a stream is trained on: shuffled shards, then a shuffle buffer."""

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def shuffled_epoch(
    samples: Callable[[Sequence[int], Callable[[], bool]], Iterator[T]],
    num_shards: int,
    *,
    buffer_size: int,
    seed: int,
    epoch: int,
    skip: int = 0,
) -> Generator[T, None, int]:
    """Yield the samples of a shuffled epoch after the first `skip`; return the epoch's length.

    `samples(shards, images)` yields the samples of the shards with these indices, in this order,
    and calls `images` to learn whether the next sample's image must be read. Each sample takes the
    place of one that is drawn from a buffer of `buffer_size` samples.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_shards).tolist()
    rng = np.random.default_rng([seed, epoch, 1])
    buffer, position = list[T](), 0

    def wanted() -> bool:
        return position >= skip

    for sample in samples(order, wanted):
        if len(buffer) < buffer_size:
            buffer.append(sample)
            continue
        slot = int(rng.integers(buffer_size))
        drawn, buffer[slot] = buffer[slot], sample
        if position >= skip:
            yield drawn
        position += 1
    for slot in rng.permutation(len(buffer)):
        if position >= skip:
            yield buffer[slot]
        position += 1
    return position
