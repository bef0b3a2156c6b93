"""Prefetching in threads, which works because decoding and resizing release Python's GIL."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def prefetch(
    work: Callable[[T], U], items: Iterable[T], *, threads: int
) -> Generator[U, None, None]:
    """Yield `work(item)` for each item, in order, computed in `threads` threads; 0 means `map`.

    At most 2 · threads results are ahead of the caller. An exception of `work` is raised in place
    of its result.
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
