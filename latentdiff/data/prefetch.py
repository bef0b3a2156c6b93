"""Prefetching by threads, which helps since decoding and scaling release Python's lock."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def prefetch(
    work: Callable[[T], U], items: Iterable[T], *, threads: int
) -> Generator[U, None, None]:
    """Yield `work(item)` for each item, in order; at most a few results wait to be taken.

    Without threads it is `map`. An error is raised where its result would have come.
    """
    if threads == 0:
        yield from map(work, items)
        return
    waiting = deque[Future[U]]()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
