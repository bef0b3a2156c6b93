"""Threads that work a little ahead: the same results in the same order, and not all at once."""

import time
from collections.abc import Iterator

import pytest

from latentdiff.data.prefetch import prefetch


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_come_in_order(threads: int) -> None:
    def work(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number**2

    assert list(prefetch(work, range(20), threads=threads)) == [number**2 for number in range(20)]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_only_a_few_results_wait(threads: int) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number

    results = prefetch(str, items(), threads=threads)
    for number in range(50):
        assert next(results) == str(number)
        assert len(taken) <= number + 1 + 2 * threads
    results.close()


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_comes_where_its_result_would_have(threads: int) -> None:
    results = prefetch(lambda number: 1 / (3 - number), range(10), threads=threads)
    assert [next(results) for _ in range(3)] == [1 / 3, 1 / 2, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
