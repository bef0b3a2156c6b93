"""How far two sets of images are apart, in features of any network: four figures side by side."""

import warnings
from dataclasses import dataclass

from torch import Tensor

from latentdiff.evaluation.frechet import Moments, frechet_distance
from latentdiff.evaluation.intervals import Interval, wilson_interval
from latentdiff.evaluation.kernel import kernel_distance, kernel_interval
from latentdiff.evaluation.manifold import covered


@dataclass(frozen=True)
class Comparison:
    """Distances of a set of drawn images from a set of true ones, with intervals of 95 %."""

    frechet: float
    """As FID: 0 for equal Gaussians; biased upwards for few images."""
    kernel: float
    """As KID: unbiased, so its mean is 0 for equal distributions, however few the images are."""
    kernel_interval: Interval
    """Of other drawings by the same model, beside these true images."""
    precision: float
    """The share of drawn images that are among the true ones."""
    precision_interval: Interval
    """Of other drawings, with the true images' manifold as it is."""
    recall: float
    """The share of true images that are among the drawn ones."""
    recall_interval: Interval
    """Of other true images, with the drawn images' manifold as it is."""
    num_drawn: int
    num_true: int


def compare(drawn: Tensor, true: Tensor) -> Comparison:
    """All distances between features (N, D) and (M, D).

    Warns when N or M is not above D. Raises ValueError for a set of fewer than four images.
    """
    least, width = min(len(drawn), len(true)), drawn.shape[1]
    if 1 < least <= width:
        warnings.warn(
            f"{least} images are too few for the Fréchet distance of {width} features: their "
            f"covariance has {width - least + 1} directions in which it is 0, and the distance is "
            "mostly that; read the kernel distance",
            stacklevel=2,
        )
    moments = []
    for features in (drawn, true):
        moments.append(Moments())
        moments[-1].add(features)
    (a, b) = moments
    precise, recalled = (int(covered(*sets).sum()) for sets in ((drawn, true), (true, drawn)))
    return Comparison(
        frechet=frechet_distance(a.mean, a.covariance, b.mean, b.covariance),
        kernel=kernel_distance(drawn, true),
        kernel_interval=kernel_interval(drawn, true),
        precision=precise / len(drawn),
        precision_interval=wilson_interval(precise, len(drawn)),
        recall=recalled / len(true),
        recall_interval=wilson_interval(recalled, len(true)),
        num_drawn=len(drawn),
        num_true=len(true),
    )
