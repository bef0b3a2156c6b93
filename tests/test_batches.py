"""Which examples, captions and random numbers a training step has: functions of (seed, step)."""

from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import Dataset

from latentdiff.data.batches import batches, sample_ids, shard
from latentdiff.training.randomness import choose, generator


class Numbers(Dataset[int]):
    """Example i is the number i."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


def numbers(start: int, **options: int) -> list[list[int]]:
    """The batches of steps `start` … 11 over 10 numbers, 4 a step, as lists."""
    settings = {"num_samples": 10, "batch_size": 4, "seed": 3, "stop": 12} | options
    drawn: Iterator[torch.Tensor] = batches(Numbers(10), start, **settings)
    return [batch.tolist() for batch in drawn]


@pytest.mark.parametrize(("num_samples", "batch_size"), [(10, 4), (6, 6), (5, 12), (1, 3)])
def test_every_epoch_has_every_example_once(num_samples: int, batch_size: int) -> None:
    walk = [
        i
        for step in range(3 * num_samples)
        for i in sample_ids(step, num_samples=num_samples, batch_size=batch_size, seed=0)
    ]
    assert len(walk) == 3 * num_samples * batch_size
    for at in range(0, len(walk), num_samples):
        assert sorted(walk[at : at + num_samples]) == list(range(num_samples))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def epoch(number: int, seed: int) -> list[int]:
        return sample_ids(number, num_samples=50, batch_size=50, seed=seed)

    orders = [epoch(0, 0), epoch(1, 0), epoch(0, 1), epoch(1, 1), list(range(50))]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert epoch(7, 5) == epoch(7, 5)


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        sample_ids(0, num_samples=0, batch_size=4, seed=0)


def test_batches_do_not_depend_on_where_a_run_starts() -> None:
    whole = numbers(0)
    assert len(whole) == 12
    for start in (1, 5, 11, 12):
        assert numbers(start) == whole[start:]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_share_out_the_batch_of_one(world_size: int) -> None:
    parts = [numbers(0, rank=rank, world_size=world_size) for rank in range(world_size)]
    joined = [[i for part in step for i in part] for step in zip(*parts, strict=True)]
    assert joined == numbers(0)


def test_shards_of_sequences_and_tensors_are_their_rows_in_order() -> None:
    rows = torch.randn(6, 2)
    assert torch.equal(torch.cat([shard(rows, rank, 3) for rank in range(3)]), rows)
    assert [shard("abcdef", rank, 2) for rank in range(2)] == ["abc", "def"]


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
    parts = [choose(shard(rows, r, 4), shard(places, r, 4).tolist()) for r in range(4)]
    assert [word for part in parts for word in part] == alone
