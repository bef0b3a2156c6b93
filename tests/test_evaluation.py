"""Distances between sets of images: known answers, invariances, and torchmetrics' formulas."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.clips import SIDE, tiny_clip
from torch import Tensor
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd
from transformers import CLIPImageProcessor, CLIPModel

from latentdiff.cli import main
from latentdiff.evaluation.features import Features, images_of
from latentdiff.evaluation.frechet import Moments, frechet_distance
from latentdiff.evaluation.kernel import kernel_distance, kernel_interval
from latentdiff.evaluation.manifold import covered
from latentdiff.evaluation.results import compare_results, read_result


def gaussian(size: int, *, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """A mean (D,) and a covariance (D, D)."""
    root = torch.randn(size, size if rank is None else rank, dtype=torch.float64)
    return torch.randn(size, dtype=torch.float64), root @ root.T / size


def rotation(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q


def test_the_distance_of_two_gaussians_of_one_number_is_that_of_means_and_deviations() -> None:
    a = (torch.tensor([1.0]), torch.tensor([[4.0]]))
    b = (torch.tensor([-2.0]), torch.tensor([[0.25]]))
    assert frechet_distance(*a, *b) == pytest.approx(3**2 + (2 - 0.5) ** 2, rel=1e-12)


def test_covariances_that_commute_are_as_far_apart_as_their_deviations() -> None:
    axes = rotation(6)
    a, b = torch.rand(2, 6, dtype=torch.float64) + 0.1
    mean = torch.zeros(6)
    found = frechet_distance(mean, (axes * a**2) @ axes.T, mean, (axes * b**2) @ axes.T)
    assert found == pytest.approx(float((a - b).square().sum()), rel=1e-10)


@pytest.mark.parametrize("rank", [None, 3])
def test_a_gaussian_is_at_no_distance_from_itself(rank: int | None) -> None:
    """Also where the covariance is singular, in which roots of rounding errors would add up."""
    mean, covariance = gaussian(64, rank=rank)
    assert frechet_distance(mean, covariance, mean, covariance) < 1e-10


@pytest.mark.parametrize("rank", [None, 3])
def test_the_distance_is_torchmetrics_own(rank: int | None) -> None:
    a, b = gaussian(16, rank=rank), gaussian(16)
    theirs = float(_compute_fid(a[0], a[1], b[0], b[1]))
    assert frechet_distance(*a, *b) == pytest.approx(theirs, rel=1e-6)


def test_the_distance_is_symmetric_and_the_same_in_any_rotation_and_place() -> None:
    (mean_a, cov_a), (mean_b, cov_b) = gaussian(8), gaussian(8)
    expected = frechet_distance(mean_a, cov_a, mean_b, cov_b)
    assert frechet_distance(mean_b, cov_b, mean_a, cov_a) == pytest.approx(expected, rel=1e-12)
    turn, shift = rotation(8), torch.randn(8, dtype=torch.float64)
    moved = [
        (turn @ mean + shift, turn @ cov @ turn.T)
        for mean, cov in ((mean_a, cov_a), (mean_b, cov_b))
    ]
    assert frechet_distance(*moved[0], *moved[1]) == pytest.approx(expected, rel=1e-10)
    scaled = [(3 * mean, 9 * cov) for mean, cov in ((mean_a, cov_a), (mean_b, cov_b))]
    assert frechet_distance(*scaled[0], *scaled[1]) == pytest.approx(9 * expected, rel=1e-12)


def test_moments_of_batches_are_those_of_all_at_once() -> None:
    """Far from 0, where sums of squares lose every digit of the covariance."""
    features = torch.randn(50, 5, dtype=torch.float64) + 1e7
    moments = Moments()
    for part in features.split([1, 0, 7, 42]):
        moments.add(part)
    assert moments.count == 50
    torch.testing.assert_close(moments.mean, features.mean(dim=0), rtol=1e-15, atol=0)
    torch.testing.assert_close(moments.covariance, torch.cov(features.T), rtol=1e-6, atol=1e-8)


def test_one_image_has_neither_covariance_nor_kernel_distance() -> None:
    moments = Moments()
    moments.add(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="1 images have no covariance; at least 2"):
        _ = moments.covariance
    with pytest.raises(ValueError, match="1 images have no kernel distance; at least 2"):
        kernel_distance(torch.zeros(1, 3), torch.zeros(4, 3))


def test_the_kernel_distance_is_torchmetrics_own_where_both_sets_have_one_size() -> None:
    a, b = torch.randn(2, 30, 6, dtype=torch.float64)
    assert kernel_distance(a, 2 * b) == pytest.approx(float(poly_mmd(a, 2 * b)), rel=1e-10)


def test_the_kernel_distance_is_the_mean_of_its_kernel_over_pairs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sets of two sizes, and a matrix in several blocks."""
    monkeypatch.setattr("latentdiff.evaluation.kernel.BLOCK", 3)
    a, b = torch.randn(5, 4).double(), torch.randn(7, 4).double()

    def k(x: Tensor, y: Tensor) -> float:
        return (float(x @ y) / 4 + 1) ** 3

    def mean(pairs: list[tuple[Tensor, Tensor]]) -> float:
        return sum(k(x, y) for x, y in pairs) / len(pairs)

    def own(rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]

    expected = mean(own(a)) + mean(own(b)) - 2 * mean([(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_few_images_bias_the_frechet_distance_and_not_the_kernel_distance() -> None:
    """Sets of one distribution: 20 of them, of 24 vectors each, 8 numbers wide."""
    frechet, kernel = [], []
    for _ in range(20):
        a, b = torch.randn(2, 24, 8, dtype=torch.float64)
        moments = Moments(), Moments()
        moments[0].add(a)
        moments[1].add(b)
        frechet.append(
            frechet_distance(
                moments[0].mean, moments[0].covariance, moments[1].mean, moments[1].covariance
            )
        )
        kernel.append(kernel_distance(a, b))
    values = torch.tensor(kernel)
    assert min(frechet) > 0.3
    assert abs(float(values.mean())) < 3 * float(values.std()) / math.sqrt(20)


def test_the_kernel_interval_is_about_the_distance_and_narrows_with_more_drawings() -> None:
    """And its middle is not shifted by images that a sample has twice."""
    a, b = torch.randn(400, 6).double(), torch.randn(300, 6).double() + 0.5
    few, many = kernel_interval(a[:40], b), kernel_interval(a, b)
    assert many.low < kernel_distance(a, b) < many.high
    assert many.high - many.low < 0.5 * (few.high - few.low)
    middle = (many.low + many.high) / 2
    assert middle == pytest.approx(kernel_distance(a, b), abs=0.2 * (many.high - many.low))
    assert kernel_interval(a, b) == many


def test_a_set_covers_itself_and_nothing_of_one_far_away() -> None:
    a = torch.randn(60, 5)
    assert covered(a, a).all()
    assert covered(torch.cat([a, a]), a[:1].repeat(9, 1)).sum() == 2  # of equal images, itself
    assert not covered(a + 1000, a).any()


def test_what_is_covered_lies_within_the_third_neighbour_of_some_centre(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Recall as Kynkäänniemi et al. 2019 define it, one pair at a time."""
    monkeypatch.setattr("latentdiff.evaluation.manifold.BLOCK", 7)
    vectors, centres = torch.randn(50, 3).double(), torch.randn(20, 3).double() * 0.7

    def radius(centre: Tensor) -> float:
        return sorted(float((centre - other).norm()) for other in centres)[3]  # [0] is itself

    expected = [any((v - c).norm() <= radius(c) for c in centres) for v in vectors]
    assert 0 < sum(expected) < 50
    assert covered(vectors, centres).tolist() == expected
    with pytest.raises(ValueError, match="3 images have no 3 neighbours each; at least 4"):
        covered(vectors, centres[:3])


def test_the_result_of_distances_is_written_with_the_true_images_fingerprint(
    tower: Path, tmp_path: Path
) -> None:
    drawn, true = noise(tmp_path / "drawn", 12, seed=1), noise(tmp_path / "true", 12)
    found = []
    for name, size in (("a", "16"), ("b", "16"), ("c", "8")):
        out = ["--out", str(tmp_path / name), "--image_size", size]
        folders = [str(drawn), str(true), "--features", str(tower)]
        assert main(["eval", "distance", *folders, *out]) == 0
        found.append(read_result(tmp_path / name))
    assert found[0] == found[1]
    assert set(found[0].figures) == {"kernel", "precision", "recall"}
    with pytest.raises(ValueError, match="image_size is 16 in the one and 8 in the other"):
        compare_results(found[0], found[2])


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP whose images are of 16 x 16 pixels and have 8 features."""
    folder = tmp_path_factory.mktemp("run") / "model" / "clip"
    tiny_clip(folder)
    return folder


def noise(folder: Path, count: int, *, mean: int = 128, size: int = SIDE, seed: int = 0) -> Path:
    """Images of coarse noise around a mean, one of them in a folder of its own."""
    source = np.random.default_rng(seed)
    (folder / "more").mkdir(parents=True)
    for i in range(count):
        coarse = source.normal(mean, 40, (4, 4, 3)).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(coarse).resize((size, size), Image.Resampling.NEAREST)
        image.save(folder / ("more" if i == 0 else "") / f"{i:03}.png")
    return folder


@torch.no_grad()
def test_features_are_the_projected_states_of_transformers_own_tower(
    tower: Path, tmp_path: Path
) -> None:
    """Whatever the batches, and read from a run's `model/` as from its `clip/`."""
    images = list(images_of(noise(tmp_path / "set", 5)))
    processed = CLIPImageProcessor.from_pretrained(tower)(images, return_tensors="pt")
    theirs = CLIPModel.from_pretrained(tower).eval()
    pooled = theirs.vision_model(pixel_values=processed["pixel_values"]).pooler_output
    expected = theirs.visual_projection(pooled)
    for folder, batch_size in ((tower, 64), (tower.parent, 2)):
        features = Features.from_pretrained(folder)
        features.batch_size = batch_size
        found = features(images)
        assert found.shape == (5, features.width) == (5, 8)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert features([]).shape == (0, 8)


def test_linked_folders_are_compared_and_hidden_files_are_not(tmp_path: Path) -> None:
    """Images in a linked folder were not there, and what macOS hides ended the comparison."""
    folder = noise(tmp_path / "set", 3)
    (tmp_path / "set" / "more" / "._000.png").write_bytes(b"of a Mac")
    (folder / "a").mkdir()
    (folder / "more").rename(folder / "a" / "b")
    (folder / "link").symlink_to(folder / "a" / "b")
    assert len(list(images_of(folder / "a"))) == 1
    assert len(list(images_of(folder))) == 3
    (folder / "gone.png").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"gone\.png: .*No such file"):
        list(images_of(folder))


def test_of_a_image_the_square_in_the_middle_is_seen(tower: Path) -> None:
    features = Features.from_pretrained(tower)
    square = Image.new("RGB", (SIDE, SIDE), "navy")
    wide = Image.new("RGB", (SIDE + 24, SIDE), "red")
    wide.paste(square, (12, 0))
    torch.testing.assert_close(features([wide]), features([square]), rtol=1e-4, atol=1e-5)


def evaluate(drawn: Path, true: Path, tower: Path) -> int:
    return main(["eval", "distance", str(drawn), str(true), "--features", str(tower)])


def test_the_command_finds_copies_equal_and_other_images_far(
    tower: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    true = noise(tmp_path / "true", 40)
    copies = noise(tmp_path / "copies", 40, size=2 * SIDE)
    for name in ("grid.png", "grid-0004.png"):  # as generate leaves them
        Image.new("RGB", (900, 900)).save(copies / name)
    others = noise(tmp_path / "others", 40, mean=60, seed=1)
    distances = []
    for drawn in (copies, others):
        assert evaluate(drawn, true, tower) == 0
        (line,) = capsys.readouterr().out.splitlines()
        match = re.fullmatch(
            r"Fréchet distance (\S+), kernel distance (\S+) \(95 %: \S+ to \S+\), "
            r"precision (\S+)%, recall (\S+)% \(40 drawn and 40 true images, 8 features\)",
            line,
        )
        assert match is not None
        distances.append([float(number) for number in match.groups()])
    assert distances[0][0] < 0.01 * distances[1][0]
    assert distances[0][1] < 0 < distances[1][1]  # of the same images, unbiased: below 0
    assert distances[0][2:] == [100, 100]
    assert distances[1][2] < 100
    assert distances[1][3] < 100


def test_few_images_are_warned_of_with_what_it_means(
    tower: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn, true = noise(tmp_path / "drawn", 6), noise(tmp_path / "true", 20)
    assert evaluate(drawn, true, tower) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("latentdiff: 6 images are too few for the Fréchet distance of 8")
    assert "3 directions in which it is 0" in line


def nothing(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def broken(folder: Path) -> Path:
    noise(folder / "broken", 2)
    (folder / "broken" / "zzz.png").write_bytes(b"not an image")
    return folder / "broken"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: folder / "nowhere", "nowhere is not a folder of images"),
        (nothing, r"empty holds no images \(.apng, "),
        (broken, r"zzz\.png: cannot be decoded: none of PNG, "),
        (lambda folder: noise(folder / "one", 1), "1 images have no 3 neighbours each; at least 4"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_sentence(
    tower: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], Path],
    sentence: str,
) -> None:
    assert evaluate(make(tmp_path), noise(tmp_path / "true", 12), tower) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("latentdiff eval distance: ")
    assert re.search(sentence, line)


def test_a_folder_without_a_clip_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(noise(tmp_path / "a", 2), noise(tmp_path / "b", 2), tmp_path) == 2
    assert "config.json: no such file" in capsys.readouterr().err
