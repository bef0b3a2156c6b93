"""What train_clip.py does to its pictures."""

import torch
from scripts import script


def test_a_blur_spreads_a_point_by_its_own_deviation_and_loses_nothing() -> None:
    sigma = torch.tensor([0.0, 0.7, 1.5], dtype=torch.float64)
    points = torch.zeros(3, 1, 33, 33, dtype=torch.float64)
    points[:, :, 16, 16] = 1
    blurred = script("train_clip").blur(points, sigma)
    assert torch.equal(blurred[0], points[0])
    away = torch.arange(-16, 17, dtype=torch.float64) ** 2
    for axis in (2, 3):
        variance = (blurred.sum(axis) * away).sum((1, 2))
        # A Gaussian that is sampled at whole pixels and cut at three deviations.
        torch.testing.assert_close(variance, sigma**2, rtol=0.03, atol=1e-12)
    torch.testing.assert_close(blurred.sum((1, 2, 3)), torch.ones(3, dtype=torch.float64))
