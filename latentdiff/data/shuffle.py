"""The order in which a stream is trained on: shards in an order of their own, and a buffer."""

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
    """One epoch from its sample number `skip` on; returns how many samples it has.

    `samples` gives those of the shards of the given numbers, in that order, and asks its second
    argument whether the next one's image is wanted. Each takes the place of one that is drawn from
    a buffer of `buffer_size`.
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
