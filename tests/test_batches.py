"""Which examples, captions and random numbers a training step has: functions of (seed, step)."""

import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from latentdiff.data.batches import SampleOrder, batches, check_batch, local_rows
from latentdiff.training.randomness import choose, generator, micro_batches


class Numbers(Dataset[int]):
    """Example i is the number i."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


class Pairs(Numbers):
    """Example (i, variant) is both numbers."""

    def __getitem__(self, index: tuple[int, int]) -> tuple[int, int]:
        return index


BUCKETS = np.array([4, 0, 4, 4, 1, 4, 0, 4, 0, 4])  # sizes of 3, 1 and 6 examples
SMALL_SETS = st.lists(st.integers(0, 4), min_size=1, max_size=40).map(np.array)


def numbers(start: int, buckets: np.ndarray | None = None, **options: int) -> list[list[int]]:
    """The batches of steps `start` … 11 over 10 numbers, 4 a step, as lists."""
    settings = {"num_samples": 10, "batch_size": 4, "seed": 3, "stop": 12} | options
    drawn: Iterator[torch.Tensor] = batches(Numbers(10), start, buckets=buckets, **settings)
    return [batch.tolist() for batch in drawn]


def in_one_bucket(step: int, *, num_samples: int, batch_size: int, seed: int) -> list[int]:
    """What the order is without buckets, in one line a position: old runs must go on with it."""
    return [
        int(
            np.random.default_rng([seed, at // num_samples]).permutation(num_samples)[
                at % num_samples
            ]
        )
        for at in range(step * batch_size, (step + 1) * batch_size)
    ]


@pytest.mark.parametrize(("num_samples", "batch_size"), [(10, 4), (6, 6), (5, 12), (1, 3)])
def test_with_one_bucket_every_epoch_has_every_example_once(
    num_samples: int, batch_size: int
) -> None:
    order = SampleOrder(np.full(num_samples, 7), batch_size=batch_size, seed=0)
    walk = [i for step in range(3 * num_samples) for i in order(step)]
    assert len(walk) == 3 * num_samples * batch_size
    for at in range(0, len(walk), num_samples):
        assert sorted(walk[at : at + num_samples]) == list(range(num_samples))


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**40), st.integers(0, 10**9))
def test_one_bucket_is_one_walk(num_samples: int, batch_size: int, seed: int, step: int) -> None:
    order = SampleOrder(np.zeros(num_samples), batch_size=batch_size, seed=seed)
    expected = in_one_bucket(step, num_samples=num_samples, batch_size=batch_size, seed=seed)
    assert order(step) == expected


@settings(deadline=None)
@given(SMALL_SETS, st.integers(1, 12), st.integers(0, 10**6), st.integers(0, 10**9))
def test_a_step_is_of_one_bucket(
    buckets: np.ndarray, batch_size: int, seed: int, step: int
) -> None:
    ids = SampleOrder(buckets, batch_size=batch_size, seed=seed)(step)
    assert len(ids) == batch_size
    assert len(set(buckets[ids])) == 1


@settings(deadline=None)
@given(SMALL_SETS, st.integers(1, 12), st.integers(0, 100))
def test_over_many_epochs_every_example_comes_equally_often(
    buckets: np.ndarray, batch_size: int, seed: int
) -> None:
    order = SampleOrder(buckets, batch_size=batch_size, seed=seed)
    # All buckets end an epoch together after batch_size epochs of len(buckets) / batch_size steps.
    seen = np.zeros(len(buckets), dtype=int)
    for _ in range(2):
        for step in range(seen.sum() // batch_size, seen.sum() // batch_size + len(buckets)):
            np.add.at(seen, order(step), 1)
            for bucket in set(buckets):  # and within a bucket at any time, up to one
                assert np.ptp(seen[buckets == bucket]) <= 1
        assert len(set(seen)) == 1


@settings(deadline=None)
@given(SMALL_SETS, st.integers(1, 6), st.integers(1, 8))
def test_after_each_epoch_no_bucket_is_more_than_a_batch_behind(
    buckets: np.ndarray, batch_size: int, epochs: int
) -> None:
    names, counts = np.unique(buckets, return_counts=True)
    order = SampleOrder(buckets, batch_size=batch_size, seed=0)
    steps = int((epochs * counts // batch_size).sum())
    taken = [int(buckets[order(step)[0]]) for step in range(steps)]
    for name, count in zip(names, counts, strict=True):
        assert taken.count(int(name)) == epochs * count // batch_size


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def epoch(number: int, seed: int) -> list[int]:
        return SampleOrder(np.zeros(50), batch_size=50, seed=seed)(number)

    orders = [epoch(0, 0), epoch(1, 0), epoch(0, 1), epoch(1, 1), list(range(50))]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert epoch(7, 5) == epoch(7, 5)


def test_the_buckets_of_an_epoch_come_in_an_order_of_its_own() -> None:
    buckets = np.arange(60) % 3
    order = SampleOrder(buckets, batch_size=4, seed=0)  # 15 steps an epoch
    epochs = [[int(buckets[order(15 * e + i)[0]]) for i in range(15)] for e in range(4)]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        SampleOrder(np.zeros(0), batch_size=4, seed=0)


def test_data_below_one_batch_is_refused_with_both_numbers() -> None:
    check_batch(8, 8)
    with pytest.raises(ValueError, match="batch_size=9 must be at most 8, the number of examples"):
        check_batch(9, 8)


def test_a_million_examples_take_little_memory_and_no_time() -> None:
    rng = np.random.default_rng(0)
    order = SampleOrder(rng.integers(0, 20, 1_000_000), batch_size=256, seed=0)
    order(10**9)
    held = sum(members.nbytes for members in order.members)
    started = time.perf_counter()
    for step in range(1000):
        order(step)
    assert held == 4_000_000
    assert (time.perf_counter() - started) / 1000 < 0.01


@pytest.mark.parametrize("buckets", [None, BUCKETS])
def test_batches_do_not_depend_on_where_a_run_starts(buckets: np.ndarray | None) -> None:
    whole = numbers(0, buckets)
    assert len(whole) == 12
    for start in (1, 5, 11, 12):
        assert numbers(start, buckets) == whole[start:]


@pytest.mark.parametrize("buckets", [None, BUCKETS])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_share_out_the_batch_of_one(world_size: int, buckets: np.ndarray | None) -> None:
    parts = [numbers(0, buckets, rank=rank, world_size=world_size) for rank in range(world_size)]
    joined = [[i for part in step for i in part] for step in zip(*parts, strict=True)]
    assert joined == numbers(0, buckets)


@pytest.mark.parametrize("buckets", [None, BUCKETS])
@pytest.mark.parametrize("count", [2, 4])
def test_micro_batches_of_a_batch_are_the_batch(count: int, buckets: np.ndarray | None) -> None:
    for ids in numbers(0, buckets):
        slices = micro_batches({"ids": ids}, count)
        assert len(slices) == count
        assert [i for one in slices for i in one["ids"]] == ids


def test_variants_come_with_the_examples_whatever_the_process() -> None:
    options = {"num_samples": 10, "batch_size": 4, "seed": 3, "stop": 5}

    def variants(step: int) -> list[int]:
        return [step, step + 1, step + 2, step + 3]

    for rank in (0, 1):
        drawn = batches(Pairs(10), 0, variants=variants, rank=rank, world_size=2, **options)
        for step, (ids, seen) in enumerate(drawn):
            assert seen.tolist() == local_rows(variants(step), rank, 2)
            assert ids.tolist() == local_rows(numbers(0)[step], rank, 2)


def test_shards_of_sequences_and_tensors_are_their_rows_in_order() -> None:
    rows = torch.randn(6, 2)
    assert torch.equal(torch.cat([local_rows(rows, rank, 3) for rank in range(3)]), rows)
    assert [local_rows("abcdef", rank, 2) for rank in range(2)] == ["abc", "def"]


def test_random_numbers_differ_by_seed_step_and_purpose_alone() -> None:
    keys = [(seed, step, what) for seed in (0, 1) for step in (0, 1, 11) for what in ("a", "1/a")]
    drawn = [torch.randn(8, generator=generator(*key)) for key in keys]
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == len(keys)
    for key, expected in zip(keys, drawn, strict=True):
        torch.manual_seed(99)  # the global state plays no part
        assert torch.equal(torch.randn(8, generator=generator(*key)), expected)


def test_choose_takes_each_option_equally_often() -> None:
    places = [i / 12 for i in range(12)]
    assert choose(["abcd"] * 12, places) == list("aaabbbcccddd")
    assert choose(["a", "bc"], [0.999, 0.999]) == ["a", "c"]


def test_the_largest_number_below_one_chooses_the_last_option() -> None:
    place = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).item()
    for count in (1, 2, 3, 7, 1000):
        assert choose([range(count)], [place]) == [count - 1]


def test_captions_do_not_depend_on_the_number_of_processes() -> None:
    """Each process drew its own captions once, so that one process and two trained differently."""
    rows = [[f"{i}{letter}" for letter in "abcde"[: 1 + i % 5]] for i in range(8)]
    places = torch.rand(8, generator=generator(0, 4, "caption"))
    alone = choose(rows, places.tolist())
    parts = [choose(local_rows(rows, r, 4), local_rows(places, r, 4).tolist()) for r in range(4)]
    assert [word for part in parts for word in part] == alone
