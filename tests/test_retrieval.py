"""Retrieval among held-out images and captions: what counts as found."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.tasks.clip.retrieval import Pool


def make_images(*numbers: int) -> Tensor:
    """Images of one grey each, (N, 3, 2, 2); equal numbers give equal images."""
    return torch.tensor(numbers, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)


def plain_pool(count: int) -> Pool:
    """Each image with a caption of its own."""
    captions = [[f"number {i}"] for i in range(count)]
    return Pool.of(make_images(*range(count)), [own[0] for own in captions], captions)


def recalls(found: dict[str, Tensor], ranks: tuple[int, ...] = (1, 5)) -> set[float]:
    assert list(found) == [f"retrieval_{name}@{k}" for name in ("text", "image") for k in ranks]
    return {float(recall) for recall in found.values()}


def test_embeddings_that_agree_find_everything_and_those_of_the_next_nothing() -> None:
    pool, own = plain_pool(12), torch.eye(12)
    assert recalls(pool.recall(own, 3 * own)) == {1.0}
    found = pool.recall(own, own.roll(1, dims=0) + 0.1 * torch.rand(12, 12))
    assert found["retrieval_text@1"] == found["retrieval_image@1"] == 0


def test_recall_is_the_fraction_whose_match_is_among_the_k_nearest() -> None:
    image, text = torch.randn(2, 40, 3)
    text += 2 * image
    found = plain_pool(40).recall(image, text)
    similarity = F.cosine_similarity(image[:, None], text[None], dim=2)
    for name, scores in (("text", similarity), ("image", similarity.T)):
        for k in (1, 5):
            nearest = scores.topk(k, dim=1).indices
            recall = (nearest == torch.arange(40)[:, None]).any(dim=1).double().mean()
            assert found[f"retrieval_{name}@{k}"] == recall
            assert 0 < recall < 1


def test_embeddings_at_random_are_right_by_chance() -> None:
    """K of N; 8 pools of 100 images, of which each answer is right or wrong."""
    found = [plain_pool(100).recall(*torch.randn(2, 100, 16)) for _ in range(8)]
    for k in (1, 5):
        for name in ("text", "image"):
            recall = sum(float(one[f"retrieval_{name}@{k}"]) for one in found) / 8
            assert abs(recall - k / 100) < 4 * (k / 100 / 800) ** 0.5


def test_a_clip_to_which_all_is_equal_finds_nothing() -> None:
    """topk would give each image the first captions, and a fraction of them would be right."""
    assert recalls(plain_pool(10).recall(torch.ones(10, 4), torch.ones(10, 4))) == {0.0}


def test_equal_captions_are_one_and_right_for_each_of_their_images() -> None:
    captions = [["a cat"], ["a dog"], ["a cat"], ["a hen", "a bird"]]
    pool = Pool.of(make_images(0, 1, 2, 3), ["a cat", "a dog", "a cat", "a bird"], captions)
    assert pool.captions == ["a cat", "a dog", "a bird"]
    expected = [[True, False, False], [False, True, False], [True, False, False], [False] * 2]
    expected[3] += [True]
    assert pool.matches.tolist() == expected
    # The third image has the first one's embedding, and is not worse for it.
    image = torch.eye(3)[[0, 1, 0, 2]]
    assert recalls(pool.recall(image, torch.eye(3)), (1,)) == {1.0}


@pytest.mark.parametrize(("count", "ranks"), [(1, ()), (2, (1,)), (9, (1,)), (10, (1, 5))])
def test_what_is_found_by_chance_is_not_reported(count: int, ranks: tuple[int, ...]) -> None:
    """Of two held-out images retrieval@5 was 100 %, whatever had been learned."""
    assert recalls(plain_pool(count).recall(*[torch.randn(count, 4)] * 2), ranks) <= {1.0}


def test_equal_images_are_one_with_the_captions_of_all() -> None:
    captions = [["a cat"], ["a dog"], ["un chat", "a pet"]]
    pool = Pool.of(make_images(5, 6, 5), ["a cat", "a dog", "a pet"], captions)
    assert torch.equal(pool.images, make_images(5, 6))
    assert pool.matches.tolist() == [[True, False, True], [False, True, False]]


def test_a_caption_of_another_form_of_the_same_image_is_right() -> None:
    """The pool has one caption of each image; one that others have as well is theirs too."""
    captions = [["red", "round"], ["blue", "round"], ["green"]]
    pool = Pool.of(make_images(0, 1, 2), ["red", "round", "green"], captions)
    assert pool.matches.tolist() == [
        [True, True, False],
        [False, True, False],
        [False, False, True],
    ]


@pytest.mark.parametrize("shift", [0, 3])
def test_the_order_of_the_examples_changes_no_recall(shift: int) -> None:
    image, text = torch.randn(2, 9, 4)
    order = torch.arange(9).roll(shift)
    captions = [[f"number {i}"] for i in range(9)]
    moved = [captions[i] for i in order.tolist()]
    pool = Pool.of(make_images(*order.tolist()), [own[0] for own in moved], moved)
    assert pool.recall(image[order], text[order]) == plain_pool(9).recall(image, text)
